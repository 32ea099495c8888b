"""The C++ of the passes: sums, what it takes from `spec`, and what the compiler makes of its loops."""

import itertools
import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import build, cpu, reference, spec
from tests.kernels.cases import FLOATS, random_mask
from tests.kernels.launches import ABSENT, Launch, launch_of

pytestmark = pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")

# -- sums --------------------------------------------------------------------------------------------------------------

DTYPES = list(FLOATS)


def exact(launch: Launch, terms: Callable[..., Tensor]) -> tuple[float, float]:
    """The exact sum of `terms(weight, grad, other, mask bits)` over all segments, and of their magnitudes."""
    segments, found = launch.segments(), []
    for i, n in enumerate(launch.plan.lengths):
        if i != ABSENT:
            columns = [segments.flat(name, i) for name in ("weight", "grad", "other")]
            mask = reference.unpack_mask(launch.plan.words(launch.lanes["mask"], i), torch.empty(n))
            found += terms(*(None if c is None else c.double() for c in columns), mask).tolist()
    return math.fsum(found), math.fsum(map(abs, found))


def bound(dtype: str) -> float:
    """A rounding for each addition within a chunk, some for a term."""
    return (spec.CHUNK + 6) * torch.finfo(reference.compute_dtype(FLOATS[dtype])).eps / 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_right_to_the_rounding_of_a_chunks_sum(dtype, adaptive, masked):
    launch = launch_of(dtype, ("weight", "grad"))
    launch.lanes["mask"] = mask = random_mask(launch.plan.size, seed=3)
    expected, _ = exact(launch, lambda w, g, _, m: (g * w if adaptive else g)[m if masked else ...].square())
    actual = cpu.norm_sq(launch.segments(), adaptive, mask if masked else None)
    assert (actual.dtype, actual.shape) == (torch.float64, ())
    assert abs(float(actual) - expected) <= bound(dtype) * expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_gap_is_right_to_the_rounding_of_a_chunks_sums(dtype):
    launch = launch_of(dtype, ("weight", "grad", "other"))
    launch.lanes["mask"] = random_mask(launch.plan.size, seed=3)
    actual = cpu.gap(launch.segments())
    assert (actual.dtype, actual.shape) == (torch.float64, (3,))
    for i, terms in enumerate((lambda w, g, o, m: o * g, lambda w, g, o, m: o * o, lambda w, g, o, m: g * g)):
        expected, size = exact(launch, terms)
        assert abs(float(actual[i]) - expected) <= bound(dtype) * size


