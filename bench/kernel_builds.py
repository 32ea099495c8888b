"""Every kernel as the optimizers launch it, described so that it can be compiled without a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from triton.compiler import ASTSource

from fsam_triton.kernels import adamw_l2sp, blocks, fisher, grad_norm, perturb, sparse, surrogate_gap, topk_mask

SIZES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
# Type of the weights, and whether there are fp32 master weights.
PRECISIONS = {
    "fp32": ("fp32", False),
    "bf16": ("bf16", False),
    "bf16 + master": ("bf16", True),
    "fp16": ("fp16", False),
    "fp16 + master": ("fp16", True),
    "fp64": ("fp64", False),
}


@dataclass(frozen=True)
class Build:
    """A kernel with what its launcher passes.

    Attributes:
        name: of the kernel, its first type and the flags that are set.
        kernel: the @triton.jit function.
        pointers: the arrays that are given, with their types.
        flags: the constants.
        integers: integer arguments, with whether they are multiples of 16, as Triton's launcher would notice.
        options: of the compiler; with `num_warps` where that is the same on all GPUs.
        lanes: of a program, where `num_warps` is as many as make so many lanes.
    """

    name: str
    kernel: object
    pointers: tuple[tuple[str, str], ...]
    flags: tuple[tuple[str, object], ...]
    integers: tuple[tuple[str, bool], ...] = ()
    options: tuple[tuple[str, object], ...] = (("enable_fp_fusion", False),)
    lanes: int = 256

    def source(self) -> ASTSource:
        """What `triton.compile` takes."""
        types = {name: f"*{dtype}" for name, dtype in self.pointers}
        types |= {name: "i64" if name == "n" else "i32" for name, _ in self.integers}
        aligned = {name for name, _ in self.pointers} | {name for name, is_aligned in self.integers if is_aligned}
        signature = {name: types.get(name, "constexpr") for name in self.kernel.arg_names}
        flags = dict(self.flags)
        constants = {(i,): flags.get(name) for i, name in enumerate(signature) if signature[name] == "constexpr"}
        attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
        return ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)

    def warps(self, warp_size: int) -> int:
        return dict(self.options).get("num_warps", self.lanes // warp_size)


def build(kernel, pointers: dict[str, str], bound: str | None = None, **flags) -> Build:
    """A build of a kernel over flat buffers.

    Args:
        kernel: the @triton.jit function.
        pointers: the arrays that are given, with their types.
        bound: None, n is a multiple of the block; "bounded", of 16; "ragged", any number.
        **flags: the kernel's constants but for EVEN and BLOCK.
    """
    flags = {"BLOCK": blocks.BLOCK, **flags}
    if "EVEN" in kernel.arg_names:
        flags["EVEN"] = bound is None
    words = [name.lower() for name, value in flags.items() if value is True and name != "EVEN"]
    name = "-".join([kernel.__name__.removesuffix("_kernel"), next(iter(pointers.values())), *words])
    integers = (("n", bound != "ragged"),) if "n" in kernel.arg_names else ()
    name += f"-{bound}" if bound else ""
    return Build(name, kernel, tuple(pointers.items()), tuple(flags.items()), integers)


def perturb_build(
    weight: str,
    backup=True,
    masked=False,
    adaptive=False,
    stochastic=True,
    zero_grad=False,
    random=False,
    bound: str | None = None,
) -> Build:
    pointers = {"weight_ptr": weight, "grad_ptr": weight, "coef_ptr": "fp64"}
    pointers |= {"backup_ptr": weight} if backup else {}
    pointers |= {"mask_ptr": "i32"} if masked else {}
    one = build(
        perturb.perturb_kernel,
        pointers,
        bound,
        ADAPTIVE=adaptive,
        MASKED=masked,
        BACKUP=backup,
        STOCHASTIC=stochastic and SIZES[weight] == 2,
        ZERO_GRAD=zero_grad,
        RANDOM=random,
    )
    return replace(one, lanes=128) if SIZES[weight] == 2 else one


def adamw_build(
    weight: str,
    master=False,
    backup=True,
    anchor=False,
    amsgrad=False,
    stochastic=True,
    zero_grad=False,
    other=False,
    keep=False,
    perturb=False,
    ema=False,
    bound: str | None = None,
) -> Build:
    state = moments(weight, master)
    pointers = {"weight_ptr": weight, "grad_ptr": weight, "exp_avg_ptr": state, "exp_avg_sq_ptr": state}
    pointers |= {"coef_ptr": "fp64"}
    pointers |= {"max_exp_avg_sq_ptr": state} if amsgrad else {}
    pointers |= {"backup_ptr": weight} if backup and not master else {}
    pointers |= {"master_ptr": "fp32"} if master else {}
    pointers |= {"anchor_ptr": weight} if anchor else {}
    pointers |= {"other_grad_ptr": weight} if other or keep else {}
    pointers |= {"ema_ptr": "fp64" if weight == "fp64" else "fp32"} if ema else {}
    return build(
        adamw_l2sp.adamw_l2sp_kernel,
        pointers,
        bound,
        AMSGRAD=amsgrad,
        BACKUP="backup_ptr" in pointers,
        MASTER=master,
        ANCHOR=anchor,
        STOCHASTIC=stochastic and SIZES[weight] == 2 and not master,
        ZERO_GRAD=zero_grad,
        OTHER=other or keep,
        KEEP_ORTHOGONAL=keep,
        PERTURB=perturb,
        EMA=ema,
    )


def moments(weight: str, master: bool) -> str:
    """Type of AdamW's moments; fp16 would lose small squares."""
    return "fp32" if master or weight == "fp16" else weight


