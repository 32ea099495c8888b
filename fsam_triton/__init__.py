"""Sharpness-aware fine-tuning as cheap as memory traffic allows."""

from .batches.mixup import Mixup, MixupDraw
from .batches.samples import select_samples
from .errors import ArgumentError
from .fisher import causal_lm_loss, estimate_fisher
from .masks.perturbed import FisherMask
from .masks.trained import FishMask
from .optim.adamw_l2sp import AdamWL2SP
from .optim.flat_lora import FlatLoRA
from .optim.fsam import FSAM
from .optim.momentum_sam import MomentumSAM
from .optim.sam import SAM
from .optim.schedule import Schedule
from .sparse_training.delta import DeltaError, apply_delta, from_pretrained, merge_deltas, save_delta, save_pretrained
from .sparse_training.merge_files import load_merged
from .sparse_training.merger import SparseMerger
from .sparse_training.workers import WorkerError

__all__ = [
    "FSAM",
    "SAM",
    "AdamWL2SP",
    "ArgumentError",
    "DeltaError",
    "FishMask",
    "FisherMask",
    "FlatLoRA",
    "Mixup",
    "MixupDraw",
    "MomentumSAM",
    "Schedule",
    "SparseMerger",
    "WorkerError",
    "apply_delta",
    "causal_lm_loss",
    "estimate_fisher",
    "from_pretrained",
    "load_merged",
    "merge_deltas",
    "save_delta",
    "save_pretrained",
    "select_samples",
]
__version__ = "0.2.0"