def test_gap_shows_which_gradient_is_not_finite():
    launch = launch_of("fp32", ("weight", "grad", "other"))
    launch.columns["other"].tensors()[3][-1] = float("inf")
    assert cpu.gap(launch.segments()).isfinite().tolist() == [False, False, True]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_number_that_is_not_finite_shows_in_the_norm_masked_or_not(dtype, bad):
    launch = launch_of(dtype, ("weight", "grad"))
    mask = torch.zeros(launch.plan.size // 32, dtype=torch.int32)
    assert cpu.norm_sq(launch.segments(), False, mask) == 0
    launch.columns["grad"].tensors()[3][-1] = bad
    assert not cpu.norm_sq(launch.segments(), False, mask).isfinite()


def test_sums_do_not_depend_on_the_number_of_threads(threads):
    launch, results = launch_of("fp32", ("weight", "grad", "other")), set()
    for n in (1, 2, 3, 7):
        threads(n)
        results.add((float(cpu.norm_sq(launch.segments(), True, None)), *cpu.gap(launch.segments()).tolist()))
    assert len(results) == 1


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# -- constants ---------------------------------------------------------------------------------------------------------

CHUNK_CHANGED = """
import sys
import torch
from fsam_triton.kernels import build, cpu, spec
from fsam_triton.kernels.segments import Plan, Segments

spec.CHUNK = int(sys.argv[1])
lengths = [5 * (1 << 14) + 3, 0, 1, 1 << 17, 77]
plan = Plan(lengths, torch.device("cpu"))
tensors = [torch.arange(1, n + 1) % 11 / 4 for n in lengths]

made = []
def guarded(*shape, **options):
    shape = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
    n = shape.numel()
    made.append((n, torch.full((n + 1000,), 5.0, **options)))
    return made[-1][1][:n].view(shape)
torch.empty, torch.zeros = guarded, lambda *shape, **options: guarded(*shape, **options).zero_()

segments = Segments(plan, tensors, tensors, other=tensors)
expected = sum((t.double() ** 2).sum() for t in tensors)
assert plan.chunks == sum(-(-n // spec.CHUNK) for n in lengths)
torch.testing.assert_close(cpu.norm_sq(segments, False, None), expected, rtol=1e-6, atol=0)
torch.testing.assert_close(cpu.gap(segments), expected.expand(3), rtol=1e-6, atol=0)
# Sums of chunks, and of all, for both.
assert len(made) == 4 and all((buffer[n:] == 5).all() for n, buffer in made)
"""


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [spec.CHUNK // 8, spec.CHUNK * 4])
def test_the_size_of_a_chunk_is_written_once(chunk):
    """C++ takes it from `spec`, as the buffers of its sums do: where they differed, it would write past their end."""
    command = [sys.executable, "-c", CHUNK_CHANGED, str(chunk)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_columns_and_constants_reach_cpp_by_name(monkeypatch):
    monkeypatch.setattr(spec, "PERTURB", ("chance", "scale"))
    monkeypatch.setattr(spec, "MIX", 12345)
    text = build.prelude()
    assert "C chance, scale;" in text
    assert "MIX = 12345u;" in text


# -- vectors -----------------------------------------------------------------------------------------------------------


def instances(dtype: str):
    """Passes without options, with one kind, and with all; the number of loops that must be vectors."""
    compute = reference.compute_dtype(FLOATS[dtype])
    t = FLOATS[dtype]
    codes = torch.int8
    names = ("adaptive", "masked", "coded", "along")
    for options in itertools.product((0, 1), repeat=2):
        yield "norm_sq", (t, t, t, compute), dict(zip(names, (*options, 0, 0), strict=True))
    yield "norm_sq", (t, codes, t, compute), dict(zip(names, (0, 0, 1, 0), strict=True))
    for kind, lane in ((1, t), (2, t), (2, torch.uint8)):
        yield "norm_sq", (t, t, lane, compute), dict(zip(names, (0, 1, 0, kind), strict=True))
    yield "gap", (t, compute), {}
    names = ("adaptive", "masked", "coded", "stochastic", "random", "streamed", "along")
    for options in (
        (0, 0, 0, 0, 0, 0),
        (0, 0, 0, 1, 0, 0),
        (0, 1, 0, 1, 0, 0),
        (1, 1, 0, 1, 1, 0),
        (0, 1, 0, 0, 0, 1),
        (0, 0, 0, 0, 0, 1),
        (0, 0, 1, 1, 0, 0),
    ):
        types = (t, codes if options[2] else t, t, t, compute)
        yield "perturb", types, dict(zip(names, (*options, 0), strict=True))
    for kind, lane in ((1, t), (2, t), (2, torch.uint8)):
        yield "perturb", (t, t, t, lane, compute), dict(zip(names, (0, 0, 0, 1, 0, 0, kind), strict=True))
    if dtype != "fp32":
        yield "perturb", (t, t, codes, t, compute), dict(zip(names, (0, 0, 0, 1, 0, 0, 0), strict=True))
        yield "perturb", (t, codes, codes, t, compute), dict(zip(names, (0, 0, 1, 1, 0, 0, 0), strict=True))
    names = ("lanes", "coded", "steps", "remainder", "anchor", "ema", "other", "orthogonal", "stochastic")
    for rule, lanes in spec.STATE.items():
        lost = torch.int16 if dtype == "bf16" else torch.int32
        types = (f"rules::{rule}", t, t, compute, compute, lost, compute)
        for options in ((0, 0, 0, 0, 0, 1), (0, 1, 1, 1, 0, 1), (0, 1, 1, 1, 1, 1), (1, 1, 1, 1, 0, 0)):
            if not (options[0] and dtype == "fp32"):
                yield "descend", types, dict(zip(names, (len(lanes), 0, 0, *options), strict=True))
        if dtype == "bf16":
            small = (f"rules::{rule}", t, t, codes, torch.uint8 if rule == "adamw" else codes, codes, compute)
            # Without the maximum of amsgrad.
            some = 2 if rule == "adamw" else 1
            yield "descend", small, dict(zip(names, (some, 1, 1, 1, 0, 0, 0, 0, 1), strict=True))
        elif dtype == "fp32":
            small = (f"rules::{rule}", t, t, codes, torch.uint8 if rule == "adamw" else codes, lost, compute)
            yield "descend", small, dict(zip(names, (len(lanes), 1, 0, 0, 1, 1, 0, 0, 1), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not build.available() or "g++" not in build.compiler()[0], reason="g++ says what it has vectorised")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_loops_are_vectorized(dtype, monkeypatch, tmp_path):
    """A loop that is not takes ten times as long as the memory."""
    sources = {}
    monkeypatch.setattr(build, "function", lambda header, instance, *types: sources.update({instance: header}))
    for name, types, options in instances(dtype):
        cpu._pass(name, types, 0, **options)
    for by_column in (False, True):
        cpu._add_noise.__wrapped__(FLOATS[dtype], FLOATS[dtype], by_column)
    for instance, header in sources.items():
        source = tmp_path / "pass.cpp"
        source.write_text(build.source(header, instance))
        command = [*build.compiler(), *build.FLAGS, f"-I{build.HEADERS}", "-fopt-info-vec-optimized"]
        run = subprocess.run([*command, "-c", "pass.cpp"], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        vectorized = {line.split(": ")[0].split("/")[-1] for line in run.stderr.splitlines() if "vectorized" in line}
        coded = "coded = 1" in instance or (header == "perturb" and "uint8_t" in instance)
        for line in hot_loops(header, "masked = 1" in instance, coded):
            assert any(place.startswith(f"{line}:") for place in vectorized), f"{instance}: {line}"


def hot_loops(header: str, masked: bool, coded: bool) -> list[str]:
    """Files and lines of the loops that must be vectors."""
    name = "norm.h" if header == "gap" else f"{header}.h"
    lines = (build.HEADERS / name).read_text().splitlines()
    wanted = "int lane = 0; lane < 32" if name == "norm.h" else "IN_ANY_ORDER"
    found = [i + 1 + (wanted == "IN_ANY_ORDER") for i, line in enumerate(lines) if wanted in line]
    assert found
    if header == "perturb":
        found = found[:1] if masked or coded else found[1:]
    if header == "descend":
        # Codes of a group, its elements; elements without groups.
        found = found[:2] if coded else found[2:]
    return [f"{name}:{line}" for line in found]
