"""The passes of sharpness-aware optimizers over many tensors at once; `reference` describes their arguments."""

from .kernels import formats, reference, spec
from .kernels.directions import Along
from .kernels.segments import Plan, Segments
from .ops import (
    add_noise_,
    climb_coefficients,
    descend_,
    descend_coefficients,
    digit_histogram,
    gap,
    gather_,
    linear_fisher_,
    norm_sq,
    norms_sq,
    perturb_,
    scatter_,
    write_mask_,
)

__all__ = [
    "Along",
    "Plan",
    "Segments",
    "add_noise_",
    "climb_coefficients",
    "descend_",
    "descend_coefficients",
    "digit_histogram",
    "formats",
    "gap",
    "gather_",
    "linear_fisher_",
    "norm_sq",
    "norms_sq",
    "perturb_",
    "reference",
    "scatter_",
    "spec",
    "write_mask_",
]
