"""What the kernels over segments share: the shape of a block, the way from a program to its segment, bits of a mask."""

import torch
import triton
import triton.language as tl

from . import spec

BLOCK = spec.BLOCK
# Threads of a program with four elements each: 16-byte accesses of fp32. Those of 16-bit types next to it have 8 bytes:
# with eight elements a thread they would be exchanged through shared memory.
LANES = BLOCK // 4
_has_amd = torch.version.hip is not None and torch.cuda.is_available()
# A warp has 32 threads, but 64 on AMD's data centre GPUs.
_WARP = torch.cuda.get_device_properties().warp_size if _has_amd else 32
WARPS: int = LANES // _WARP


def shape(*tensors: torch.Tensor | None) -> dict[str, int]:
    """How a block is shared out to threads: 16-byte accesses of 16-bit types too, if no tensor has more bits."""
    lanes = LANES // 2 if all(t is None or t.element_size() <= 2 for t in tensors) else LANES
    return {"LANES": lanes, "num_warps": lanes // _WARP}


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
        its end (int32, at most SIZE; 0 if the segment takes no part), and whether these are SIZE, at aligned addresses.
    """
    segment = tl.load(segments_ptr + tl.program_id(0)).to(tl.int64)
    row = table_ptr + segment * COLUMNS
    # Programs are numbered in 32 bits.
    start = (tl.program_id(0) - tl.load(row + first).to(tl.int32)).to(tl.int64) * SIZE
    left = tl.minimum(tl.maximum(tl.load(row + LENGTH) - start, 0), SIZE).to(tl.int32)
    whole = (left == SIZE) & (tl.load(row + ALIGNED).to(tl.int32) != 0)
    return segment, row, start, left, whole


@triton.jit
def pointer(ptr, place, WHOLE: tl.constexpr):
    """To the first element of a block in a tensor or a lane; if WHOLE, a multiple of 16 bytes.

    What a table counts from is an argument that is not specialised: what holds for it does not hold for a tensor
    elsewhere, neither its alignment nor its extent. Lanes are aligned always, but layouts must agree.
    """
    ptr += place
    return tl.multiple_of(ptr, 16) if WHOLE else ptr


@triton.jit
def mask_bits(mask_ptr, place, offs, inside):
    """Bits of a lane's elements place + offs as booleans; place is a multiple of 32."""
    other = None if inside is None else 0
    words = tl.load(mask_ptr + (place >> 5) + (offs >> 5), mask=inside, other=other)
    # In three parts: those that are the same for all elements of a thread are shifted by once, others are constants.
    return ((words >> (offs & 24) >> (offs & 4) >> (offs & 3)) & 1) != 0
