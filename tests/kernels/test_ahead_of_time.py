"""Compiles every kernel for NVIDIA and AMD targets, which needs no GPU, and judges the machine code.

Held for each: no spills; element-wise kernels use no shared memory. On the main path (sm_90, whole blocks) also: vector
accesses alone, four elements each, and at most 40 registers; 48 for what ESAM, GSAM, LookSAM, Momentum-SAM and averages
of weights launch.
"""

import functools
import re
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fsam_triton.kernels import adamw_l2sp, blocks, grad_norm, perturb, sparse, surrogate_gap, topk_mask

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CUDA = [80, 90, 100]
WARPS = {"cuda": 8, "hip": 4}
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
HIP = GPUTarget("hip", "gfx942", 64)


@dataclass(frozen=True)
class Build:
    """A kernel with the types of its pointers (None: not given) and the flags that its launcher would pass."""

    name: str
    kernel: object
    pointers: tuple[tuple[str, str], ...]
    flags: tuple[tuple[str, object], ...]

    def source(self) -> ASTSource:
        pointers, flags = dict(self.pointers), dict(self.flags)
        types = {name: f"*{pointers[name]}" for name in pointers} | {"n": "i64"}
        signature = {name: types.get(name, "constexpr") for name in self.kernel.arg_names}
        constants = {(i,): flags.get(name) for i, name in enumerate(signature) if signature[name] == "constexpr"}
        # The launcher sees aligned pointers; n is a multiple of 16 with EVEN.
        aligned = [name for name in types if name != "n" or flags.get("EVEN")]
        attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
        return ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)


def build(kernel, pointers: dict, **flags) -> Build:
    described = [name if value is True else f"no_{name}" if name == "EVEN" else None for name, value in flags.items()]
    main = next(iter(pointers.values()))
    name = "-".join([kernel.__name__, main, *(text.lower() for text in described if text)])
    return Build(name, kernel, tuple(pointers.items()), tuple({"BLOCK": blocks.BLOCK, **flags}.items()))


def perturb_build(weight: str, backup=True, masked=False, adaptive=False, zero_grad=False, random=False, even=True):
    pointers = {"weight_ptr": weight, "grad_ptr": weight, "coef_ptr": "fp64"}
    pointers |= {"backup_ptr": weight} if backup else {}
    pointers |= {"mask_ptr": "i32"} if masked else {}
    return build(
        perturb.perturb_kernel,
        pointers,
        ADAPTIVE=adaptive,
        MASKED=masked,
        BACKUP=backup,
        STOCHASTIC=SIZES[weight] == 2,
        ZERO_GRAD=zero_grad,
        RANDOM=random,
        EVEN=even,
    )


def adamw_build(
    weight: str,
    master=False,
    backup=True,
    anchor=False,
    amsgrad=False,
    zero_grad=False,
    other=False,
    keep=False,
    perturb=False,
    ema=False,
    even=True,
):
    state = "fp32" if master or weight == "fp16" else weight
    pointers = {"weight_ptr": weight, "grad_ptr": weight, "exp_avg_ptr": state, "exp_avg_sq_ptr": state}
    pointers |= {"coef_ptr": "fp64"}
    pointers |= {"max_exp_avg_sq_ptr": state} if amsgrad else {}
    pointers |= {"backup_ptr": weight} if backup and not master else {}
    pointers |= {"master_ptr": "fp32"} if master else {}
    pointers |= {"anchor_ptr": weight} if anchor else {}
    pointers |= {"other_grad_ptr": weight} if other or keep else {}
    pointers |= {"ema_ptr": "fp64" if weight == "fp64" else "fp32"} if ema else {}
    return build(
        adamw_l2sp.adamw_l2sp_kernel,
        pointers,
        AMSGRAD=amsgrad,
        BACKUP="backup_ptr" in pointers,
        MASTER=master,
        ANCHOR=anchor,
        STOCHASTIC=SIZES[weight] == 2 and not master,
        ZERO_GRAD=zero_grad,
        OTHER=other or keep,
        KEEP_ORTHOGONAL=keep,
        PERTURB=perturb,
        EMA=ema,
        EVEN=even,
    )


