"""What compilers make of a kernel for a GPU that need not be there: accesses, registers, spills, occupancy."""

from __future__ import annotations

import functools
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from .kernel_builds import Build

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Target:
    """An architecture, and what one of its processors (SM, compute unit) can hold.

    Attributes:
        gpu: as Triton names it, with the lanes of a warp (wave).
        schedulers: parts of a processor that have registers of their own (sub-partitions, SIMDs).
        registers: of 32 bits for each lane, in each part; on CDNA3 accumulation registers included.
        granule: registers of a lane are allocated in multiples of this.
        warps: most in each part.
        blocks: most on a processor.
        shared: KiB on a processor.
        block_shared: KiB, most of a block.
        reserved: KiB of each block's that the driver takes.
    """

    gpu: GPUTarget
    schedulers: int
    registers: int
    granule: int
    warps: int
    blocks: int
    shared: int
    block_shared: int
    reserved: int


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": 65,536 registers and 64 warps
# in four sub-partitions; 256 registers of a warp at a time, by cuda_occupancy.h. AMD: LLVM's AMDGPUBaseInfo.cpp
# (getTotalNumVGPRs, getVGPRAllocGranule, getMaxWavesPerEU, getMaxWorkGroupsPerCU).
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 4, 512, 8, 16, 32, 164, 163, 1),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 4, 512, 8, 16, 32, 228, 227, 1),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 4, 512, 8, 16, 32, 228, 227, 1),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 4, 512, 8, 8, 16, 64, 64, 0),
    "gfx1100": Target(GPUTarget("hip", "gfx1100", 32), 2, 1536, 24, 16, 16, 64, 64, 0),
}
NVIDIA = [name for name, target in TARGETS.items() if target.gpu.backend == "cuda"]
AMD = [name for name, target in TARGETS.items() if target.gpu.backend == "hip"]


@dataclass(frozen=True)
class Resources:
    """What a block needs.

    Attributes:
        registers: of a lane; on AMD vector registers.
        spills: 0, or bytes of stack, on AMD with spilled registers on top.
        shared: bytes of shared memory.
    """

    registers: int
    spills: int
    shared: int


@dataclass(frozen=True)
class Accesses:
    """Load and store instructions by their bytes; one in a loop counts once."""

    loads: Counter
    stores: Counter


@functools.cache
def compiled(one: Build, target: str):
    """The kernel for a target, as its launcher would have it compiled."""
    gpu = TARGETS[target].gpu
    options = {"num_warps": one.warps(gpu.warp_size), **dict(one.options)}
    return triton.compile(one.source(), target=gpu, options=options)


def assembly(one: Build, target: str) -> str:
    """Text of the instructions: SASS by NVIDIA's disassembler, or what LLVM gives its assembler for AMD."""
    if target in AMD:
        return compiled(one, target).asm["amdgcn"]
    # Without its analysis of branches, which takes half of its time.
    return _tool(one, target, "nvdisasm", "--no-dataflow", "--print-code")


@functools.cache
def _tool(one: Build, target: str, *command: str) -> str:
    files = compiled(one, target).metadata_group.items()
    cubin = next(path for name, path in files if name.endswith(".cubin"))
    return subprocess.run([TOOLS / command[0], *command[1:], cubin], capture_output=True, text=True, check=True).stdout


def resources(one: Build, target: str) -> Resources:
    """Without the disassembler, which takes as long as the compilation."""
    if target in NVIDIA:
        usage = _tool(one, target, "cuobjdump", "-res-usage")
        registers, *spills = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    else:
        text = compiled(one, target).asm["amdgcn"]
        names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        registers, *spills = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in names)
    return Resources(registers, sum(spills), compiled(one, target).metadata.shared)


def accesses(one: Build, target: str) -> Accesses:
    """Accesses of the lanes to arrays in global memory, without coefficients and words of a mask, which are shared."""
    text, pointers = assembly(one, target), dict(one.pointers)
    if target in AMD:
        # What a kernel reads besides arrays does not go through buffer instructions.
        kind = "buffer" if "coef_ptr" in pointers else "(?:global|buffer)"
        return Accesses(*(_amd_widths(kind, side, text) for side in ("load", "store")))
    # LDGSTS goes on into shared memory.
    loads = _nvidia_widths("LDG(?:STS)?", text) - Counter({8: coefficients(one, target)})
    words = Counter({4: 1}) if "mask_ptr" in pointers and is_straight(one, target) else Counter()
    return Accesses(loads - words, _nvidia_widths("STG", text))


