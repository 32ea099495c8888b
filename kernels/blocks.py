"""What the element-wise kernels share: the block shape and the reading of bit-packed masks."""

import torch
import triton
import triton.language as tl

# Four elements a thread: 16-byte accesses of fp32 and 8-byte accesses of 16-bit types, and no layout conversion through
# shared memory where both meet in one kernel. A warp has 32 threads on NVIDIA and 64 on AMD.
BLOCK = 1024
WARPS = 4 if torch.version.hip else 8


@triton.jit
def mask_bits(mask_ptr, start, offs, inside):
    """Bits of the elements start + offs as booleans; bit i % 32 of int32 word i // 32 belongs to element i."""
    index = start + offs
    words = tl.load(mask_ptr + index // 32, mask=inside, other=None if inside is None else 0)
    return ((words >> (index % 32).to(tl.int32)) & 1) != 0