def norm_build(grad: str, adaptive=False, masked=False, even=True):
    pointers = {"grad_ptr": grad, "partial_ptr": "fp64"}
    pointers |= {"weight_ptr": grad} if adaptive else {}
    pointers |= {"mask_ptr": "i32"} if masked else {}
    flags = {"ADAPTIVE": adaptive, "MASKED": masked, "EVEN": even, "CHUNK_BLOCKS": grad_norm.CHUNK_BLOCKS}
    return build(grad_norm.grad_norm_kernel, pointers, **flags)


def gap_build(first: str, second: str, even=True):
    pointers = {"first_ptr": first, "second_ptr": second, "partial_ptr": "fp64"}
    flags = {"EVEN": even, "CHUNK_BLOCKS": grad_norm.CHUNK_BLOCKS}
    one = build(surrogate_gap.surrogate_gap_kernel, pointers, **flags)
    return replace(one, name=one.name.replace(first, f"{first}-{second}"))


def topk_builds(values: str) -> list[Build]:
    shape = {"WIDE": values == "fp64", "CHUNK_BLOCKS": topk_mask.CHUNK_BLOCKS}
    pointers, threshold = {"values_ptr": values}, {"threshold_ptr": "i64"}
    digit = {"SHIFT": 56, "BITS": 7} if values == "fp64" else {"SHIFT": 23, "BITS": 8}
    return [
        build(topk_mask.digit_histogram_kernel, pointers | {"prefix_ptr": "i64", "hist_ptr": "i64"}, **digit, **shape),
        build(topk_mask.count_ties_kernel, pointers | threshold | {"ties_ptr": "i64"}, **shape),
        build(topk_mask.write_mask_kernel, pointers | threshold | {"quota_ptr": "i64", "mask_ptr": "i32"}, **shape),
    ]


def sparse_builds(values: str, index: str = "i32") -> list[Build]:
    pointers = {"compact_ptr": values, "addresses_ptr": "i64", "jobs_ptr": "i64", "index_ptr": index}
    return [build(sparse.sparse_kernel, pointers, SCATTER=scatter, BLOCK=256) for scatter in (True, False)]


