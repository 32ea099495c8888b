"""Passes over one tensor, for tests of what they do to it."""

import torch
from torch import Tensor

from fsam_triton.kernels import reference, spec
from fsam_triton.kernels.segments import Plan, Segments
from tests.kernels.cases import FLOATS, ordinary, with_specials
from tests.kernels.launches import HYPER, REMAINDERS

# The optimizers' types of weights and state; with a remainder there are fp32 master weights.
TYPES = {
    "fp32": ("fp32", "fp32", False),
    "bf16": ("bf16", "bf16", False),
    "bf16_master": ("bf16", "fp32", True),
    "fp16": ("fp16", "fp32", False),
    "fp16_master": ("fp16", "fp32", True),
    "fp64": ("fp64", "fp64", False),
}


def perturbed(
    module, weight: Tensor, grad: Tensor, scale: float, *, key=0x1ABCDEF0, mask=None, beta=None, **flags
) -> tuple[Tensor, Tensor]:
    """Weights and backup after the pass; the arguments stay as they are."""
    plan = Plan([weight.numel()], weight.device)
    weight, backup = weight.clone(), torch.zeros(plan.size, dtype=weight.dtype)
    row = {"scale": scale, "chance": 0.0 if beta is None else beta - 0.5}
    coef = torch.tensor([[row[name] for name in spec.PERTURB]], dtype=reference.compute_dtype(weight.dtype))
    key = torch.tensor([key]).to(torch.int32)
    flags = (flags.get("adaptive", False), flags.get("stochastic", True), beta is not None)
    module.perturb_(Segments(plan, [weight], [grad]), backup, mask, coef, key, *flags)
    return weight, plan.part(backup, 0)


def tensors_of(types: str, n: int = 1100, rule="adamw", make=with_specials, **wanted: bool) -> dict[str, Tensor | None]:
    """What a pass over one tensor works on, by name; the first half of the state is zero, as at a first step.

    Args:
        **wanted: whether there is an anchor, a second gradient (other), one to be kept (keep), an average (ema), and
            the state's last lane (all_lanes).
    """
    weight, state, has_remainder = TYPES[types]
    dtype, old = FLOATS[weight], torch.arange(n) >= n // 2
    clean = make(n, dtype, seed=n)
    # x + 0 is x but for -0 + 0.
    clean[clean == 0] = 0.0
    tensors = {"weight": torch.full_like(clean, 7.0), "clean": clean, "grad": make(n, dtype, seed=n + 2)}
    names = spec.STATE[rule] if wanted.get("all_lanes", rule != "adamw") else spec.STATE[rule][:-1]
    for i, name in enumerate(names):
        tensors[name] = (ordinary(n, torch.float64, seed=n + 4 + i) * 0.1 * old).to(FLOATS[state])
        if name.endswith("_sq"):
            tensors[name] = tensors[name].square()
    tensors["remainder"] = torch.zeros(n, dtype=REMAINDERS[weight]) if has_remainder else None
    tensors["anchor"] = make(n, dtype, seed=n + 6) if wanted.get("anchor") else None
    tensors["other"] = make(n, dtype, seed=n + 12) if wanted.get("other") or wanted.get("keep") else None
    tensors["orthogonal"] = torch.zeros_like(clean) if wanted.get("keep") else None
    tensors["ema"] = make(n, reference.compute_dtype(dtype), seed=n + 14) if wanted.get("ema") else None
    return tensors


def descended(module, tensors: dict, rule="adamw", stochastic=True, key=77, **hyper: float) -> dict[str, Tensor]:
    """All tensors after the pass, by name; the arguments stay as they are."""
    n = tensors["weight"].numel()
    plan, after, lanes = Plan([n], torch.device("cpu")), {}, {}
    for name, tensor in tensors.items():
        if tensor is None or name in ("weight", "clean", "grad", "other"):
            after[name] = None if tensor is None else tensor.clone()
        else:
            lanes[name] = torch.zeros(plan.size, dtype=tensor.dtype)
            after[name] = plan.part(lanes[name], 0)
            after[name].copy_(tensor)
    columns = {name: [after[name]] for name in ("weight", "grad", "clean", "other") if after[name] is not None}
    coef = torch.tensor([[{**HYPER, **hyper}[name] for name in spec.DESCEND[rule]]], dtype=torch.float64)
    coef = coef.to(reference.compute_dtype(tensors["weight"].dtype))
    state = [lanes[name] for name in spec.STATE[rule] if name in lanes]
    others = (lanes.get(name) for name in ("remainder", "anchor", "ema", "orthogonal"))
    key = torch.tensor([key], dtype=torch.int32)
    module.descend_(Segments(plan, **columns), state, *others, coef, key, rule, stochastic)
    return {name: tensor for name, tensor in after.items() if tensor is not None}
