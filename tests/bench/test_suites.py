"""The benchmarks run, time the same work everywhere, and leave nothing in their results that names the machine."""

import json
import math
import pathlib
import platform

import pytest
import torch

pytest.importorskip("psutil")

from bench import traffic
from bench.bandwidth import Rates, measure_rates
from bench.memory import build_and_measure
from bench.render import Run, render
from bench.workloads import IMPLEMENTATIONS, MODELS, is_installed, make_parameters

BENCH = pathlib.Path(__file__).parents[2] / "bench"
SHAPES = [(40, 24), (24,), (24, 24)]
STEPS = 3


@pytest.fixture(autouse=True)
def eager():
    """Nothing here is worth compiling."""
    with torch.compiler.set_stance("force_eager"):
        yield


def stepped(build, precision):
    params = make_parameters(SHAPES, precision.dtype)
    step = build(params, precision)
    for _ in range(STEPS):
        step()
    return params


# Both passes see the same gradient here, with which SAM and GSAM descend as AdamW does.
SHARP = [one for one in IMPLEMENTATIONS if one.algorithm in ("SAM", "GSAM")]


@pytest.mark.parametrize("implementation", SHARP, ids=lambda one: one.name)
def test_every_sam_step_restores_and_updates_as_adamw_does(implementation):
    if not is_installed(implementation.package) or traffic.FP32 not in implementation.precisions:
        pytest.skip("not installed, or for 16 bits alone")
    expected = make_parameters(SHAPES, torch.float32)
    adamw = torch.optim.AdamW(expected, lr=1e-5)
    params = stepped(implementation.build, traffic.FP32)
    for _ in range(STEPS):
        adamw.step()
    for p, wanted in zip(params, expected, strict=True):
        # Four roundings of a weight below 1/8 in each step; and the update's own, relative to lr.
        torch.testing.assert_close(p, wanted, rtol=0, atol=5 * (4 * 2.0**-28 + 1e-5 * 2.0**-18))


# What is compiled takes more when it runs eagerly.
OTHERS = [one for one in IMPLEMENTATIONS if "over" in one.name or "torch" in one.name]


@pytest.mark.parametrize("implementation", OTHERS, ids=lambda one: one.name)
def test_room_is_enough_for_what_a_step_takes(implementation):
    if not is_installed(implementation.package):
        pytest.skip("not installed")
    shapes = [(64, 1024)] * 8
    weights = sum(map(math.prod, shapes))
    precision = implementation.precisions[-1]

    def build():
        return implementation.build(make_parameters(shapes, precision.dtype), precision)

    assert build_and_measure(build)[1].peak <= implementation.room(weights, precision)


@pytest.mark.parametrize(
    ("precision", "norm", "perturb", "descend"),
    [
        (traffic.FP32, 4, 16, 28),
        (traffic.MASTER, 2, 8, 26),
        (traffic.BF16, 2, 8, 14),
        (traffic.SHORT, 2, 7, 13.25),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_sam_step_moves_the_bytes_that_the_passes_do(precision, norm, perturb, descend):
    moved = [part(precision).total for part in (traffic.norm, traffic.perturb, traffic.descend, traffic.sam_step)]
    assert moved == [norm, perturb, descend, norm + perturb + descend]


def test_limit_of_a_pass_is_the_time_of_its_streams_at_their_rates():
    rates = Rates(read=40e9, updated=60e9, written=30e9)
    assert rates.seconds(traffic.perturb(traffic.FP32), 10**9) == pytest.approx(4 / 40 + 8 / 60 + 4 / 30)


def test_rates_count_bytes_both_ways():
    rates = measure_rates(torch.ones(1 << 12))
    assert min(rates.read, rates.updated, rates.written) > 0


def test_best_rates_are_the_highest_of_each_kind():
    measured = [Rates(read=40e9, updated=60e9, written=31e9), Rates(read=42e9, updated=50e9, written=30e9)]
    assert Rates.best(measured) == Rates(read=42e9, updated=60e9, written=31e9)


def test_models_have_their_published_sizes():
    sizes = {name: sum(map(math.prod, shapes())) for name, shapes in MODELS.items()}
    assert sizes == {
        "MiniLM": 22_713_216,
        "BERT-base": 109_482_240,
        "RoBERTa-large": 355_359_744,
        "TinyLlama-1.1B": 1_100_048_384,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a run of small sizes has written, as text."""
    pytest.importorskip("pytest_benchmark")
    path = tmp_path_factory.mktemp("results") / "benchmarks_tiny.json"
    chosen = (
        "BERT-base and (fp32-FSAM or fp32-eager) or update_alone and fp32 or fp32-perturb-"
        " or cost_of_weights and 1000000- or cost_of_tensors and (10- or 30-)"
    )
    arguments = [
        "--tiny",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-k",
        f"({chosen}) and not mask and not alpha and not foreach",
    ]
    suites = [str(BENCH / f"test_{name}.py") for name in ("sam_step", "kernels", "scaling")]
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        # Under xdist the suites would run, but not be timed.
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        assert pytest.main([*suites, *arguments, f"--benchmark-json={path}"]) == 0
    return path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_results_name_neither_machine_nor_folder_nor_time(results):
    assert platform.node() not in results
    assert str(BENCH.parent) not in results
    assert not {"commit_info", "datetime"} & json.loads(results).keys()


def test_every_result_says_what_it_is_of(results):
    rows = json.loads(results)["benchmarks"]
    assert {row["suite"] for row in rows} == {"steps", "passes", "updates", "sizes", "tensors"}
    wanted = {"subject", "implementation", "model", "precision", "device", "weights", "min", "rounds"}
    wanted |= {"bytes_per_weight", "bandwidth", "fraction", "held_bytes", "peak_bytes"}
    assert all(wanted <= row.keys() for row in rows)


def test_results_of_a_run_render(results):
    content = json.loads(results)
    run = Run("tiny", "cpu", content["machine_info"], content["benchmarks"])
    names = {"steps": "FSAM", "memory": "FSAM", "passes": "fsam_triton", "updates": "AdamWL2SP", "scaling": "FSAM"}
    for block, name in names.items():
        assert f"| {name}" in render(f"<!-- {block} -->\n<!-- /{block} -->", [run])