def _nvidia_widths(instruction: str, sass: str) -> Counter:
    """LDG.E is 4 bytes wide, LDG.E.U16 2, LDG.E.64 8, LDG.E.128 16."""
    found = Counter()
    for modifiers in re.findall(rf"\b{instruction}\.E((?:\.\w+)*)", sass):
        width = re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)
        found[int(width[1]) // 8 if width else 4] += 1
    return found


_AMD_BYTES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "b32": 4, "b64": 8, "b96": 12, "b128": 16}
_AMD_BYTES |= dict.fromkeys(("ubyte", "sbyte", "byte", "u8", "i8", "b8"), 1)
_AMD_BYTES |= dict.fromkeys(("ushort", "sshort", "short", "short_d16", "short_d16_hi"), 2)
_AMD_BYTES |= dict.fromkeys(("u16", "i16", "b16", "d16_b16", "d16_hi_b16"), 2)


def _amd_widths(kind: str, side: str, text: str) -> Counter:
    return Counter(_AMD_BYTES[width] for width in re.findall(rf"\b{kind}_{side}_(\w+)", text))


def counted_bytes(one: Build, target: str) -> float:
    """Bytes that a kernel over flat buffers reads and writes for each element, by the accesses in Triton's first IR."""
    flags, has_mask = dict(one.flags), "mask_ptr" in dict(one.pointers)
    size = 0.0
    for n, kind, bits in re.findall(
        r"tt\.(?:load|store) .*: tensor<(\d+)x!tt\.ptr<([a-z]+)(\d+)>", compiled(one, target).asm["ttir"]
    ):
        # 32 elements read the same word of a mask; the kernel that writes masks has a lane for each word.
        shared_by = 32 if has_mask and kind == "i" and int(n) == flags["BLOCK"] else 1
        size += int(n) / flags["BLOCK"] * int(bits) / 8 / shared_by
    return size


def is_straight(one: Build, target: str) -> bool:
    """Whether the kernel has neither a bound and without a loop, so that instructions can be counted."""
    return dict(one.flags).get("EVEN", False) and "scf.for" not in compiled(one, target).asm["ttir"]


def bytes_per_parameter(one: Build, target: str) -> float:
    """What a kernel over flat buffers moves for each element.

    From the instructions where each element is one lane's. Elsewhere (a loop's instructions run several times, bounded
    accesses are in pieces) from the accesses in Triton's IR, of which they are made.
    """
    if not is_straight(one, target):
        return counted_bytes(one, target)
    found = accesses(one, target)
    per_lane = dict(one.flags)["BLOCK"] // one.lanes
    return total(found.loads + found.stores) / per_lane + (1 / 8 if "mask_ptr" in dict(one.pointers) else 0)


def total(widths: Counter) -> int:
    return sum(width * count for width, count in widths.items())


def coefficients(one: Build, target: str) -> int:
    """How many fp64 numbers every lane reads, which come from the cache."""
    return len(re.findall(r"tt\.load .*: !tt\.ptr<f64>", compiled(one, target).asm["ttir"]))


def resident_warps(used: Resources, block_warps: int, target: str) -> int:
    """How many warps of a kernel a processor holds, in whole blocks.

    Example:
        >>> resident_warps(Resources(registers=40, spills=0, shared=0), 8, "sm_90")
        48
    """
    limit = TARGETS[target]
    allocated = -(-used.registers // limit.granule) * limit.granule
    warps = min(limit.warps, limit.registers // allocated) * limit.schedulers
    shared = used.shared + (limit.reserved << 10)
    blocks = min(limit.blocks, warps // block_warps, (limit.shared << 10) // shared if shared else limit.blocks)
    return blocks * block_warps


def occupancy(one: Build, target: str) -> float:
    """Resident warps over the most that a processor can hold."""
    limit = TARGETS[target]
    return _resident_lanes(one, target) / (limit.warps * limit.schedulers * limit.gpu.warp_size)


def in_flight(one: Build, target: str) -> int:
    """Bytes of arrays that one processor has asked for when each of its lanes has issued its loads."""
    return total(accesses(one, target).loads) * _resident_lanes(one, target)


def _resident_lanes(one: Build, target: str) -> int:
    warp_size = TARGETS[target].gpu.warp_size
    return resident_warps(resources(one, target), one.warps(warp_size), target) * warp_size
