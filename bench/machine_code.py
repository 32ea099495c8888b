"""Reads a kernel's machine code for a GPU that need not be present: accesses, instructions, registers, occupancy."""

from __future__ import annotations

import functools
import math
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from .kernel_builds import SIZES, Build, is_over_blocks

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
    """Load and store instructions of a lane by their bytes; one in a loop counts once."""

    loads: Counter
    stores: Counter


@dataclass(frozen=True)
class Instruction:
    """An instruction of the machine code.

    Attributes:
        name: with its modifiers.
        operands: the rest of it.
        is_conditional: whether it has a predicate, or is a conditional branch.
        target: for a branch, the number of the instruction that it goes to.
    """

    name: str
    operands: str
    is_conditional: bool = False
    target: int | None = None


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


# -- the way of a whole block through the machine code -----------------------------------------------------------------

_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_GCN = re.compile(r"^\s+([a-z]\w+)[ \t]*([^;\n]*)")


def instructions(one: Build, target: str) -> list[Instruction]:
    """All instructions, in the order of memory."""
    found, labels = [], {}
    for line in assembly(one, target).splitlines():
        if label := re.match(r"^\s*(\.L\w+):", line):
            labels[label[1]] = len(found)
        elif target in NVIDIA and (match := _SASS.search(line)):
            found.append((match[2], match[3], bool(match[1]) or re.match(r"!?U?P\d", match[3]) is not None))
        elif target in AMD and (match := _GCN.match(line)):
            found.append((match[1], match[2], match[1].startswith("s_cbranch")))
    return [Instruction(*i, target=labels.get(_label(i[1])) if _is_branch(i[0]) else None) for i in found]


def _is_branch(name: str) -> bool:
    return name.split(".")[0] == "BRA" or name.startswith(("s_cbranch", "s_branch"))


def _label(operands: str) -> str:
    match = re.search(r"\.L\w+", operands)
    return match[0] if match else ""


@functools.cache
def main_path(one: Build, target: str) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """What a program executes whose block is whole and aligned: the shortest way with most of the widest accesses.

    Returns:
        Its instructions; and loops among them, whose instructions are there once, by the first and the last number.
    """
    code = instructions(one, target)
    widths = [_access(i, target)[1] if _is_to_array(i, one, target) else 0 for i in code]
    widest = min(max(widths), _vector(one))
    # From each instruction on to an end: widest accesses, less instructions, and the next one. Branches back are loops.
    best: list[tuple[int, int, int | None] | None] = [None] * (len(code) + 1)
    for n, i in reversed(list(enumerate(code))):
        if i.name.split(".")[0] in ("EXIT", "s_endpgm") and not i.is_conditional:
            best[n] = (0, -1, None)
            continue
        after = [] if i.target is not None and not i.is_conditional else [n + 1]
        after += [i.target] if i.target is not None and i.target > n else []
        if not after:
            # A loop is left from within.
            after = [j.target for j in code[i.target : n] if j.target is not None and j.target > n]
        ways = [(*best[m][:2], m) for m in after if best[m] is not None]
        if ways:
            wide, less, m = max(ways)
            best[n] = (wide + (widths[n] == widest), less - 1, m)
    path, n = [], 0
    while n is not None:
        path.append(n)
        n = best[n][2]
    place = {n: k for k, n in enumerate(path)}
    back = ((i.target, n) for n, i in enumerate(code) if i.target is not None and i.target <= n)
    loops = [(place[first], place[last]) for first, last in back if first in place and last in place]
    return [code[n] for n in path], loops


# Arguments that point to something else than a number for each element.
_OTHERS = ("table_ptr", "segments_ptr", "mask_ptr", "scale_ptr", "scale_ptrs", "coef_ptr", "key_ptr", "partial_ptr")


def _vector(one: Build) -> int:
    """Bytes of a lane's elements in the array of the widest type, as far as an access can have them."""
    arrays = [types for name, types in one.pointers if name not in _OTHERS]
    types = [dtype for of_one in arrays for dtype in ([of_one] if isinstance(of_one, str) else of_one)]
    return min(16, max(SIZES[dtype] for dtype in types) * dict(one.flags).get("BLOCK", 1024) // one.lanes)


def _is_to_array(i: Instruction, one: Build, target: str) -> bool:
    """Not where a table or coefficients are read, on AMD, where they do not go through buffer instructions."""
    return target in NVIDIA or i.name.startswith("buffer") or "table_ptr" not in dict(one.pointers)


_AMD_BYTES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "b32": 4, "b64": 8, "b96": 12, "b128": 16}
_AMD_BYTES |= dict.fromkeys(("ubyte", "sbyte", "byte", "u8", "i8", "b8", "d16_u8", "d16_hi_u8", "d16_hi_b8"), 1)
_AMD_BYTES |= dict.fromkeys(("ushort", "sshort", "short", "short_d16", "short_d16_hi"), 2)
_AMD_BYTES |= dict.fromkeys(("u16", "i16", "b16", "d16_b16", "d16_hi_b16"), 2)


