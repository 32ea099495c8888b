"""The command line ``fsam-finetune``: fine-tunes a text classifier with AdamW or a sharpness-aware optimizer."""

from .command import main

__all__ = ["main"]
