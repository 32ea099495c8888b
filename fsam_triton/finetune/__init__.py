"""The command line ``fsam-finetune``: trains text classifiers and causal language models, sharpness-aware or not."""

from .command import main

__all__ = ["main"]