def norm_build(grad: str, adaptive=False, masked=False, bound: str | None = None) -> Build:
    pointers = {"grad_ptr": grad, "partial_ptr": "fp64"}
    pointers |= {"weight_ptr": grad} if adaptive else {}
    pointers |= {"mask_ptr": "i32"} if masked else {}
    flags = {"ADAPTIVE": adaptive, "MASKED": masked, "CHUNK_BLOCKS": grad_norm.CHUNK_BLOCKS}
    return build(grad_norm.grad_norm_kernel, pointers, bound, **flags)


def gap_build(first: str, second: str, bound: str | None = None) -> Build:
    pointers = {"first_ptr": first, "second_ptr": second, "partial_ptr": "fp64"}
    one = build(surrogate_gap.surrogate_gap_kernel, pointers, bound, CHUNK_BLOCKS=grad_norm.CHUNK_BLOCKS)
    return replace(one, name=one.name.replace(first, f"{first}-{second}"))


def topk_builds(values: str) -> list[Build]:
    """What chooses a mask by values of this type: the first and the last digit, ties, the mask."""
    shape = {"WIDE": values == "fp64", "CHUNK_BLOCKS": topk_mask.CHUNK_BLOCKS}
    over = partial(build, bound="bounded", **shape)
    pointers, threshold = {"values_ptr": values}, {"threshold_ptr": "i64"}
    digits = [(56, 7)] if values == "fp64" else [(23, 8), (0, 7)]
    histograms = []
    for shift, bits in digits:
        counts = pointers | {"prefix_ptr": "i64", "hist_ptr": "i64"}
        one = over(topk_mask.digit_histogram_kernel, counts, SHIFT=shift, BITS=bits)
        histograms.append(replace(one, name=f"{one.name}-{bits}_bits"))
    return [
        *histograms,
        over(topk_mask.count_ties_kernel, pointers | threshold | {"ties_ptr": "i64"}),
        over(topk_mask.write_mask_kernel, pointers | threshold | {"quota_ptr": "i64", "mask_ptr": "i32"}),
    ]


def sparse_builds(values: str, index: str = "i32") -> list[Build]:
    """Gather and scatter of trained weights; an index of int64 is for tensors of 2**31 elements and more."""
    pointers = {"compact_ptr": values, "addresses_ptr": "i64", "jobs_ptr": "i64", "index_ptr": index}
    found = []
    for scatter in (False, True):
        one = build(sparse.sparse_kernel, pointers, SCATTER=scatter, BLOCK=256)
        found.append(replace(one, name=f"{'scatter' if scatter else 'gather'}-{values}-{index}"))
    return found


def fisher_build(dtype: str, n_out: int, n_in: int, absolute=False) -> Build:
    """`linear_fisher_` for a weight of [n_out, n_in] and activations of this type."""
    tile = fisher.tiling({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype], n_out, n_in)
    # Products in fp32 of matrices: see the launcher.
    options = [("enable_fp_fusion", True), *((name, tile.pop(name)) for name in ("num_warps", "num_stages"))]
    name = f"linear_fisher-{dtype}-{n_out}x{n_in}" + ("-absolute" if absolute else "")
    pointers = {"fisher_ptr": "fp32", "input_ptr": dtype, "grad_ptr": dtype}
    flags = {"ABSOLUTE": absolute, "WIDEN": False, **tile}
    # The launcher has `batch` and `positions` not specialised.
    integers = {"batch": False, "positions": False, "n_out": n_out % 16 == 0, "n_in": n_in % 16 == 0}
    kernel = fisher.linear_fisher_kernel
    return Build(name, kernel, tuple(pointers.items()), tuple(flags.items()), tuple(integers.items()), tuple(options))


