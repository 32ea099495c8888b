"""Sum of the squared per-sample gradients of a linear layer's weight, without storing the gradients."""

import torch
import triton
import triton.language as tl

from . import reference


@triton.jit(do_not_specialize=["batch", "positions"])
def linear_fisher_kernel(
    fisher_ptr,
    input_ptr,
    grad_ptr,
    batch,
    positions,
    n_out,
    n_in,
    ABSOLUTE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """fisher += sum_b (D_b^T A_b)^2, or of |D_b^T A_b| if ABSOLUTE: the weight's term of arXiv 2111.09839, eq. 6.

    D_b^T A_b, [n_out, n_in], is the gradient that sample b alone gives the weight: D_b are the gradients of its loss by
    the layer's outputs, A_b the layer's inputs, one row a position. A program owns a tile of the weight and goes
    through all samples: the gradient's tile lives in registers alone, and no sum needs atomics. Always the same order
    of additions, so two runs give the same bits.

    Args:
        fisher_ptr: fp32 [n_out, n_in]; added to.
        input_ptr: A, fp32/bf16/fp16 [batch, positions, n_in].
        grad_ptr: D, same type [batch, positions, n_out].
        batch, positions: samples, and positions of a sample.
        n_out, n_in: the weight's shape.
        WIDEN: make fp32 of 16-bit numbers first; their products are the same.

    Flops: 2 batch positions n_out n_in. Bytes: 8 of each weight; each element of A is read ceil(n_out / BLOCK_OUT)
    times and each of D ceil(n_in / BLOCK_IN) times, by programs that run at the same time, so mostly from the L2 cache.
    Stored gradients would be written and read on top: 8 batch n_out n_in bytes.
    """
    # Everything that a stride multiplies has 64 bits: 16,744 positions of a vocabulary of 128,256 are 2**31 elements.
    row_out, row_in = tl.cast(n_out, tl.int64), tl.cast(n_in, tl.int64)
    program, tiles_out = tl.program_id(0).to(tl.int64), tl.cdiv(row_out, BLOCK_OUT)
    first_out, first_in = program % tiles_out * BLOCK_OUT, program // tiles_out * BLOCK_IN
    offs_out, offs_in, offs_t = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_T)
    out_inside, in_inside = first_out + offs_out < row_out, first_in + offs_in < row_in
    rows = offs_t.to(tl.int64)[:, None]
    grad_ptrs = grad_ptr + first_out + (rows * row_out + offs_out[None, :])
    input_ptrs = input_ptr + first_in + (rows * row_in + offs_in[None, :])
    acc = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    for _ in tl.range(0, batch):
        g = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
        for start in tl.range(0, positions, BLOCK_T):
            inside = (start + offs_t < positions)[:, None]
            d = tl.load(grad_ptrs + tl.cast(start, tl.int64) * row_out, mask=inside & out_inside[None, :], other=0.0)
            a = tl.load(input_ptrs + tl.cast(start, tl.int64) * row_in, mask=inside & in_inside[None, :], other=0.0)
            if WIDEN:
                d, a = d.to(tl.float32), a.to(tl.float32)
            # fp32 stays fp32: TF32 would leave 11 bits of each factor. 16-bit products are exact either way.
            g = tl.dot(tl.trans(d), a, g, input_precision="ieee")
        acc += tl.abs(g) if ABSOLUTE else g * g
        grad_ptrs += positions * row_out
        input_ptrs += positions * row_in
    places = (first_out + offs_out)[:, None] * row_in + (first_in + offs_in)[None, :]
    inside = out_inside[:, None] & in_inside[None, :]
    tl.store(fisher_ptr + places, tl.load(fisher_ptr + places, mask=inside) + acc, mask=inside)


def tiling(dtype: torch.dtype, n_out: int, n_in: int) -> dict[str, int]:
    """The tile of a program, and its warps and stages.

    Two accumulators of the tile's size must stay in registers. fp32 goes through ordinary multiplications, which hold
    their operands in registers too. Rows that are no multiple of 16 bytes are loaded element by element, which takes
    registers for addresses. A large tile must leave enough programs for all processors.
    """
    if dtype == torch.float32:
        return {"BLOCK_OUT": 64, "BLOCK_IN": 64, "BLOCK_T": 16, "num_warps": 4, "num_stages": 2}
    if n_out % 16 or n_in % 16 or n_out * n_in < 1 << 22:
        return {"BLOCK_OUT": 64, "BLOCK_IN": 64, "BLOCK_T": 32, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_OUT": 128, "BLOCK_IN": 128, "BLOCK_T": 32, "num_warps": 8, "num_stages": 3}


def linear_fisher_(fisher: torch.Tensor, inputs: torch.Tensor, output_grads: torch.Tensor, absolute: bool) -> None:
    """Launch `linear_fisher_kernel`; arguments as `reference.linear_fisher_`, which does fp64 here too."""
    if fisher.dtype == torch.float64:
        return reference.linear_fisher_(fisher, inputs, output_grads, absolute)
    n_out, n_in = fisher.shape
    batch, positions, _ = inputs.shape
    tile = tiling(inputs.dtype, n_out, n_in)
    # In one dimension: CUDA has 65,535 programs in the others.
    grid = (triton.cdiv(n_out, tile["BLOCK_OUT"]) * triton.cdiv(n_in, tile["BLOCK_IN"]),)
    # The interpreter (what else would run on a CPU) multiplies the bit patterns of bf16 numbers, and Triton 3.6's
    # cannot take a loop's bound from an argument that is not a constant.
    interpreted = inputs.device.type == "cpu"
    bound = tl.constexpr if interpreted else int
    if batch and positions and fisher.numel():
        linear_fisher_kernel[grid](
            fisher,
            inputs.contiguous(),
            output_grads.contiguous(),
            bound(batch),
            bound(positions),
            n_out,
            n_in,
            ABSOLUTE=absolute,
            WIDEN=interpreted,
            # The units of tl.dot add in an order of their own, so the interpreter's bits are out of reach anyway; and
            # without fusion a product of fp32 matrices takes twice as many instructions.
            enable_fp_fusion=True,
            **tile,
        )
