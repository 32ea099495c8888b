"""Compiles the kernels for NVIDIA and AMD targets, which needs no GPU, and judges the machine code.

Held for each build below: no spills; element-wise kernels use no shared memory. On the main path (whole blocks) also:
vector accesses alone, each array once, and at most 40 registers on sm_90. `python -m bench.codegen` prints the figures,
and those of every other configuration.
"""

import re
from collections import Counter

import pytest

from tests.test_fidelity import load_bench

load_bench()

from bench import codegen  # noqa: E402
from bench import kernel_builds as kb  # noqa: E402
from bench.machine_code import (  # noqa: E402
    AMD,
    TARGETS,
    accesses,
    assembly,
    bytes_per_parameter,
    counted_bytes,
    resident_warps,
    resources,
)
from fsam_triton.kernels import adamw_l2sp, perturb  # noqa: E402


def launched(methods: tuple[str, ...], precisions: tuple[str, ...]) -> list[kb.Build]:
    """The element-wise kernels of these methods' steps."""
    steps = [kb.steps(*kb.PRECISIONS[name])[method] for method in methods for name in precisions]
    return [one for one in kb.unique(one for step in steps for one in step) if kb.is_element_wise(one)]


# What a run without options launches.
MAIN = launched(("SAM",), ("fp32", "bf16", "bf16 + master", "fp16", "fp16 + master"))
METHODS = launched(
    ("AdamW", "FSAM", "ESAM", "GSAM", "LookSAM", "momentum-SAM", "SAM, ema"), ("fp32", "bf16", "bf16 + master")
)
METHODS = [one for one in METHODS if one not in MAIN]
# Another path through the compiler.
OTHERS = [
    *kb.COMBINED,
    *kb.SPARSE,
    *kb.TOPK,
    kb.perturb_build("fp64", random=True),
    kb.norm_build("fp32"),
    kb.norm_build("bf16", adaptive=True),
    *(kb.gap_build(*types) for types in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp64", "fp64"))),
]
BUILDS = {
    "sm_80": MAIN + METHODS,
    "sm_90": MAIN + METHODS + OTHERS,
    "sm_100": MAIN + METHODS,
    "gfx942": MAIN + METHODS + OTHERS,
    "gfx1100": MAIN,
}


def cases(builds: dict[str, list[kb.Build]]):
    return [pytest.param(target, one, id=f"{target}-{one.name}") for target in builds for one in builds[target]]


def names(one: kb.Build) -> str:
    return one.name


@pytest.mark.parametrize(("target", "one"), cases(BUILDS))
def test_nothing_is_spilled(target, one):
    assert resources(one, target).spills == 0


ELEMENT_WISE = {target: [one for one in builds if kb.is_element_wise(one)] for target, builds in BUILDS.items()}


@pytest.mark.parametrize(("target", "one"), cases(ELEMENT_WISE))
def test_element_wise_kernels_use_no_shared_memory(target, one):
    assert resources(one, target).shared == 0


VECTORS = {target: MAIN + METHODS if target in ("sm_90", "gfx942") else MAIN for target in TARGETS}


@pytest.mark.parametrize(("target", "one"), cases(VECTORS))
def test_main_path_accesses_each_array_once_by_16_bytes(target, one):
    """By 8 the update's 16-bit arrays: it may have fp32 ones too, and a lane has the same elements of all."""
    found = accesses(one, target)
    assert (found.loads, found.stores) == tuple(Counter(width(one, dtype) for dtype in side) for side in operands(one))


def width(one: kb.Build, dtype: str) -> int:
    return 8 if one.kernel is adamw_l2sp.adamw_l2sp_kernel and kb.SIZES[dtype] == 2 else 16


def operands(one: kb.Build) -> tuple[list[str], list[str]]:
    """Types of what a main-path kernel reads and writes, once for each element."""
    pointers, flags = dict(one.pointers), dict(one.flags)
    if one.kernel is perturb.perturb_kernel:
        reads, writes = ["weight_ptr", "grad_ptr"], ["weight_ptr", "backup_ptr"]
    else:
        clean = next(name for name in ("master_ptr", "backup_ptr", "weight_ptr") if name in pointers)
        reads = [clean, "grad_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "other_grad_ptr", "ema_ptr"]
        writes = ["weight_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "master_ptr", "ema_ptr"]
        writes += ["other_grad_ptr"] if flags["KEEP_ORTHOGONAL"] else []
        writes += ["backup_ptr"] if flags["PERTURB"] else []
    return tuple([pointers[name] for name in side if name in pointers] for side in (reads, writes))


@pytest.mark.parametrize("one", MAIN + METHODS, ids=names)
def test_main_path_takes_at_most_forty_registers(one):
    """Six blocks of 256 threads on a processor of 65536 registers."""
    assert resources(one, "sm_90").registers <= 40


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradient_norm_reads_four_elements_at_a_time(dtype):
    found = accesses(kb.norm_build(dtype), "sm_90")
    assert set(found.loads) == {4 * kb.SIZES[dtype]}
    # The partial sum, in fp64.
    assert found.stores == {8: 1}


@pytest.mark.parametrize("first", ["fp32", "bf16"])
@pytest.mark.parametrize("second", ["fp32", "bf16"])
def test_surrogate_gap_reads_four_elements_of_each_tensor_at_a_time(first, second):
    one = kb.gap_build(first, second)
    found = accesses(one, "sm_90")
    assert set(found.loads) == {4 * kb.SIZES[first], 4 * kb.SIZES[second]}
    assert bytes_per_parameter(one, "sm_90") == kb.SIZES[first] + kb.SIZES[second]
    # The partial sums, in fp64.
    assert found.stores == {8: 3}


@pytest.mark.parametrize("one", MAIN + METHODS, ids=names)
def test_machine_code_moves_no_more_than_the_kernel_says(one):
    assert bytes_per_parameter(one, "sm_90") == counted_bytes(one, "sm_90")


@pytest.mark.parametrize(("precision", "design"), codegen.DESIGN.items(), ids=list(codegen.DESIGN))
def test_kernels_of_sam_move_the_bytes_of_the_design(precision, design):
    """Within 1 %, or fewer: the perturbation of bf16 weights need not read or write their masters."""
    moved = [bytes_per_parameter(one, "sm_90") for one in kb.steps(*kb.PRECISIONS[precision])["SAM"]]
    assert all(ours <= 1.01 * theirs for ours, theirs in zip(moved, design, strict=True))
    assert moved == ([2, 6, 28] if precision == "bf16 + master" else list(design))


@pytest.mark.parametrize(
    ("precision", "plain", "momentum"), [("bf16 + master", 30, 34), ("fp32", 32, 40), ("bf16", 16, 20)]
)
def test_momentum_sam_moves_few_more_bytes_than_adamw_with_clipping(precision, plain, momentum):
    """At most 20 % more with master weights, which are the backup, and 50 % more where the backup is written too."""
    steps = kb.steps(*kb.PRECISIONS[precision])
    moved = [
        sum(bytes_per_parameter(one, "sm_90") for one in steps[name]) for name in ("AdamW, clipped", "momentum-SAM")
    ]
    assert moved == [plain, momentum]
    assert momentum <= (1.2 if "master" in precision else 1.5) * plain


@pytest.mark.parametrize(("target", "one"), cases(dict.fromkeys(AMD, MAIN)))
def test_predicted_occupancy_is_that_of_llvm(target, one):
    """LLVM gives waves of one of the parts of a processor."""
    limit = TARGETS[target]
    waves = int(re.search(r"; Occupancy: (\d+)", assembly(one, target))[1])
    warps = resident_warps(resources(one, target), one.warps(limit.gpu.warp_size), target)
    assert warps == waves * limit.schedulers


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
    everything = report[report.index("\n5. ") :]
    return re.search(rf"^{re.escape(name)} \(.*\n((?:(?:sm_|gfx).*\n?)+)", everything, re.M)[1]
