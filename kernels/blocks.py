"""What the element-wise kernels share: the block shape and the reading of bit-packed masks."""

import torch
import triton
import triton.language as tl

# Four elements a thread: 16-byte accesses of fp32 and 8-byte accesses of 16-bit types, and no layout conversion through
# shared memory where both meet in one kernel. A warp has 32 threads, but 64 on AMD's data centre GPUs.
BLOCK = 1024
_has_amd = torch.version.hip is not None and torch.cuda.is_available()
WARPS = 256 // (torch.cuda.get_device_properties().warp_size if _has_amd else 32)


@triton.jit
def mask_bits(mask_ptr, start, offs, inside):
    """Bits of the elements start + offs as booleans; bit i % 32 of int32 word i // 32 belongs to element i."""
    index = start + offs
    words = tl.load(mask_ptr + index // 32, mask=inside, other=None if inside is None else 0)
    return ((words >> (index % 32).to(tl.int32)) & 1) != 0
