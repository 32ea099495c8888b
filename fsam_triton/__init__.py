"""Sharpness-aware fine-tuning as cheap as memory traffic allows."""

from .adamw_l2sp import AdamWL2SP
from .delta import DeltaError, apply_delta, from_pretrained, merge_deltas, save_delta, save_pretrained
from .distributed import SparseMerger
from .fish import FishMask
from .fisher import estimate_fisher
from .fsam import FSAM
from .masks import FisherMask
from .merge_files import load_merged
from .mixup import Mixup, MixupDraw
from .momentum_sam import MomentumSAM
from .samples import select_samples
from .schedule import Schedule
from .workers import WorkerError

__all__ = [
    "FSAM",
    "AdamWL2SP",
    "DeltaError",
    "FishMask",
    "FisherMask",
    "Mixup",
    "MixupDraw",
    "MomentumSAM",
    "Schedule",
    "SparseMerger",
    "WorkerError",
    "apply_delta",
    "estimate_fisher",
    "from_pretrained",
    "load_merged",
    "merge_deltas",
    "save_delta",
    "save_pretrained",
    "select_samples",
]
__version__ = "0.1.0"