def _access(i: Instruction, target: str) -> tuple[str, int]:
    """ "load" or "store" and the bytes of a lane, if the instruction is an access to global memory; else zero bytes.

    LDG.E is 4 bytes wide, LDG.E.U16 2, LDG.E.64 8, LDG.E.128 16; LDGSTS goes on into shared memory.
    """
    if target in NVIDIA:
        kind = {"LDG": "load", "LDGSTS": "load", "STG": "store"}.get(i.name.split(".")[0])
        width = re.search(r"\.[US]?(8|16|64|128|256)\b", i.name)
        return (kind or "", (int(width[1]) // 8 if width else 4) if kind else 0)
    match = re.match(r"(?:buffer|global)_(load|store)_(\w+)", i.name)
    return (match[1], _AMD_BYTES[match[2]]) if match else ("", 0)


# -- accesses ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Access:
    """An access in Triton's first IR, where a block is whole.

    Attributes:
        kind: "load" or "store".
        elements: of the block; None where it is a number that all lanes read.
        bytes: of an element.
        is_shared: whether 32 elements share a number: the word of a mask, the scale of codes.
        times: how often, in a loop.
    """

    kind: str
    elements: int | None
    bytes: int
    is_shared: bool
    times: int


_LOOP = re.compile(r"scf\.for .* = %c(\d+)_i\d+ to %c(\d+)_i\d+ step %c(\d+)_i\d+")
_IN_IR = re.compile(r"tt\.(load|store) (%[\w.]+).*: (?:tensor<(\d+(?:x\d+)*)x)?!tt\.ptr<[a-z]+(\d+)>")
_POINTER = re.compile(r"(%[\w.]+) = tt\.(?:addptr|splat|broadcast) (%[\w.]+)")
# A tuple's pointers are %scale_ptrs.0 and .1, or %scale_ptrs and %scale_ptrs_1 in Triton 3.6.
_SHARED = re.compile(r"%(mask_ptr|scale_ptr|scale_ptrs([._]\d+)?)$")


@functools.cache
def ir_accesses(one: Build, target: str) -> list[Access]:
    """Accesses of a program whose block is whole: those of others (after `else`, in `while`) are left out."""
    text = compiled(one, target).asm["ttir"]
    # Of these numbers only the lower halves are loaded.
    halved = set(re.findall(r"arith\.trunci (%\S+) : i64 to i32", text))
    # The argument that a pointer has been made of.
    origin: dict[str, str] = {}
    found = []
    # Open regions: how far their first line is indented, whether a whole block comes there, how often.
    regions: list[tuple[int, bool, int]] = []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        regions = [region for region in regions if region[0] < indent]
        if "} else {" in line or "} do {" in line or "scf.while" in line:
            regions.append((indent, False, 1))
        elif loop := _LOOP.search(line):
            first, last, step = map(int, loop.groups())
            regions.append((indent, True, (last - first) // step))
        elif match := _POINTER.search(line):
            origin[match[1]] = origin.get(match[2], match[2])
        elif (match := _IN_IR.search(line)) and all(region[1] for region in regions):
            kind, pointer, shape, bits = match.groups()
            elements = None if shape is None else math.prod(map(int, shape.split("x")))
            is_shared = _SHARED.match(origin.get(pointer, pointer)) is not None and elements is not None
            times = math.prod(region[2] for region in regions)
            size = int(bits) // 16 if line.split()[0] in halved else int(bits) // 8
            found.append(Access(kind, elements, size, is_shared, times))
    return found


def accesses(one: Build, target: str) -> Accesses:
    """Accesses of a lane to arrays on the main path, without what lanes share: tables, coefficients, masks, scales."""
    path, _ = main_path(one, target)
    found = [_access(i, target) for i in path if _is_to_array(i, one, target)]
    loads, stores = (Counter(width for kind, width in found if kind == side) for side in ("load", "store"))
    if target in NVIDIA:
        loads -= Counter(a.bytes for a in ir_accesses(one, target) if a.kind == "load" and a.elements is None)
    if is_over_blocks(one):
        # All other accesses are wider, or would show among the stores.
        pointers = dict(one.pointers)
        if "mask_ptr" in pointers:
            del loads[4]
        if "scale_ptr" in pointers or "scale_ptrs" in pointers:
            del loads[2]
        if "scale_ptrs" in pointers:
            del stores[2]
    return Accesses(loads, stores)


def elements(one: Build) -> int:
    """Of a program."""
    flags = dict(one.flags)
    return flags.get("CHUNK", flags["BLOCK"])


def counted_bytes(one: Build, target: str) -> float:
    """Bytes that a kernel reads and writes for each element, by the accesses in Triton's first IR."""
    arrays = [a for a in ir_accesses(one, target) if a.elements is not None]
    repeated = {(a.kind, a.elements, a.bytes) for a in arrays if a.times > 1}
    # What is loaded ahead of a loop's first round is not loaded in its last.
    arrays = [a for a in arrays if a.times > 1 or (a.kind, a.elements, a.bytes) not in repeated]
    return sum(a.elements * a.bytes * a.times / (32 if a.is_shared else 1) for a in arrays) / elements(one)


def bytes_per_parameter(one: Build, target: str) -> float:
    """What a kernel moves for each element.

    From the instructions where each element is one lane's. Elsewhere, where instructions run several times, from the
    accesses in Triton's IR, of which they are made; as are words of masks, and scales, which lanes share.
    """
    if not is_over_blocks(one):
        return counted_bytes(one, target)
    found = accesses(one, target)
    shared = sum(a.bytes for a in ir_accesses(one, target) if a.is_shared)
    return total(found.loads + found.stores) * one.lanes / elements(one) + shared / 32


def total(widths: Counter) -> int:
    return sum(width * count for width, count in widths.items())


# -- instructions ------------------------------------------------------------------------------------------------------


def instructions_per_parameter(one: Build, target: str) -> float:
    """Instructions that lanes execute for each element of a whole block; on AMD without the scalar unit's."""
    path, loops = main_path(one, target)
    counts = [target in NVIDIA or not i.name.startswith("s_") for i in path]
    count = sum(counts)
    if loops:
        ((first, last),) = loops
        rounds = _rounds(one, target, path, first, last)
        count += (rounds - 1) * sum(counts[first : last + 1])
    return count * one.lanes / elements(one)


def _rounds(one: Build, target: str, path: list[Instruction], first: int, last: int) -> int:
    """How often a loop runs that the compiler may have unrolled, or have taken rounds out of."""
    loads = [a for a in ir_accesses(one, target) if a.kind == "load"]
    (times,) = {a.times for a in loads if a.times > 1}

    def of_ir(is_repeated: bool) -> float:
        """Bytes of a lane, in a round or outside."""
        chosen = [a for a in loads if (a.times > 1) == is_repeated]
        return sum(a.bytes * (a.elements / one.lanes if a.elements and not a.is_shared else 1) for a in chosen)

    inside, everything = (
        sum(width for kind, width in (_access(i, target) for i in part) if kind == "load")
        for part in (path[first : last + 1], path)
    )
    # A number that all lanes share may be read in part.
    taken_out = round((everything - inside - of_ir(False)) / of_ir(True))
    return round((times - taken_out) * of_ir(True) / inside)


# -- occupancy ---------------------------------------------------------------------------------------------------------


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
    """Bytes of arrays that one processor has asked for when each of its lanes waits for as many as it ever does."""
    path, _ = main_path(one, target)
    widths = set(accesses(one, target).loads)
    counted = [_access(i, target)[1] in widths and _is_to_array(i, one, target) for i in path]
    return _most_waited_for(path, target, counted) * _resident_lanes(one, target)


def _most_waited_for(path: list[Instruction], target: str, counted: list[bool]) -> int:
    """Bytes of the loads that count under way at a time: until one of their registers is read, or s_waitcnt."""
    # The registers of each load, and its bytes.
    under_way: list[tuple[range, int]] = []
    most = 0
    for i, counts in zip(path, counted, strict=True):
        kind, width = _access(i, target)
        if target in AMD:
            if i.name == "s_waitcnt" and (left := re.search(r"vmcnt\((\d+)\)", i.operands)):
                under_way = under_way[len(under_way) - int(left[1]) :] if int(left[1]) < len(under_way) else under_way
        else:
            registers = [int(number) for number in re.findall(r"\bR(\d+)\b", i.operands)]
            read = registers if kind == "store" else registers[1:]
            under_way = [load for load in under_way if not any(number in load[0] for number in read)]
        if kind == "load":
            first = int(re.search(r"\bR(\d+)\b", i.operands)[1]) if target in NVIDIA else 0
            under_way.append((range(first, first + max(1, width // 4)), width if counts else 0))
            most = max(most, sum(bytes_ for _, bytes_ in under_way))
    return most


def _resident_lanes(one: Build, target: str) -> int:
    warp_size = TARGETS[target].gpu.warp_size
    return resident_warps(resources(one, target), one.warps(warp_size), target) * warp_size
