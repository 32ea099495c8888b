"""Describes every kernel as it is launched, so that it can be compiled without a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from triton.compiler import ASTSource

from fsam_triton.kernels import (
    blocks,
    coefficients,
    descend,
    fisher,
    gap,
    noise,
    norm,
    perturb,
    sparse,
    spec,
    topk_mask,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
DTYPES |= {"i8": torch.int8, "u8": torch.uint8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64}
SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
# Type of the weights, and the bits of master weights if there are any; of 24 bits, with moments and backups of 8.
PRECISIONS = {
    "fp32": ("fp32", 0),
    "bf16": ("bf16", 0),
    "bf16 + master": ("bf16", 32),
    "bf16, 8-bit": ("bf16", 24),
    "fp16": ("fp16", 0),
    "fp16 + master": ("fp16", 32),
    "fp64": ("fp64", 0),
}
REMAINDERS = {("bf16", 32): "i16", ("bf16", 24): "i8", ("fp16", 32): "i32"}


@dataclass(frozen=True)
class Build:
    """A kernel with what its launcher passes.

    Attributes:
        name: of the kernel, its first type and the flags that are set.
        kernel: the @triton.jit function.
        pointers: the arrays that are given, with their types; several where the argument is a tuple.
        flags: the constants.
        integers: integer arguments, with whether they are multiples of 16, as Triton's launcher would notice.
        options: of the compiler; with `num_warps` where that is the same on all GPUs.
        lanes: of a program, where `num_warps` is as many as make so many lanes.
    """

    name: str
    kernel: object
    pointers: tuple[tuple[str, str | tuple[str, ...]], ...]
    flags: tuple[tuple[str, object], ...]
    integers: tuple[tuple[str, bool], ...] = ()
    options: tuple[tuple[str, object], ...] = (("enable_fp_fusion", False),)
    lanes: int = blocks.LANES

    def source(self) -> ASTSource:
        """What `triton.compile` takes."""
        pointers, flags = dict(self.pointers), dict(self.flags)
        integers, wide = dict(self.integers), "n" in dict(self.integers)
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            name, aligned = parameter.name, not parameter.do_not_specialize
            places = [(i,)]
            if isinstance(types := pointers.get(name), tuple):
                signature[name] = tuple(f"*{dtype}" for dtype in types)
                places = [(i, j) for j in range(len(types))]
            elif types is not None:
                signature[name] = f"*{types}"
            elif name in integers:
                signature[name], aligned = "i64" if wide else "i32", integers[name]
            else:
                signature[name], constants[(i,)], aligned = "constexpr", flags.get(name), False
            attributes |= {place: [["tt.divisibility", 16]] for place in places if aligned}
        return ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)

    def warps(self, warp_size: int) -> int:
        return dict(self.options).get("num_warps", self.lanes // warp_size)


def build(kernel, pointers: dict[str, str | tuple[str, ...]], *words: str, **more) -> Build:
    """A build of a kernel.

    Args:
        kernel: the @triton.jit function.
        pointers: the arrays that are given, with their types.
        *words: what its name says besides the kernel's name.
        **more: the kernel's constants, in capitals, and further fields of `Build`.
    """
    flags = {"BLOCK": blocks.BLOCK, **{name: value for name, value in more.items() if name.isupper()}}
    if "CHUNK" in kernel.arg_names:
        flags["CHUNK"] = spec.CHUNK
    fields = {name: value for name, value in more.items() if not name.isupper()}
    name = "-".join([kernel.__name__.removesuffix("_kernel"), *words])
    return Build(name, kernel, tuple(pointers.items()), tuple(flags.items()), **fields)


# -- passes over segments ----------------------------------------------------------------------------------------------

TABLE = {"table_ptr": "i64", "segments_ptr": "i32"}
# Sums may be fused: their order is the device's own.
SUM = {"options": (("enable_fp_fusion", True),)}


def said(**switches: bool) -> list[str]:
    """The names of those that are on."""
    return [name for name, is_on in switches.items() if is_on]


def over_blocks(kernel, pointers: dict[str, Any], arrays: Iterable[str], *words: str, **flags) -> Build:
    """A pass over blocks, whose arrays decide how many elements a thread has."""
    lanes = blocks.shape(*(torch.empty(0, dtype=DTYPES[dtype]) for dtype in arrays))["LANES"]
    return build(kernel, TABLE | pointers, *words, LANES=lanes, lanes=lanes, **flags)


def compute_type(weight: str) -> str:
    return "fp64" if weight == "fp64" else "fp32"


def norm_build(grad: str, adaptive=False, masked=False, along="gradient", lane: str | None = None) -> Build:
    """`norm_sq` of gradients of a type, or of what is made of them and a lane of a type (default: the gradients')."""
    lane = None if along == "gradient" else lane or grad
    pointers = TABLE | {"grad_ptr": grad}
    pointers |= {"weight_ptr": grad} if adaptive else {}
    pointers |= {"mask_ptr": "i32"} if masked else {}
    pointers |= {"scale_ptr": "bf16"} if grad == "i8" or lane == "u8" else {}
    pointers |= steering(lane, grad) | {"partial_ptr": "fp64"}
    words = [grad, *said(adaptive=adaptive, masked=masked), *along_words(along, lane, grad)]
    return build(norm.norm_kernel, pointers, *words, ALONG=along, **SUM)


def steering(lane: str | None, weight: str) -> dict[str, str]:
    """What directions other than the gradient are made of."""
    return {} if lane is None else {"lane_ptr": lane, "along_ptr": compute_type(weight)}


def along_words(along: str, lane: str | None, weight: str) -> list[str]:
    return [] if lane is None else [along, *([f"of_{lane}"] if lane != weight else [])]


def gap_build(dtype: str) -> Build:
    pointers = TABLE | {"first_ptr": dtype, "second_ptr": dtype, "partial_ptr": "fp64"}
    return build(gap.gap_kernel, pointers, dtype, **SUM)


def perturb_build(
    weight: str,
    grad: str | None = None,
    masked=False,
    adaptive=False,
    stochastic=True,
    random=False,
    steps=False,
    along="gradient",
    lane: str | None = None,
) -> Build:
    """`perturb_` of weights of a type.

    Args:
        grad: type of the gradients (default: the weights').
        steps: whether the backup has steps.
        along, lane: what is made of gradients and a lane of a type (default: the weights').
        masked, adaptive, stochastic, random: whether they are on.
    """
    lane = None if along == "gradient" else lane or weight
    grad, stochastic = grad or weight, stochastic and SIZES[weight] == 2
    backup = "i8" if steps else weight
    pointers = {"weight_ptr": weight, "grad_ptr": grad, "backup_ptr": backup}
    pointers |= {"mask_ptr": "i32"} if masked else {}
    pointers |= {"scale_ptr": "bf16"} if grad == "i8" or lane == "u8" else {}
    pointers |= steering(lane, weight)
    pointers |= {"coef_ptr": compute_type(weight), "key_ptr": "i32"}
    words = [weight, *([f"by_{grad}"] if grad != weight else []), *along_words(along, lane, weight)]
    words += said(masked=masked, adaptive=adaptive, stochastic=stochastic, random=random, steps=steps)
    flags = {"ALONG": along, "ADAPTIVE": adaptive, "STOCHASTIC": stochastic, "RANDOM": random}
    arrays = (weight, grad, backup, *([] if lane is None else [lane]))
    return over_blocks(perturb.perturb_kernel, pointers, arrays, *words, **flags)


def descend_build(
    weight: str,
    master=0,
    rule="adamw",
    *,
    missing=None,
    anchor=False,
    stochastic=True,
    other=False,
    keep=False,
    ema=False,
    steps=False,
) -> Build:
    """`descend_` of weights of a type.

    Args:
        master: bits of master weights, 0 without; of 24, moments have 8.
        missing: whether the last lane of the rule's state is not there (default: AdamW's is not, which is amsgrad's).
        keep: whether an orthogonal component is kept, of two gradients.
        anchor, stochastic, other, ema, steps: whether they are there.
    """
    missing = rule == "adamw" if missing is None else missing
    state = (moments(weight, master), *[second_moments(weight, master)] * 2)
    state = state[: len(spec.STATE[rule]) - missing]
    stochastic = stochastic and SIZES[weight] == 2 and master != 32
    pointers = {"weight_ptr": weight, "clean_ptr": weight, "grad_ptr": weight}
    pointers |= {"other_ptr": weight} if other or keep else {}
    lanes = {"steps_ptr": "i8"} if steps else {}
    lanes |= {"remainder_ptr": REMAINDERS[weight, master]} if master else {}
    lanes |= {"anchor_ptr": weight} if anchor else {}
    lanes |= {"ema_ptr": compute_type(weight)} if ema else {}
    lanes |= {"orthogonal_ptr": weight} if keep else {}
    pointers |= lanes | {"coef_ptr": compute_type(weight), "key_ptr": "i32", "state_ptrs": state}
    pointers |= {"scale_ptrs": ("bf16",) * len(state)} if master == 24 and state else {}
    words = [rule, weight]
    words += ["8_bit"] if master == 24 else said(master=master == 32)
    words += said(amsgrad=rule == "adamw" and not missing, plain=rule != "adamw" and missing)
    words += said(stochastic=stochastic, anchor=anchor, other=other, keep=keep, ema=ema, steps=steps)
    flags = {"RULE": rule, "COLUMNS": len(spec.DESCEND[rule]), "STOCHASTIC": stochastic}
    return over_blocks(descend.descend_kernel, pointers, (weight, *lanes.values(), *state), *words, **flags)


def moments(weight: str, master: int) -> str:
    """Type of a rule's first moments; fp16 would lose small squares."""
    if master == 24:
        return "i8"
    return "fp32" if master or weight == "fp16" else weight


def second_moments(weight: str, master: int) -> str:
    """Type of a rule's other lanes."""
    return "u8" if master == 24 else moments(weight, master)


# -- coefficients ------------------------------------------------------------------------------------------------------

ABOUT = {"numbers_ptr": "fp64", "members_ptr": "i64", "steps_ptr": "fp32"}
MADE = {"integers": (("count", False), ("purpose", False)), "ROWS": coefficients.ROWS}


def climb_coefficients_build(weight: str, scaled=False) -> Build:
    """What makes the coefficients of `perturb_`."""
    pointers = ABOUT | {"norm_sq_ptr": "fp64"} | ({"scale_ptr": "fp32"} if scaled else {})
    pointers |= {"coef_ptr": compute_type(weight), "key_ptr": "i32"}
    return build(coefficients.climb_coefficients_kernel, pointers, compute_type(weight), *said(scaled=scaled), **MADE)


def descend_coefficients_build(
    rule: str, weight: str, combined="alone", measured=False, some=False, scaled=False, paired=False
) -> Build:
    """What makes the coefficients of `descend_`, and counts the update."""
    pointers = ABOUT | ({"active_ptr": "u8"} if some else {})
    pointers |= {"measured_ptr": "fp64"} if measured or combined != "alone" else {}
    pointers |= {"scale_ptr": "fp32", "other_scale_ptr": "fp32", "overflow_ptr": "fp32"} if scaled else {}
    pointers |= {"squares_ptr": "fp64", "pairs_ptr": "i64"} if paired else {}
    pointers |= {"coef_ptr": compute_type(weight), "key_ptr": "i32"}
    flags = {"RULE": rule, "COMBINED": combined}
    flags |= {"NUMBERS": len(spec.NUMBERS[rule]), "COLUMNS": len(spec.DESCEND[rule])}
    words = (rule, compute_type(weight), combined, *said(measured=measured, some=some, scaled=scaled, paired=paired))
    return build(coefficients.descend_coefficients_kernel, pointers, *words, **MADE, **flags)


# -- other kernels -----------------------------------------------------------------------------------------------------


def topk_builds(values: str, is_aligned: bool = True) -> list[Build]:
    """What chooses a mask by values of this type: the first and the last digit, ties, the mask."""
    wide = values == "fp64"
    words = [values, *said(ragged=not is_aligned)]
    over = partial(build, integers=(("n", is_aligned),), WIDE=wide)
    pointers, threshold = {"values_ptr": values}, {"threshold_ptr": "i64"}
    counts = pointers | {"prefix_ptr": "i64", "hist_ptr": "i64"}
    return [
        *(
            over(topk_mask.digit_histogram_kernel, counts, *words, f"{bits}_bits", SHIFT=shift, BITS=bits)
            for shift, bits in ([(56, 7)] if wide else [(23, 8), (0, 7)])
        ),
        over(topk_mask.count_ties_kernel, pointers | threshold | {"ties_ptr": "i64"}, *words),
        over(topk_mask.write_mask_kernel, pointers | threshold | {"quota_ptr": "i64", "mask_ptr": "i32"}, *words),
    ]


def sparse_builds(values: str, index: str = "i32") -> list[Build]:
    """Gather and scatter of trained weights; an index of int64 is for tensors of 2**31 elements and more."""
    pointers = {"anchor_ptr": values, "places_ptr": "i64", "jobs_ptr": "i64", "index_ptr": index, "compact_ptr": values}
    found = []
    for scatter in (False, True):
        one = build(sparse.sparse_kernel, pointers, SCATTER=scatter, BLOCK=sparse.BLOCK)
        found.append(replace(one, name=f"{'scatter' if scatter else 'gather'}-{values}-{index}"))
    return found


def fisher_build(dtype: str, n_out: int, n_in: int, absolute=False) -> Build:
    """`linear_fisher_` for a weight of [n_out, n_in] and activations of this type."""
    tile = fisher.tiling(DTYPES[dtype], n_out, n_in)
    # Products in fp32 of matrices: see the launcher.
    options = [("enable_fp_fusion", True), *((name, tile.pop(name)) for name in ("num_warps", "num_stages"))]
    name = f"linear_fisher-{dtype}-{n_out}x{n_in}" + ("-absolute" if absolute else "")
    pointers = {"fisher_ptr": "fp32", "input_ptr": dtype, "grad_ptr": dtype}
    flags = {"ABSOLUTE": absolute, "WIDEN": False, **tile}
    # The launcher has `batch` and `positions` not specialised.
    integers = {"batch": False, "positions": False, "n_out": n_out % 16 == 0, "n_in": n_in % 16 == 0}
    kernel = fisher.linear_fisher_kernel
    return Build(name, kernel, tuple(pointers.items()), tuple(flags.items()), tuple(integers.items()), tuple(options))


def noise_build(weight: str, out: str, columns: int, by_column=False) -> Build:
    """`add_noise_` to a weight of so many columns."""
    warps = blocks.shape(*(torch.empty(0, dtype=DTYPES[dtype]) for dtype in (weight, out)))
    pointers = {"weight_ptr": weight, "scale_ptr": compute_type(weight), "out_ptr": out}
    flags = {"BY_COLUMN": by_column, "ROWS": noise.ROWS, "COLUMNS": noise.COLUMNS}
    # The launcher has `rows` and `key` not specialised.
    integers = (("rows", False), ("columns", columns % 16 == 0), ("key", False))
    words = (f"{weight}_to_{out}", f"columns_{columns}", *said(by_column=by_column))
    return build(noise.add_noise_kernel, pointers, *words, integers=integers, lanes=warps["LANES"], **flags)


# -- what is launched --------------------------------------------------------------------------------------------------


def steps(weight: str, master: int) -> dict[str, list[Build]]:
    """What one step of each method launches for the parameters of a device and type, in order.

    Args:
        weight: type of the weights and gradients.
        master: bits of master weights, as in `PRECISIONS`.
    """
    norm, gap, state = norm_build(weight), gap_build(weight), moments(weight, master)
    # 8-bit backups, where weights have been perturbed.
    ascent, update = partial(perturb_build, weight, steps=master == 24), partial(descend_build, weight, master)
    back = partial(update, steps=master == 24)
    average, second = {"along": "less_average"}, {"along": "over_root", "lane": second_moments(weight, master)}
    if weight == "fp16":
        average["lane"] = "fp32"
    return {
        "AdamW": [update()],
        "AdamW, clipped": [norm, update()],
        "AdamW, amsgrad": [update(missing=False)],
        "AdamW, L2-SP": [update(anchor=True)],
        "SGD": [update(rule="sgd", missing=True)],
        "SGD, momentum": [update(rule="sgd")],
        "Lion": [update(rule="lion")],
        "SAM": [norm, ascent(), back()],
        "SAM, L2-SP": [norm, ascent(), back(anchor=True)],
        "SAM, ema": [norm, ascent(), back(ema=True)],
        "SAM, to nearest": [norm, ascent(stochastic=False), back(stochastic=False)],
        "SAM, SGD": [norm, ascent(), back(rule="sgd")],
        "SAM, Lion": [norm, ascent(), back(rule="lion")],
        "ASAM": [norm_build(weight, adaptive=True), ascent(adaptive=True), back()],
        "FSAM": [norm, ascent(masked=True), back()],
        "FSAM, masked norm": [norm_build(weight, masked=True), ascent(masked=True), back()],
        "ESAM": [norm, ascent(random=True), back()],
        "FriendlySAM": [norm_build(weight, **average), ascent(**average), back()],
        "preconditioned SAM": [norm_build(weight, **second), ascent(**second), back()],
        "GSAM": [norm, ascent(), gap, back(other=True)],
        "LookSAM": [norm, ascent(), gap, back(keep=True)],
        "LookSAM, reused": [gap, update(other=True)],
        "momentum-SAM": [norm_build(state), ascent(grad=state), back()],
        "momentum-SAM, ema": [norm_build(state), ascent(grad=state), back(ema=True)],
    }


# Several options at once: the most registers.
COMBINED = [
    perturb_build("bf16", adaptive=True, masked=True),
    perturb_build("fp32", adaptive=True, masked=True),
    perturb_build("bf16", adaptive=True, masked=True, random=True),
    perturb_build("bf16", grad="fp32", adaptive=True, masked=True, random=True),
    perturb_build("bf16", grad="i8", adaptive=True, masked=True, random=True, steps=True),
    descend_build("fp32", missing=False, anchor=True, keep=True, ema=True),
    descend_build("bf16", missing=False, anchor=True),
    descend_build("bf16", master=32, missing=False, anchor=True),
    descend_build("bf16", missing=False, anchor=True, other=True),
    descend_build("bf16", missing=False, anchor=True, other=True, ema=True),
    descend_build("bf16", master=32, missing=False, anchor=True, other=True, ema=True),
    descend_build("bf16", master=24, missing=False, anchor=True, other=True, steps=True),
    descend_build("bf16", master=24, missing=False, anchor=True, other=True, ema=True, steps=True),
    descend_build("bf16", rule="sgd", anchor=True, other=True, ema=True),
    descend_build("bf16", rule="lion", anchor=True, other=True, ema=True),
    descend_build("fp64", other=True),
    descend_build("fp16", missing=False, anchor=True),
    descend_build("fp16", other=True),
    norm_build("bf16", adaptive=True, masked=True),
    norm_build("fp64", adaptive=True, masked=True),
]
COEFFICIENTS = [
    *(climb_coefficients_build(weight, scaled) for weight in ("fp32", "fp64") for scaled in (False, True)),
    *(descend_coefficients_build(rule, weight) for rule in spec.NUMBERS for weight in ("fp32", "fp64")),
    *(descend_coefficients_build("adamw", "fp32", combined, True, True, True) for combined in spec.COMBINED),
    descend_coefficients_build("adamw", "fp32", paired=True),
]
NOISE = [
    *(noise_build(dtype, dtype, 4096) for dtype in ("fp32", "bf16", "fp16", "fp64")),
    noise_build("fp32", "bf16", 4096),
    noise_build("bf16", "bf16", 4096, by_column=True),
    noise_build("bf16", "bf16", 770),
]
TOPK = [one for dtype in ("fp32", "bf16", "fp64") for one in topk_builds(dtype)] + topk_builds("fp32", False)
SPARSE = [*sparse_builds("fp32"), *sparse_builds("bf16"), *sparse_builds("fp64", "i64")]
# Small tiles, large ones, rows that are no whole vectors.
FISHER = [
    fisher_build(dtype, *shape) for dtype in ("fp32", "bf16", "fp16") for shape in ((384, 1536), (4096, 4096), (770, 5))
]
FISHER += [fisher_build("bf16", 4096, 4096, absolute=True)]


def configurations() -> dict[Build, list[str]]:
    """Every build, with the names of what launches it."""
    found: dict[Build, list[str]] = {}
    for arguments in PRECISIONS.values():
        for method, builds in steps(*arguments).items():
            for one in builds:
                if method not in found.setdefault(one, []):
                    found[one].append(method)
    others = {"several options": COMBINED, "coefficients": COEFFICIENTS, "choice of a mask": TOPK}
    others |= {"FishMask": SPARSE, "estimate_fisher": FISHER, "FlatLoRA": NOISE}
    for launcher, builds in others.items():
        for one in builds:
            found.setdefault(one, []).append(launcher)
    return found


def unique(builds: Iterable[Build]) -> list[Build]:
    return list(dict.fromkeys(builds))


def is_over_blocks(one: Build) -> bool:
    """Whether it is a pass in which each element is one lane's."""
    return one.kernel in (perturb.perturb_kernel, descend.descend_kernel)


def is_of_8_bits(one: Build) -> bool:
    """Whether moments, backups or master weights have formats of fewer bits."""
    return any("i8" in types for _, types in one.pointers)


def is_over_segments(one: Build) -> bool:
    """Whether it is a pass that every step makes."""
    return is_over_blocks(one) or one.kernel in (norm.norm_kernel, gap.gap_kernel)