# What a run without options launches: SAM with fp32 or bf16 weights, fp16, with and without master weights.
MAIN = [
    *(perturb_build(weight) for weight in ("fp32", "bf16", "fp16")),
    *(perturb_build(weight, backup=False) for weight in ("bf16", "fp16")),
    *(adamw_build(weight) for weight in ("fp32", "bf16", "fp16")),
    *(adamw_build(weight, master=True) for weight in ("bf16", "fp16")),
]
# What ESAM, GSAM, LookSAM, Momentum-SAM and an average of the weights launch in place of these.
METHODS = [
    *(perturb_build(weight, random=True) for weight in ("fp32", "bf16")),
    *(
        adamw_build(*arguments, **{mode: True})
        for arguments in (("fp32",), ("bf16",), ("bf16", True))
        for mode in ("other", "keep", "perturb", "ema")
    ),
]
OPTIONS = [
    perturb_build("bf16", masked=True),
    perturb_build("bf16", adaptive=True, masked=True, even=False),
    perturb_build("fp32", adaptive=True, zero_grad=True),
    perturb_build("fp32", masked=True, even=False),
    adamw_build("fp32", backup=False, zero_grad=True),
    adamw_build("fp32", anchor=True, even=False),
    adamw_build("bf16", backup=False, anchor=True, amsgrad=True),
    adamw_build("bf16", master=True, anchor=True, amsgrad=True, zero_grad=True),
    adamw_build("bf16", master=True, even=False),
    perturb_build("bf16", adaptive=True, masked=True, random=True, even=False),
    adamw_build("bf16", backup=False, anchor=True, amsgrad=True, zero_grad=True, other=True),
    adamw_build("bf16", anchor=True, perturb=True, even=False),
    *(adamw_build(*arguments, perturb=True, ema=True) for arguments in (("fp32",), ("bf16",), ("bf16", True))),
    adamw_build("bf16", backup=False, anchor=True, amsgrad=True, other=True, ema=True, even=False),
]
# Another path through the compiler, judged on one NVIDIA and the AMD target.
RARE = [
    perturb_build("fp64"),
    perturb_build("fp64", random=True),
    adamw_build("fp64", anchor=True),
    adamw_build("fp64", other=True, perturb=True),
    adamw_build("fp64", ema=True),
    adamw_build("fp16", anchor=True, amsgrad=True),
    adamw_build("fp16", other=True, perturb=True),
    *(adamw_build("fp16", master=True, **{mode: True}) for mode in ("other", "perturb")),
    *sparse_builds("fp64", "i64"),
]
REDUCTIONS = [
    norm_build("fp32"),
    norm_build("bf16", adaptive=True),
    norm_build("bf16", masked=True, even=False),
    *(gap_build(*types) for types in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"))),
    gap_build("fp32", "bf16", even=False),
    *topk_builds("fp32"),
    *topk_builds("bf16"),
]
RARE_REDUCTIONS = [
    norm_build("fp64", adaptive=True, masked=True),
    gap_build("fp64", "fp64"),
    gap_build("fp16", "fp64", even=False),
    *topk_builds("fp64"),
]
SPARSE = [*sparse_builds("fp32"), *sparse_builds("bf16")]
ELEMENT_WISE = MAIN + METHODS + OPTIONS + SPARSE


def on(targets: list[int], builds: list[Build]):
    return [pytest.param(arch, one, id=f"sm_{arch}-{one.name}") for arch in targets for one in builds]


def names(one: Build) -> str:
    return one.name


def compiled(one: Build, target: GPUTarget):
    options = {"num_warps": WARPS[target.backend], "enable_fp_fusion": False}
    return triton.compile(one.source(), target=target, options=options)


@dataclass(frozen=True)
class MachineCode:
    """What NVIDIA's tools say about a kernel: global loads and stores by their bytes, local ones, resources.

    `elements` are the types of what each element is read or written as, `scalars` the number of coefficients, both from
    Triton's last representation before machine code.
    """

    loads: Counter
    stores: Counter
    local: list[str]
    registers: int
    stack: int
    shared: int
    elements: tuple[str, ...]
    scalars: int


def accesses(ir: str) -> tuple[tuple[str, ...], int]:
    """Types of the loads and stores of whole blocks, "fp32" for `tensor<1024x!tt.ptr<f32>>`; number of scalar loads."""
    found = re.findall(rf"tt\.(?:load|store) .*: tensor<{blocks.BLOCK}x!tt\.ptr<(\w+)>", ir)
    names = {"f32": "fp32", "f16": "fp16", "f64": "fp64"}
    return tuple(names.get(name, name) for name in found), len(re.findall(r"tt\.load .*: !tt\.ptr<f64>", ir))


def widths(instruction: str, sass: str) -> Counter:
    """LDG.E is 4 bytes wide, LDG.E.U16 2, LDG.E.64 8, LDG.E.128 16."""
    found = Counter()
    for modifiers in re.findall(rf"\b{instruction}\.E((?:\.\w+)*)", sass):
        width = re.search(r"\.[US]?(8|16|64|128)\b", modifiers)
        found[int(width[1]) // 8 if width else 4] += 1
    return found


@functools.cache
def machine_code(one: Build, arch: int) -> MachineCode:
    kernel = compiled(one, GPUTarget("cuda", arch, 32))
    cubin = Path(next(path for name, path in kernel.metadata_group.items() if name.endswith(".cubin")))

    def tool(*command: str) -> str:
        run = subprocess.run([TOOLS / command[0], *command[1:], cubin], capture_output=True, text=True, check=True)
        return run.stdout

    sass, usage = tool("nvdisasm"), tool("cuobjdump", "-res-usage")
    number = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "SHARED")}
    local = re.findall(r"\b(?:LDL|STL)\b", sass)
    resources = (number["REG"], number["STACK"], kernel.metadata.shared)
    return MachineCode(widths("LDG", sass), widths("STG", sass), local, *resources, *accesses(kernel.asm["ttgir"]))


@pytest.mark.parametrize(("arch", "one"), on(CUDA, ELEMENT_WISE + REDUCTIONS) + on([90], RARE + RARE_REDUCTIONS))
def test_nothing_is_spilled_on_nvidia(arch, one):
    code = machine_code(one, arch)
    assert code.loads.total() > 0
    assert (code.stack, code.local) == (0, [])


@pytest.mark.parametrize(("arch", "one"), on(CUDA, ELEMENT_WISE) + on([90], RARE))
def test_element_wise_kernels_use_no_shared_memory_on_nvidia(arch, one):
    assert machine_code(one, arch).shared == 0


@pytest.mark.parametrize("one", MAIN + METHODS, ids=names)
def test_accesses_of_the_main_path_are_four_elements_wide(one):
    """16 bytes of fp32, 8 of a 16-bit type, each operand once; the coefficients, all loads of 8 bytes, come on top."""
    code, (reads, writes) = machine_code(one, 90), operands(one)
    loads, stores = (Counter(4 * SIZES[dtype] for dtype in side) for side in (reads, writes))
    assert code.stores == stores
    assert code.loads == loads + Counter({8: code.scalars})


