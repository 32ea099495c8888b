"""What the kernels over segments share: the shape of a block, the way from a program to its segment, bits of a mask."""

import torch
import triton
import triton.language as tl

from . import spec

BLOCK = spec.BLOCK
# Four elements a thread: 16-byte accesses of fp32 and 8-byte accesses of 16-bit types, and no layout conversion through
# shared memory where both meet in one kernel. A warp has 32 threads, but 64 on AMD's data centre GPUs.
LANES = 256
_has_amd = torch.version.hip is not None and torch.cuda.is_available()
WARPS = LANES // (torch.cuda.get_device_properties().warp_size if _has_amd else 32)

ALIGN = tl.constexpr(spec.ALIGN)
COLUMNS = tl.constexpr(len(spec.TABLE))
OFFSET, LENGTH, FIRST_BLOCK, FIRST_CHUNK, WEIGHT, GRAD, CLEAN, OTHER, ALIGNED = (
    tl.constexpr(spec.TABLE.index(name))
    for name in ("offset", "length", "block", "chunk", "weight", "grad", "clean", "other", "aligned")
)


@triton.jit
def locate(table_ptr, segments_ptr, first: tl.constexpr, SIZE: tl.constexpr):
    """The part of a segment that this program works on.

    Args:
        table_ptr: `Segments.relative()`, int64 [segments, COLUMNS].
        segments_ptr: the segment of each program, int32 [programs].
        first: FIRST_BLOCK or FIRST_CHUNK.
        SIZE: elements of a program.

    Returns:
        The segment (int64), its row of the table, its element where the part begins (int64), elements from there on to
        its end (int32, at most SIZE; 0 if the segment takes no part).
    """
    program = tl.program_id(0).to(tl.int64)
    segment = tl.load(segments_ptr + program).to(tl.int64)
    row = table_ptr + segment * COLUMNS
    start = (program - tl.load(row + first)) * SIZE
    left = tl.minimum(tl.maximum(tl.load(row + LENGTH) - start, 0), SIZE).to(tl.int32)
    return segment, row, start, left


@triton.jit
def pointer(ptr, place, WHOLE: tl.constexpr):
    """To the first element of a block, a multiple of 16 bytes if WHOLE.

    What holds for an anchor, an argument that is not specialised, does not hold for a tensor elsewhere: neither its
    alignment nor its extent. Lanes are aligned in any case, but layouts must agree.
    """
    ptr += place
    return tl.multiple_of(ptr, 16) if WHOLE else ptr


@triton.jit
def mask_bits(mask_ptr, place, offs, inside):
    """Bits of a lane's elements place + offs as booleans; place is a multiple of 32."""
    other = None if inside is None else 0
    words = tl.load(mask_ptr + place // 32 + offs // 32, mask=inside, other=other)
    return ((words >> (offs % 32)) & 1) != 0