def steps(weight: str, master: bool) -> dict[str, list[Build]]:
    """What one step of each method launches for a bucket, in order.

    Args:
        weight: type of the weights and gradients.
        master: whether there are fp32 master weights.
    """
    norm, gap = norm_build(weight), gap_build(weight, weight)
    ascent = partial(perturb_build, weight, backup=not master)
    update = partial(adamw_build, weight, master)
    plain = partial(update, backup=False)

    def sam(**flags) -> list[Build]:
        """SAM where all three passes have a flag or a bound."""
        return [norm_build(weight, bound=flags.get("bound")), ascent(**flags), update(**flags)]

    return {
        "AdamW": [plain()],
        "AdamW, clipped": [norm, plain()],
        "AdamW, amsgrad": [plain(amsgrad=True)],
        "AdamW, L2-SP": [plain(anchor=True)],
        "SAM": sam(),
        "SAM, L2-SP": [norm, ascent(), update(anchor=True)],
        "SAM, ema": [norm, ascent(), update(ema=True)],
        "SAM, static_grads": sam(zero_grad=True),
        "SAM, to nearest": sam(stochastic=False),
        "SAM, in place": sam(bound="bounded"),
        "SAM, in place, sparse or sharded": sam(bound="ragged"),
        "ASAM": [norm_build(weight, adaptive=True), ascent(adaptive=True), update()],
        "FSAM": [norm, ascent(masked=True), update()],
        "FSAM, masked norm": [norm_build(weight, masked=True), ascent(masked=True), update()],
        "ESAM": [norm, ascent(random=True), update()],
        "GSAM": [norm, ascent(), gap, update(other=True)],
        "LookSAM": [norm, ascent(), gap, update(keep=True)],
        "LookSAM, reused": [gap, plain(other=True)],
        "momentum-SAM": [gap_build(moments(weight, master), weight), update(perturb=True)],
        "momentum-SAM, ema": [gap_build(moments(weight, master), weight), update(perturb=True, ema=True)],
    }


# Several options at once: the most registers.
COMBINED = [
    perturb_build("bf16", adaptive=True, masked=True, bound="ragged"),
    perturb_build("fp32", adaptive=True, zero_grad=True),
    perturb_build("fp32", masked=True, bound="ragged"),
    perturb_build("bf16", adaptive=True, masked=True, random=True, bound="ragged"),
    adamw_build("fp32", backup=False, zero_grad=True),
    adamw_build("fp32", anchor=True, bound="ragged"),
    adamw_build("bf16", backup=False, anchor=True, amsgrad=True),
    adamw_build("bf16", master=True, anchor=True, amsgrad=True, zero_grad=True),
    adamw_build("bf16", backup=False, anchor=True, amsgrad=True, zero_grad=True, other=True),
    adamw_build("bf16", anchor=True, perturb=True, bound="ragged"),
    adamw_build("bf16", backup=False, anchor=True, amsgrad=True, other=True, ema=True, bound="ragged"),
    adamw_build("fp64", other=True, perturb=True),
    adamw_build("fp16", anchor=True, amsgrad=True),
    adamw_build("fp16", other=True, perturb=True),
    norm_build("bf16", masked=True, bound="ragged"),
    norm_build("fp64", adaptive=True, masked=True),
    gap_build("fp32", "bf16", bound="ragged"),
    gap_build("fp16", "fp64", bound="ragged"),
]
TOPK = [one for dtype in ("fp32", "bf16", "fp64") for one in topk_builds(dtype)]
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
    others = {"several options": COMBINED, "choice of a mask": TOPK, "FishMask": SPARSE, "estimate_fisher": FISHER}
    for launcher, builds in others.items():
        for one in builds:
            found.setdefault(one, []).append(launcher)
    return found


def unique(builds: Iterable[Build]) -> list[Build]:
    return list(dict.fromkeys(builds))


def is_element_wise(one: Build) -> bool:
    return one.kernel in (perturb.perturb_kernel, adamw_l2sp.adamw_l2sp_kernel, sparse.sparse_kernel)