def operands(one: Build) -> tuple[list[str], list[str]]:
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


@pytest.mark.parametrize("one", MAIN, ids=names)
def test_main_path_takes_at_most_forty_registers(one):
    assert machine_code(one, 90).registers <= 40


@pytest.mark.parametrize("one", METHODS, ids=names)
def test_other_methods_take_at_most_48_registers(one):
    """Five blocks of 256 threads on a processor of 65536 registers."""
    assert machine_code(one, 90).registers <= 48


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradient_norm_reads_four_elements_at_a_time(dtype):
    code = machine_code(norm_build(dtype), 90)
    assert set(code.loads) == {4 * SIZES[dtype]}
    # The partial sum, in fp64.
    assert code.stores == {8: 1}


@pytest.mark.parametrize("first", ["fp32", "bf16"])
@pytest.mark.parametrize("second", ["fp32", "bf16"])
def test_surrogate_gap_reads_four_elements_of_each_tensor_at_a_time(first, second):
    code = machine_code(gap_build(first, second), 90)
    assert code.elements == (first, second)
    assert set(code.loads) == {4 * SIZES[first], 4 * SIZES[second]}
    # The partial sums, in fp64.
    assert code.stores == {8: 3}


def bytes_per_element(*builds: Build) -> int:
    """What the kernels load and store for each element; coefficients and partial sums are not per element."""
    return sum(SIZES[dtype] for one in builds for dtype in machine_code(one, 90).elements)


@pytest.mark.parametrize("one", MAIN + METHODS, ids=names)
def test_machine_code_moves_no_more_than_is_counted(one):
    """Loads and stores are four elements wide, those of coefficients 8 bytes."""
    code = machine_code(one, 90)
    moved = sum(width * count for width, count in (code.loads + code.stores).items())
    assert moved == 4 * bytes_per_element(one) + 8 * code.scalars


@pytest.mark.parametrize(
    ("weight", "master", "moments", "plain", "momentum"),
    [("bf16", True, "fp32", 30, 34), ("fp32", False, "fp32", 32, 40), ("bf16", False, "bf16", 16, 20)],
    ids=["bf16_master", "fp32", "bf16"],
)
def test_momentum_sam_moves_few_more_bytes_than_adamw_with_clipping(weight, master, moments, plain, momentum):
    """At most 20 % more with master weights, which are the backup, and 50 % more where the backup is written too."""
    clipped_adamw = bytes_per_element(norm_build(weight), adamw_build(weight, master, backup=False))
    momentum_sam = bytes_per_element(gap_build(moments, weight), adamw_build(weight, master, perturb=True))
    assert (clipped_adamw, momentum_sam) == (plain, momentum)
    assert momentum_sam <= (1.2 if master else 1.5) * clipped_adamw


@functools.cache
def amd_assembly(one: Build) -> str:
    return compiled(one, HIP).asm["amdgcn"]


@pytest.mark.parametrize("one", ELEMENT_WISE + RARE + REDUCTIONS + RARE_REDUCTIONS, ids=names)
def test_nothing_is_spilled_on_amd(one):
    spills = re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s+(\d+)", amd_assembly(one))
    assert spills == ["0", "0"]


@pytest.mark.parametrize("one", ELEMENT_WISE + RARE, ids=names)
def test_element_wise_kernels_use_no_shared_memory_on_amd(one):
    assert re.findall(r"\.group_segment_fixed_size:\s+(\d+)", amd_assembly(one)) == ["0"]


@pytest.mark.parametrize("one", MAIN + METHODS, ids=names)
def test_accesses_of_the_main_path_are_four_elements_wide_on_amd(one):
    """dwordx4 is 16 bytes (four fp32), dwordx2 8 (four of a 16-bit type, or one of the coefficients)."""
    name = {8: "dwordx2", 16: "dwordx4"}
    found = {side: re.findall(rf"\b(?:global|buffer)_{side}_(\w+)", amd_assembly(one)) for side in ("load", "store")}
    assert Counter(found["store"]) == Counter(name[4 * SIZES[dtype]] for dtype in operands(one)[1])
    assert set(found["load"]) <= set(name.values())
