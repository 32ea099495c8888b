"""bench/codegen.py: it compiles what the optimizers launch, and its predictions follow from the hardware's limits."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fsam_triton import FSAM, AdamWL2SP, FisherMask, MomentumSAM, Schedule, ops
from fsam_triton.kernels import reference

pytest.importorskip("triton")

from bench import codegen
from bench.kernel_builds import DTYPES as TYPES
from bench.kernel_builds import PRECISIONS, Build, configurations, is_over_segments, steps
from bench.machine_code import Resources, resident_warps
from fsam_triton.kernels import descend, gap, norm, perturb, topk_mask

PAGE = Path(__file__).parents[2] / "docs" / "machine_code.md"
DTYPES = {dtype: name for name, dtype in TYPES.items()}


class Recorder:
    """Stands in for a kernel: notes what it is launched with, and computes nothing."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, num_warps, enable_fp_fusion=True, **flags):
            given = dict(zip(self.kernel.arg_names, args, strict=False))
            # Norms that are not NaN, and enough of every digit for the search of a threshold to go on.
            for name in {"partial_ptr", "hist_ptr"} & set(given):
                given[name].fill_(1 << 20)
            pointers = {name: named(value) for name, value in given.items() if isinstance(value, torch.Tensor | tuple)}
            is_aligned = given["n"] % 16 == 0 if "n" in given else None
            self.launches.append((self.kernel.__name__, pointers, flags, is_aligned, num_warps, enable_fp_fusion))

        return launch


def named(value: torch.Tensor | tuple) -> str | tuple:
    return DTYPES[value.dtype] if isinstance(value, torch.Tensor) else tuple(map(named, value))


def described(one: Build) -> tuple:
    """A build as a Recorder notes it."""
    fusion = dict(one.options).get("enable_fp_fusion", True)
    is_aligned = dict(one.integers).get("n")
    return one.kernel.__name__, dict(one.pointers), dict(one.flags), is_aligned, one.warps(32), fusion


# Before a Recorder stands in for a kernel.
STEPS = {
    (method, precision): [described(one) for one in builds]
    for precision, arguments in PRECISIONS.items()
    for method, builds in steps(*arguments).items()
}
CONFIGURATIONS = configurations()


@pytest.fixture
def launches(monkeypatch) -> list:
    """What the launchers would launch on a GPU with warps of 32."""
    found = []
    for module in (descend, gap, norm, perturb, topk_mask):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), found))
    monkeypatch.setattr(ops, "interpreting", lambda: True)
    # A few numbers a parameter: they are not what the report is about.
    for name in ("climb_coefficients", "descend_coefficients"):
        monkeypatch.setattr(ops, name, getattr(reference, name))
    return found


# An optimizer for each of the methods, and the step that is looked at: every other one is plain in a schedule.
EVERY_OTHER = Schedule(every=2)
OPTIMIZERS: dict[str, tuple[Callable, dict, int]] = {
    "AdamW": (AdamWL2SP, {}, 1),
    "AdamW, clipped": (AdamWL2SP, {"max_grad_norm": 1.0}, 1),
    "AdamW, amsgrad": (AdamWL2SP, {"amsgrad": True}, 1),
    "AdamW, L2-SP": (AdamWL2SP, {"l2_sp": 0.01}, 1),
    "SGD": (FSAM, {"rule": "sgd", "schedule": EVERY_OTHER}, 2),
    "SGD, momentum": (FSAM, {"rule": "sgd", "momentum": 0.9, "schedule": EVERY_OTHER}, 2),
    "Lion": (FSAM, {"rule": "lion", "schedule": EVERY_OTHER}, 2),
    "SAM": (FSAM, {}, 1),
    "SAM, L2-SP": (FSAM, {"l2_sp": 0.01}, 1),
    "SAM, ema": (FSAM, {"ema_decay": 0.9}, 1),
    "SAM, to nearest": (FSAM, {"stochastic_rounding": False}, 1),
    "SAM, SGD": (FSAM, {"rule": "sgd", "momentum": 0.9}, 1),
    "SAM, Lion": (FSAM, {"rule": "lion"}, 1),
    "ASAM": (FSAM, {"adaptive": True}, 1),
    "FSAM": (FSAM, {"mask": FisherMask(0.5)}, 1),
    "FSAM, masked norm": (FSAM, {"mask": FisherMask(0.5), "mask_norm": "masked"}, 1),
    "ESAM": (FSAM, {"beta": 0.5}, 1),
    "FriendlySAM": (FSAM, {"sigma": 1.0}, 1),
    "preconditioned SAM": (FSAM, {"preconditioned": True}, 1),
    "GSAM": (FSAM, {"alpha": 0.5}, 1),
    "LookSAM": (FSAM, {"schedule": Schedule(every=2, reuse=0.5)}, 1),
    "LookSAM, reused": (FSAM, {"schedule": Schedule(every=2, reuse=0.5)}, 2),
    "momentum-SAM": (MomentumSAM, {}, 2),
    "momentum-SAM, ema": (MomentumSAM, {"ema_decay": 0.9}, 2),
}


