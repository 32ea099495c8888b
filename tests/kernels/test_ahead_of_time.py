"""Compiles the kernels for NVIDIA and AMD targets, which needs no GPU, and judges the machine code.

Held for each build below: no spills; passes over blocks use no shared memory. On the main path, whole and aligned
blocks, also: vector accesses alone, each array once; registers; instructions that leave time for the memory. `python -m
bench.codegen` prints the figures, and those of every other configuration.
"""

import re
from collections import Counter

import pytest

pytest.importorskip("triton")

from bench import codegen
from bench import kernel_builds as kb
from bench.machine_code import (
    AMD,
    TARGETS,
    accesses,
    assembly,
    bytes_per_parameter,
    counted_bytes,
    in_flight,
    instructions_per_parameter,
    main_path,
    resident_warps,
    resources,
)
from fsam_triton.kernels import blocks, perturb


def launched(methods: tuple[str, ...], precisions: tuple[str, ...]) -> list[kb.Build]:
    """The passes over blocks of these methods' steps."""
    steps = [kb.steps(*kb.PRECISIONS[name])[method] for method in methods for name in precisions]
    return [one for one in kb.unique(one for step in steps for one in step) if kb.is_over_blocks(one)]


# What a run without options launches.
MAIN = launched(("SAM",), ("fp32", "bf16", "bf16 + master", "bf16, 8-bit", "fp16", "fp16 + master"))
METHODS = launched(
    ("AdamW", "SGD", "SGD, momentum", "Lion", "FSAM", "ESAM", "GSAM", "LookSAM", "momentum-SAM", "SAM, ema"),
    ("fp32", "bf16", "bf16 + master"),
)
METHODS += launched(("FriendlySAM", "preconditioned SAM"), ("fp32", "bf16"))
METHODS += launched(("Lion", "momentum-SAM", "SAM, ema"), ("bf16, 8-bit",))
METHODS = [one for one in METHODS if one not in MAIN]
# Another path through the compiler.
OTHERS = [
    *kb.COMBINED,
    *kb.SPARSE,
    *kb.TOPK,
    *kb.COEFFICIENTS,
    *kb.NOISE,
    kb.perturb_build("fp64", random=True),
    kb.norm_build("fp32"),
    kb.norm_build("bf16", adaptive=True),
    kb.norm_build("bf16", along="over_root", lane="u8"),
    kb.perturb_build("bf16", along="over_root", lane="u8", steps=True, adaptive=True, masked=True),
    *(kb.gap_build(dtype) for dtype in ("fp32", "bf16", "fp64")),
]
BUILDS = {
    "sm_80": MAIN + METHODS,
    "sm_90": MAIN + METHODS + OTHERS,
    "sm_100": MAIN + METHODS,
    "gfx942": MAIN + METHODS + OTHERS,
    "gfx1100": MAIN,
}


def cases(builds: dict[str, list[kb.Build]]):
    return [
        pytest.param(target, one, id=f"{target}-{one.name}") for target in builds for one in kb.unique(builds[target])
    ]


def names(one: kb.Build) -> str:
    return one.name


@pytest.mark.parametrize(("target", "one"), cases(BUILDS))
def test_nothing_is_spilled(target, one):
    assert resources(one, target).spills == 0


ELEMENT_WISE = {
    target: [one for one in builds if kb.is_over_blocks(one) or one in kb.SPARSE + kb.NOISE]
    for target, builds in BUILDS.items()
}


@pytest.mark.parametrize(("target", "one"), cases(ELEMENT_WISE))
def test_element_wise_passes_use_no_shared_memory(target, one):
    assert resources(one, target).shared == 0


VECTORS = {target: MAIN + METHODS if target in ("sm_90", "gfx942") else MAIN for target in TARGETS}


@pytest.mark.parametrize(("target", "one"), cases(VECTORS))
def test_whole_blocks_access_each_array_once_by_16_bytes(target, one):
    """By 8 or 16 where 16-bit types meet fp32 ones: a lane has the same four elements of all."""
    found = accesses(one, target)
    assert (found.loads, found.stores) == tuple(Counter(width(one, dtype) for dtype in side) for side in operands(one))


