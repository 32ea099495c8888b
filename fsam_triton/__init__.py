"""Sharpness-aware fine-tuning as cheap as memory traffic allows: fused SAM, ASAM, Fisher-SAM and AdamW with L2-SP."""

from .adamw_l2sp import AdamWL2SP
from .fsam import FSAM
from .masks import FisherMask

__all__ = ["FSAM", "AdamWL2SP", "FisherMask"]
__version__ = "0.1.0"