def train(method: str, precision: str, launches: list) -> list:
    """What a step of a method launches."""
    cls, arguments, step = OPTIMIZERS[method]
    weight, master = PRECISIONS[precision]
    formats = {"master_weights": f"{master}bit" if master else False}
    if master == 24:
        formats |= {"state_format": "8bit"} | ({} if cls is AdamWL2SP else {"backup_format": "8bit"})
    p = torch.nn.Parameter(torch.ones(64, 320, dtype=TYPES[weight]))
    optimizer = cls([("layer.weight", p)], **formats, **arguments)

    def closure():
        p.grad = torch.ones_like(p)
        return torch.zeros(())

    for _ in range(step):
        launches.clear()
        if cls is MomentumSAM:
            optimizer.perturb()
        optimizer.step(closure)
    return launches


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", OPTIMIZERS)
def test_builds_of_a_method_are_what_its_optimizer_launches(method, precision, launches):
    found = train(method, precision, launches)
    choices = [launch for launch in found if "values_ptr" in launch[1]]
    assert [launch for launch in found if launch not in choices] == STEPS[method, precision]


def test_every_method_of_the_report_has_an_optimizer():
    assert {method for method, _ in STEPS} == set(OPTIMIZERS)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_choice_of_a_mask_is_among_the_configurations(precision, launches):
    """But for the digits between the first and the last one, which are those with other shifts."""
    found = [launch for launch in train("FSAM", precision, launches) if "values_ptr" in launch[1]]
    built = [described(one) for one in CONFIGURATIONS if "values_ptr" in dict(one.pointers)]

    def shifted(launch: tuple) -> tuple:
        kernel, pointers, flags, *rest = launch
        return kernel, pointers, {name: value for name, value in flags.items() if name != "SHIFT"}, *rest

    assert len(found) > 3
    assert all(shifted(launch) in map(shifted, built) for launch in found)


def test_names_of_builds_are_their_own():
    names = [one.name for one in CONFIGURATIONS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("target", "block_warps", "used", "warps"),
    [
        # 65536 registers hold 6 blocks of 256 threads with 40, and 5 with 48.
        ("sm_90", 8, Resources(40, 0, 0), 48),
        ("sm_90", 8, Resources(41, 0, 0), 40),
        ("sm_90", 8, Resources(48, 0, 0), 40),
        ("sm_90", 8, Resources(32, 0, 0), 64),
        ("sm_80", 8, Resources(255, 0, 0), 8),
        # 32 blocks of one warp; 228 KiB of shared memory are 3 blocks of 64 + 1.
        ("sm_90", 1, Resources(16, 0, 0), 32),
        ("sm_90", 4, Resources(16, 0, 64 << 10), 12),
        # 512 and 1536 registers of a lane in each SIMD, in granules of 8 and 24; four SIMDs, and two.
        ("gfx942", 4, Resources(64, 0, 0), 32),
        ("gfx942", 4, Resources(65, 0, 0), 28),
        ("gfx1100", 8, Resources(96, 0, 0), 32),
        ("gfx1100", 8, Resources(97, 0, 0), 24),
    ],
)
def test_occupancy_follows_from_registers_blocks_and_shared_memory(target, block_warps, used, warps):
    assert resident_warps(used, block_warps, target) == warps