def width(one: kb.Build, dtype: str) -> int:
    return min(16, dict(one.flags)["BLOCK"] // one.lanes * kb.SIZES[dtype])


def operands(one: kb.Build) -> tuple[list[str], list[str]]:
    """Types of what a pass reads and writes, once for each element."""
    pointers = dict(one.pointers)
    if one.kernel is perturb.perturb_kernel:
        reads, writes = ["weight_ptr", "grad_ptr", "lane_ptr"], ["weight_ptr", "backup_ptr"]
        writes += ["lane_ptr"] if dict(one.flags)["ALONG"] == "less_average" else []
    else:
        reads = ["clean_ptr", "grad_ptr", "other_ptr", "steps_ptr", "remainder_ptr", "anchor_ptr", "ema_ptr"]
        writes = ["weight_ptr", "remainder_ptr", "ema_ptr", "orthogonal_ptr"]
    state = list(pointers.get("state_ptrs", ()))
    return tuple([pointers[name] for name in side if name in pointers] + state for side in (reads, writes))


@pytest.mark.parametrize("one", [one for one in MAIN + METHODS if kb.is_of_8_bits(one)], ids=names)
def test_scales_are_read_once_by_a_lane_and_written_by_one_of_a_group(one):
    """All other accesses are wider."""
    pointers = dict(one.pointers)
    written = len(pointers.get("scale_ptrs", ()))
    found = Counter(i.name[:3] for i in main_path(one, "sm_90")[0] if re.match(r"(LDG|STG)\.E\.U16", i.name))
    assert found == +Counter(LDG=written + ("scale_ptr" in pointers), STG=written)


@pytest.mark.parametrize("one", MAIN + METHODS, ids=names)
def test_registers_leave_room_for_enough_threads(one):
    """At most 40 with four elements a thread: six programs of 256 threads on a processor of 65536 registers. With
    eight, where all is of 16 bits, at most 64: as many elements are under way. Codes may take 64 with four, too."""
    has_few = one.lanes == blocks.LANES and not kb.is_of_8_bits(one)
    assert resources(one, "sm_90").registers <= (40 if has_few else 64)


@pytest.mark.parametrize("one", [one for one in kb.COMBINED if kb.is_over_blocks(one)], ids=names)
def test_registers_of_several_options_leave_room_for_enough_threads(one):
    """64 and 88; fp64 divides and takes roots in subroutines, which take registers."""
    limit = 64 if one.lanes == blocks.LANES else 88
    assert resources(one, "sm_90").registers <= (128 if "fp64" in one.name else limit)


@pytest.mark.parametrize("one", MAIN + METHODS, ids=names)
def test_loads_under_way_cover_the_latency_of_the_memory(one):
    """B200 moves 8 TB/s: within 0.8 microseconds 44 KiB on each of its 148 processors."""
    assert codegen.DEVICES["B200"].hidden_latency(in_flight(one, "sm_100")) >= 0.8e-6


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_norm_reads_four_elements_at_a_time(dtype):
    found = accesses(kb.norm_build(dtype), "sm_90")
    assert set(found.loads) == {4 * kb.SIZES[dtype]}
    # The partial sum, in fp64.
    assert found.stores == {8: 1}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gap_reads_four_elements_of_each_tensor_at_a_time(dtype):
    one = kb.gap_build(dtype)
    found = accesses(one, "sm_90")
    assert set(found.loads) == {4 * kb.SIZES[dtype]}
    assert bytes_per_parameter(one, "sm_90") == 2 * kb.SIZES[dtype]
    # The partial sums, in fp64.
    assert found.stores == {8: 3}


@pytest.mark.parametrize("one", MAIN + METHODS, ids=names)
def test_machine_code_moves_no_more_than_the_kernel_says(one):
    assert bytes_per_parameter(one, "sm_90") == counted_bytes(one, "sm_90")


@pytest.mark.parametrize("precision", codegen.DESIGN)
def test_passes_of_sam_move_the_bytes_of_the_design(precision):
    moved = [bytes_per_parameter(one, "sm_90") for one in kb.steps(*kb.PRECISIONS[precision])["SAM"]]
    assert moved == list(codegen.DESIGN[precision])


@pytest.mark.parametrize("one", [*MAIN, *METHODS, kb.norm_build("bf16"), kb.gap_build("bf16")], ids=names)
def test_instructions_leave_the_memory_its_bandwidth(one):
    for name, least in codegen.budget(one).items():
        device = codegen.DEVICES[name]
        moved, instructions = (count(one, device.target) for count in (bytes_per_parameter, instructions_per_parameter))
        assert device.share(moved, instructions) >= least, name


def test_a_step_with_8_bit_formats_takes_two_thirds_of_one_with_master_weights():
    """On H100; faster memories wait for instructions."""
    names = ("bf16 + master", "bf16, 8-bit")
    found = [[codegen.figures(one, "sm_90") for one in kb.steps(*kb.PRECISIONS[name])["SAM"]] for name in names]
    before, after = map(codegen.DEVICES["H100 SXM"].seconds, found)
    assert before / after >= 1.5


@pytest.mark.parametrize(("target", "one"), cases(dict.fromkeys(AMD, MAIN)))
def test_predicted_occupancy_is_that_of_llvm(target, one):
    """LLVM gives waves of one of the parts of a processor."""
    limit = TARGETS[target]
    waves = int(re.search(r"; Occupancy: (\d+)", assembly(one, target))[1])
    warps = resident_warps(resources(one, target), one.warps(limit.gpu.warp_size), target)
    assert warps == waves * limit.schedulers


@pytest.mark.slow
def test_committed_report_is_of_this_code():
    """As far as sm_90 was compiled for here."""
    report = codegen.RESULTS.read_text(encoding="utf-8")
    if not report.startswith(codegen.title()):
        pytest.skip("the report is of other versions of Triton or torch")
    assert codegen.bytes_table(codegen.figures) in report
    for one in MAIN:
        assert codegen.row("sm_90", codegen.figures(one, "sm_90")) in section(report, one.name)


def section(report: str, name: str) -> str:
    """The rows of a build in the table of all."""
    everything = report[report.index("\n7. ") :]
    return re.search(rf"^{re.escape(name)} \(.*\n((?:(?:sm_|gfx).*\n?)+)", everything, re.M)[1]
