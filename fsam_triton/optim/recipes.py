"""The FSAM code's optimizer arguments in the terms of `FSAM`."""

from __future__ import annotations

from typing import Any

from ..errors import check
from ..masks.perturbed import FisherMask
from .schedule import Schedule

SAM_TYPES = ("sam", "esam", "gsam", "fisher-sam", "fisher-esam", "fisher-gsam")


def arguments_of(
    sam_type: str,
    *,
    rho: float = 0.05,
    alpha: float | None = None,
    beta: float = 0.5,
    gamma: float = 0.5,
    keep_ratio: float = 0.1,
    mask_iter_e: int = 100,
    max_updates_gsam: int = 0,
    warmup_updates_gsam: int = 0,
    rho_min: float | None = None,
    **fsam: Any,
) -> dict[str, Any]:
    """Arguments of `FSAM` that reproduce the FSAM code (github.com/WHU-ZQH/FSAM4PLM) for a sam_type.

    Its scripts pass rho, beta, gamma and mask_iter_e to every type, so every type takes them, and keep_ratio too. A
    type that does not use an argument still checks it.

    Args:
        sam_type: one of `SAM_TYPES`.
        rho: radius, >= 0; for the gsam types with max_updates_gsam, the highest radius.
        alpha: GSAM's weight of the surrogate gap, >= 0 (default: 0.4; only for the gsam types).
        beta: for the esam types, the fraction of the tensors that is perturbed, in (0, 1].
        gamma: for the esam types, the fraction of the batch for the second gradient, in (0, 1].
        keep_ratio: for the fisher types, the fraction of the selectable weights that is perturbed, in (0, 1].
        mask_iter_e: the fisher types select the mask again after this many steps, >= 1.
        max_updates_gsam: number of steps over which rho falls to rho_min along half a cosine (gsam types; default: 0,
            constant).
        warmup_updates_gsam: number of these steps over which rho first rises.
        rho_min: the final rho (default: rho / 10, as 0.01 and 0.001 in the FSAM code).
        **fsam: any other argument of FSAM; it takes precedence over the arguments made here.

    Returns:
        Keyword arguments of FSAM.

    Raises:
        ValueError: sam_type is unknown, an argument is out of its range, or an argument for the gsam types is given to
            another.
    """
    check(sam_type in SAM_TYPES, "sam_type", sam_type, f"must be one of {', '.join(SAM_TYPES)}")
    check(rho >= 0, "rho", rho, "must be >= 0")
    check(isinstance(mask_iter_e, int) and mask_iter_e >= 1, "mask_iter_e", mask_iter_e, "must be an int >= 1")
    for name, value in (("keep_ratio", keep_ratio), ("beta", beta), ("gamma", gamma)):
        check(0 < value <= 1, name, value, "must be in (0, 1]")
    out: dict[str, Any] = {"rho": rho}
    if sam_type.endswith("gsam"):
        out["alpha"] = 0.4 if alpha is None else alpha
        for name, value in (("max_updates_gsam", max_updates_gsam), ("warmup_updates_gsam", warmup_updates_gsam)):
            check(type(value) is int and value >= 0, name, value, "must be an int >= 0")
        if max_updates_gsam:
            warmup, total = warmup_updates_gsam, max_updates_gsam
            check(warmup <= total, "warmup_updates_gsam", warmup, f"must be at most max_updates_gsam={total}")
            lowest = rho / 10 if rho_min is None else rho_min
            out["schedule"] = Schedule(rho_follows="cosine", total_steps=total, rho_warmup=warmup, rho_min=lowest)
        else:
            for name, value in (("warmup_updates_gsam", warmup_updates_gsam), ("rho_min", rho_min)):
                check(not value, name, value, "needs max_updates_gsam")
    else:
        check(alpha is None, "alpha", alpha, f"has no meaning for sam_type={sam_type!r}, only for the gsam types")
        for name, value in (
            ("max_updates_gsam", max_updates_gsam),
            ("warmup_updates_gsam", warmup_updates_gsam),
            ("rho_min", rho_min),
        ):
            check(not value, name, value, f"has no meaning for sam_type={sam_type!r}, only for the gsam types")
    if sam_type.endswith("esam"):
        out |= {"beta": beta, "beta_per": "tensor", "gamma": gamma}
    if sam_type.startswith("fisher"):
        out["mask"] = FisherMask(keep_ratio, interval=mask_iter_e)
    return {**out, **fsam}
