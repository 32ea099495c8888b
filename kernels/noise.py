"""A weight with noise, made of random numbers that only a key and an element's place determine."""

import torch
import triton
import triton.language as tl

from . import spec
from .blocks import shape
from .coefficients import signed
from .rounding import narrow, random_bits, widen

# Rows and columns of a program. Rows of few columns fill it nearly as well as long ones.
ROWS, COLUMNS = 8, 128
_MIX = tl.constexpr(spec.MIXES[0])
_CENTRE, _LINEAR, _CUBIC = (tl.constexpr(getattr(spec, f"NOISE_{name}")) for name in ("CENTRE", "LINEAR", "CUBIC"))


@triton.jit
def normals(bits, compute: tl.constexpr):
    """Nearly Gaussian numbers of 32 random bits each; see `reference.normals`."""
    bits = (bits ^ (bits >> 15)) * tl.full([], _MIX, tl.uint32)
    pairs = (bits & 0x00FF00FF) + ((bits >> 8) & 0x00FF00FF)
    t = (((pairs & 0xFFFF) + (pairs >> 16)).to(tl.int32, bitcast=True) - _CENTRE).to(compute)
    return t * (_LINEAR + _CUBIC * (t * t))


@triton.jit(do_not_specialize=["rows", "key"])
def add_noise_kernel(
    weight_ptr,
    scale_ptr,
    out_ptr,
    rows,
    columns,
    key,
    BY_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out <- w + scale z, with nearly Gaussian z (Flat-LoRA, arXiv 2409.14396, equation 7).

    A program works on a tile of [ROWS, COLUMNS].

    Args:
        weight_ptr: [rows, columns], fp32/bf16/fp16/fp64.
        scale_ptr: [columns] if BY_COLUMN, else [rows], in the compute type: fp64 for fp64 weights, else fp32.
        out_ptr: [rows, columns], of any float type, or the weights; written.
        rows, columns: of the matrix.
        key: of the random numbers, 32 bits, as int32.

    Bytes per element: a weight's and a result's.
    """
    compute: tl.constexpr = scale_ptr.dtype.element_ty
    first, left = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64) * COLUMNS
    row, column = tl.arange(0, ROWS)[:, None], left + tl.arange(0, COLUMNS)[None, :]
    inside = (first + row < rows) & (column < columns)
    # Of a row; the numbers below count elements in 32 bits, as they do everywhere.
    place = (first + row) * columns
    w = widen(tl.load(weight_ptr + place + column, mask=inside), compute)
    if BY_COLUMN:
        # By each row of the tile: to share them out, threads would exchange them through shared memory.
        scale = tl.load(scale_ptr + (row * 0 + column), mask=inside)
    else:
        scale = tl.load(scale_ptr + first + row, mask=first + row < rows)
    bits = random_bits(first * 0, place.to(tl.uint32) + column.to(tl.uint32), key)
    noisy = w + scale * normals(bits, compute)
    tl.store(out_ptr + place + column, narrow(noisy, out_ptr.dtype.element_ty), mask=inside)


def add_noise_(out: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, key: int, by_column: bool) -> None:
    """Launch `add_noise_kernel`; arguments as `reference.add_noise_`."""
    rows, columns = weight.shape
    if weight.numel():
        add_noise_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))](
            *(weight, scale.contiguous(), out, rows, columns, signed(key)),
            BY_COLUMN=by_column,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=shape(weight, out)["num_warps"],
            enable_fp_fusion=False,
        )