def test_latency_that_loads_in_flight_hide():
    """Little's law: 25 KB on each of 132 processors are in flight for a microsecond at 3.3 TB/s."""
    assert codegen.Device("sm_90", 3.3e12, 132, 1e9).hidden_latency(25_000) == pytest.approx(1e-6)


def figures(moved: float, instructions: float) -> codegen.Figures:
    return codegen.Figures({}, {}, moved, 32, 0, 0, 1.0, 0, instructions)


def test_time_is_bytes_over_bandwidth():
    rows = codegen.time_table(lambda one, target: figures(10.0, 0.0)).splitlines()
    # Three kernels of 10 bytes for 1e9 parameters at 3.35 TB/s.
    sam = next(row for row in rows[rows.index("1 B parameters") :] if re.match(r" *SAM +fp32", row))
    assert float(sam.split()[3]) == pytest.approx(30 / 3.35, rel=0.005)
    assert float(sam.split()[6]) == pytest.approx(30 / 5.3, rel=0.005)


def test_share_of_the_bandwidth_is_what_instructions_leave():
    """100 processors of 1 GHz start 12.8e12 instructions a second: 16 take 1.25 ps, and 4 bytes 4 ps at 1 TB/s."""
    device = codegen.Device("sm_90", 1e12, 100, 1e9)
    assert device.share(4, 16) == 1.0
    assert device.share(4, 4 * 12.8 * 2) == pytest.approx(0.5)
    # Two passes, of which one waits for its bytes, and the other one for its instructions.
    assert device.seconds([figures(4.0, 16.0), figures(4.0, 8 * 12.8)]) == pytest.approx(4e-12 + 8e-12)


@pytest.mark.parametrize(("instructions", "is_kept"), [(1.0, True), (1000.0, False)])
def test_report_says_which_passes_do_not_keep_the_budget(instructions, is_kept):
    lines = codegen.share_table(lambda one, target: figures(8.0, instructions)).splitlines()
    assert (lines[-1] == "Every pass keeps it.") == is_kept
    assert ("Not kept by norm-fp32 on B200." in lines) != is_kept


# Three to six bytes an element: a root and a quotient take 13 instructions, stochastic rounding to fp16 17.
OVER_BUDGET = [
    "Not kept by norm-bf16-over_root on B200.",
    "Not kept by norm-bf16-over_root-of_u8 on H200.",
    "Not kept by norm-bf16-over_root-of_u8 on B200.",
    "Not kept by descend-sgd-fp16-plain-stochastic on B200.",
]


def test_committed_report_says_of_all_passes_how_much_of_the_bandwidth_they_can_use():
    lines = tables()["4"].splitlines()[2:]
    place = next(i for i, line in enumerate(lines) if line.startswith("Budget: "))
    assert [row.split()[0] for row in lines[:place]] == [one.name for one in CONFIGURATIONS if is_over_segments(one)]
    assert lines[place + 1 :] == OVER_BUDGET


def tables() -> dict[str, str]:
    """Of the committed report, by their numbers."""
    return {table[0]: table for table in codegen.RESULTS.read_text(encoding="utf-8").strip().split("\n\n")[1:]}


def quoted() -> list[str]:
    blocks = re.findall(r"^```\n(\d\. .*?)\n```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return [pytest.param(block, id=block[0]) for block in blocks]


@pytest.mark.parametrize("block", quoted())
def test_page_quotes_the_committed_report(block):
    assert block == tables()[block[0]]


def test_page_quotes_all_tables_but_the_list_of_all_configurations():
    assert [block.id for block in quoted()] == ["1", "2", "3", "4", "5", "6"]
    assert list(tables()) == ["1", "2", "3", "4", "5", "6", "7"]


def test_committed_report_has_every_configuration():
    listed = re.findall(r"^([\w-]+) \((.*)\)$", tables()["7"], re.M)
    assert dict(listed) == {one.name: "; ".join(launchers) for one, launchers in CONFIGURATIONS.items()}


def test_committed_report_names_no_path():
    assert re.search(r"(^|[\s:\"'])/", codegen.RESULTS.read_text(encoding="utf-8"), re.M) is None
