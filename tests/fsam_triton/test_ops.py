"""The operators on CPU: registration, C++ against the reference, machines without compiler or Triton."""

import inspect
import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fsam_triton import FSAM, FisherMask, ops
from fsam_triton.kernels import passes_cpu, reference
from tests.kernel_cases import FLOATS, assert_same_bits, label, ordinary, random_mask

COEF = torch.tensor([1.0, 1e-3, 0.1, 0.999, 0.001, 1e-2, 1.3, 1e-8, 0x9ABCDEF0], dtype=torch.float64)
# Times other, scale of the next perturbation, its key, rate of the average; and the probability minus 1/2.
MORE = torch.tensor([-0.7, -0.3, 0x12345678, 0.1], dtype=torch.float64)
PROBABILITY = torch.tensor([-0.25], dtype=torch.float64)
# Whole words, a ragged end, and enough for several threads.
LENGTHS = [4096, 5003, (1 << 20) + 16384]

pytestmark = pytest.mark.skipif(ops.interpreting(), reason="the interpreter takes the place of the compiled passes")


def perturb_arguments(
    n: int, dtype: str, backup=True, masked=False, adaptive=False, stochastic=True, zero_grad=False, random=False
):
    weight, grad = ordinary(n, FLOATS[dtype], seed=n), ordinary(n, FLOATS[dtype], seed=n + 1)
    copy = torch.full_like(weight, 7.0) if backup else None
    mask = random_mask(n, seed=n + 2) if masked else None
    coef = torch.cat((COEF[[5, 8]], PROBABILITY)) if random else COEF[[5, 8]]
    return weight, grad, copy, mask, coef, adaptive, stochastic, zero_grad, random


def adamw_arguments(
    n,
    dtype,
    keep="backup",
    anchor=False,
    amsgrad=False,
    stochastic=True,
    zero_grad=False,
    other=False,
    orthogonal=False,
    perturb=False,
    ema=False,
):
    weight, grad = ordinary(n, FLOATS[dtype], seed=n), ordinary(n, FLOATS[dtype], seed=n + 1)
    state = torch.float32 if keep == "master" or dtype == "fp16" else FLOATS[dtype]
    exp_avg = ordinary(n, state, seed=n + 2, scale=0.1)
    exp_avg_sq, top = (ordinary(n, torch.float64, seed=n + i).square().to(state) for i in (3, 4))
    return (
        weight,
        grad,
        exp_avg,
        exp_avg_sq,
        top if amsgrad else None,
        weight * 0.999 if keep == "backup" else None,
        weight.float() * 1.001 if keep == "master" else None,
        ordinary(n, FLOATS[dtype], seed=n + 5) if anchor else None,
        torch.cat((COEF, MORE)) if other or orthogonal or perturb or ema else COEF,
        stochastic,
        zero_grad,
        ordinary(n, FLOATS[dtype], seed=n + 6) if other or orthogonal else None,
        orthogonal,
        perturb,
        ordinary(n, reference.compute_dtype(weight.dtype), seed=n + 7) if ema else None,
    )


PERTURB = [
    {"dtype": "fp32"},
    {"dtype": "fp32", "masked": True, "adaptive": True, "zero_grad": True},
    {"dtype": "fp64", "adaptive": True},
    {"dtype": "bf16"},
    {"dtype": "bf16", "masked": True, "stochastic": False},
    {"dtype": "bf16", "backup": False, "masked": True},
    {"dtype": "fp16", "adaptive": True, "masked": True},
    {"dtype": "fp32", "random": True},
    {"dtype": "bf16", "random": True},
    {"dtype": "bf16", "masked": True, "random": True},
]
ADAMW = [
    {"dtype": "fp32"},
    {"dtype": "fp32", "keep": "nothing", "anchor": True, "zero_grad": True},
    {"dtype": "fp64", "amsgrad": True},
    {"dtype": "bf16"},
    {"dtype": "bf16", "keep": "nothing", "anchor": True, "amsgrad": True},
    {"dtype": "bf16", "keep": "master", "anchor": True, "amsgrad": True},
    {"dtype": "fp16", "anchor": True},
    {"dtype": "fp16", "keep": "master", "stochastic": False},
    {"dtype": "fp32", "other": True},
    {"dtype": "fp32", "orthogonal": True},
    {"dtype": "bf16", "orthogonal": True},
    {"dtype": "fp32", "perturb": True},
    {"dtype": "bf16", "perturb": True},
    {"dtype": "bf16", "keep": "master", "perturb": True},
    {"dtype": "fp16", "other": True, "perturb": True, "stochastic": False},
    {"dtype": "fp32", "ema": True},
    {"dtype": "bf16", "keep": "nothing", "ema": True, "stochastic": False},
    {"dtype": "bf16", "keep": "master", "perturb": True, "ema": True},
    {"dtype": "bf16", "perturb": True, "ema": True},
]


def copies(args: tuple) -> tuple:
    return tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)


def one_of_each_operator(n: int = 100) -> dict[str, tuple[Callable, tuple]]:
    values, number = ordinary(n, torch.float32, seed=1), torch.tensor(3, dtype=torch.int64)
    words = torch.zeros((n + 31) // 32, dtype=torch.int32)
    return {
        "grad_norm_sq": (ops.grad_norm_sq, (values, values * 2, random_mask(n, seed=1))),
        "surrogate_gap": (ops.surrogate_gap, (values, ordinary(n, torch.bfloat16, seed=2))),
        "perturb_": (ops.perturb_, perturb_arguments(n, "bf16", masked=True)),
        "perturb_random_": (ops.perturb_, perturb_arguments(n, "bf16", random=True)),
        "perturb_without_backup_": (ops.perturb_, perturb_arguments(n, "bf16", backup=False)),
        "adamw_l2sp_": (ops.adamw_l2sp_, adamw_arguments(n, "bf16", anchor=True, amsgrad=True)),
        "adamw_l2sp_with_master_": (ops.adamw_l2sp_, adamw_arguments(n, "bf16", keep="master")),
        "adamw_l2sp_with_second_gradient_": (ops.adamw_l2sp_, adamw_arguments(n, "fp32", other=True)),
        "adamw_l2sp_keeping_orthogonal_": (ops.adamw_l2sp_, adamw_arguments(n, "fp32", orthogonal=True)),
        "adamw_l2sp_perturbing_": (ops.adamw_l2sp_, adamw_arguments(n, "bf16", perturb=True)),
        "adamw_l2sp_averaging_": (ops.adamw_l2sp_, adamw_arguments(n, "bf16", ema=True)),
        "digit_histogram": (ops.digit_histogram, (values, number * 0, 23, 8, False)),
        "write_mask_": (ops.write_mask_, (words, values, number, number, False)),
    }


OPERATORS = list(one_of_each_operator())


# -- registration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_keeps_the_rules_of_torch_library(name):
    operator, args = one_of_each_operator()[name]
    torch.library.opcheck(operator, args)


@pytest.mark.parametrize("name", OPERATORS)
def test_fake_result_has_the_shape_and_dtype_of_the_real_one(name):
    operator, args = one_of_each_operator()[name]
    real = operator(*copies(args))
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args))
    assert (real is None) == (fake is None)
    if real is not None:
        assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)


def test_operators_can_be_compiled_into_a_users_graph():
    def step(weight, grad, backup, coef):
        norm = ops.grad_norm_sq(grad, None, None).sqrt()
        ops.perturb_(weight, grad, backup, None, torch.stack((coef / norm, coef)), False, False, False)
        return weight * 2, norm

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        weight, grad, backup, *_ = perturb_arguments(4096, "fp32")
        results.append((*function(weight, grad, backup, COEF[0]), weight, backup))
    for eager, compiled in zip(*results, strict=True):
        assert_same_bits(compiled.reshape(-1), eager.reshape(-1))


# -- numbers -----------------------------------------------------------------------------------------------------------


def exact_square_root(tensor: Tensor) -> Tensor:
    return torch.from_numpy(np.sqrt(tensor.numpy()))


def assert_equal_after(operator, function, args: tuple, monkeypatch) -> None:
    """All tensors hold the same bits after the operator and after the reference.

    Both do the same IEEE operations, none of them fused; only eager PyTorch's square root may be wrong in the last bit.
    """
    compiled, eager = copies(args), copies(args)
    operator(*compiled)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "sqrt", exact_square_root)
        function(*eager)
    for name, actual, expected in zip(inspect.signature(function).parameters, compiled, eager, strict=False):
        if isinstance(actual, Tensor):
            assert_same_bits(actual, expected, name)


@pytest.mark.parametrize("case", PERTURB, ids=label)
def test_compiled_perturbation_equals_the_reference_to_the_bit(case, monkeypatch):
    for n in LENGTHS:
        assert_equal_after(ops.perturb_, reference.perturb_, perturb_arguments(n, **case), monkeypatch)


@pytest.mark.parametrize("case", ADAMW, ids=label)
def test_compiled_update_equals_the_reference_to_the_bit(case, monkeypatch):
    for n in LENGTHS:
        assert_equal_after(ops.adamw_l2sp_, reference.adamw_l2sp_, adamw_arguments(n, **case), monkeypatch)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_all_16_bit_numbers_are_rounded_as_the_reference_rounds_them(dtype, monkeypatch):
    """Weights, gradients and moments are every number there is, infinities and NaN with all their bits too."""

    def every(seed: int) -> Tensor:
        order = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(seed))
        return order.to(torch.int16).view(FLOATS[dtype])

    for seed, scale in enumerate((1e-6, 0.3, 300.0)):
        coef = torch.tensor([scale, 0x9ABCDEF0 + seed], dtype=torch.float64)
        args = (every(seed), every(seed + 10), every(0), None, coef, False, True, False)
        assert_equal_after(ops.perturb_, reference.perturb_, args, monkeypatch)
        args = (every(seed), every(seed + 10), every(seed + 20), every(seed + 30).abs(), None, None, None, None)
        assert_equal_after(ops.adamw_l2sp_, reference.adamw_l2sp_, (*args, COEF, True, False), monkeypatch)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_compiled_passes_treat_non_finite_gradients_as_the_reference_does(bad, monkeypatch):
    for dtype in ("fp32", "bf16"):
        for operator, function, args in (
            (ops.perturb_, reference.perturb_, perturb_arguments(4096, dtype)),
            (ops.adamw_l2sp_, reference.adamw_l2sp_, adamw_arguments(4096, dtype)),
        ):
            args[1][::7] = bad
            assert_equal_after(operator, function, args, monkeypatch)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("what", ["gradients", "factors"])
def test_compiled_modes_treat_what_is_not_finite_as_the_reference_does(what, bad, monkeypatch):
    for case in ({"other": True}, {"orthogonal": True}, {"perturb": True}):
        args = adamw_arguments(4096, "fp32", **case)
        coef, other_grad = args[8], args[11]
        if what == "factors":
            coef[9:11] = bad
        else:
            args[1][::7] = bad
            if other_grad is not None:
                other_grad[::5] = bad
        assert_equal_after(ops.adamw_l2sp_, reference.adamw_l2sp_, args, monkeypatch)


def test_skipped_update_perturbs_anew_in_compiled_code_too(monkeypatch):
    for case in ({"dtype": "fp32"}, {"dtype": "bf16"}, {"dtype": "bf16", "keep": "master"}):
        args = adamw_arguments(4096, **case, perturb=True)
        args[8][0] = math.nan
        clean = copies(args)
        assert_equal_after(ops.adamw_l2sp_, reference.adamw_l2sp_, args, monkeypatch)
        ops.adamw_l2sp_(*args)
        for i in (2, 3, 5, 6):
            if args[i] is not None:
                assert_same_bits(args[i], clean[i])


@pytest.mark.parametrize("n", [1, 31, 32, 33, 64])
def test_few_elements_are_no_special_case(n, monkeypatch):
    args = perturb_arguments(n, "fp32", masked=True, adaptive=True, zero_grad=True)
    assert_equal_after(ops.perturb_, reference.perturb_, args, monkeypatch)


def test_no_elements_are_no_work():
    for operator, args in (
        (ops.perturb_, perturb_arguments(0, "fp32")),
        (ops.perturb_, perturb_arguments(0, "bf16", masked=True)),
        (ops.adamw_l2sp_, adamw_arguments(0, "bf16")),
        (ops.perturb_, perturb_arguments(0, "fp32", random=True)),
        (ops.adamw_l2sp_, adamw_arguments(0, "bf16", perturb=True)),
    ):
        operator(*args)
    assert ops.surrogate_gap(torch.empty(0), torch.empty(0)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("case", [case for case in PERTURB if case.get("backup", True)], ids=label)
def test_backup_holds_the_weights_from_before(case):
    for n in LENGTHS:
        weight, grad, backup, *rest = perturb_arguments(n, **case)
        before = weight.clone()
        ops.perturb_(weight, grad, backup, *rest)
        assert_same_bits(backup, before)
        assert not torch.equal(weight, before)


@pytest.mark.parametrize(
    ("dtype", "adaptive", "masked"),
    [
        ("fp32", False, False),
        ("fp32", True, True),
        ("bf16", False, False),
        ("fp16", False, True),
        ("fp64", True, False),
    ],
)
def test_compiled_norm_is_right_to_the_rounding_of_a_chunks_sum(dtype, adaptive, masked):
    """The bound of kernels/test_grad_norm.py: one rounding for each addition within a chunk, three for a term."""
    for n in (3 * reference.CHUNK, 3 * reference.CHUNK + 777, 5):
        grad, weight = ordinary(n, FLOATS[dtype], seed=n), ordinary(n, FLOATS[dtype], seed=n + 1) if adaptive else None
        mask = random_mask(n, seed=n + 2) if masked else None
        terms = (grad.double() if weight is None else grad.double() * weight.double()).square()
        exact = math.fsum((terms if mask is None else terms[reference.unpack_mask(mask, terms)]).tolist())
        u = torch.finfo(reference.compute_dtype(grad.dtype)).eps / 2
        assert abs(float(ops.grad_norm_sq(grad, weight, mask)) - exact) <= (reference.CHUNK + 6) * u * exact


@pytest.mark.parametrize("types", [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"), ("fp64", "fp32")], ids=str)
def test_compiled_surrogate_gap_is_right_to_the_rounding_of_a_chunks_sums(types):
    """The bound of kernels/test_surrogate_gap.py: one rounding of every term for each addition and for its product."""
    u = torch.finfo(torch.float64 if "fp64" in types else torch.float32).eps / 2
    for n in (3 * reference.CHUNK, 3 * reference.CHUNK + 777, 5):
        first, second = (ordinary(n, FLOATS[name], seed=n + i) for i, name in enumerate(types))
        a, b = first.double(), second.double()
        for actual, terms in zip(ops.surrogate_gap(first, second).tolist(), (a * b, a * a, b * b), strict=True):
            exact, size = math.fsum(terms.tolist()), math.fsum(terms.abs().tolist())
            assert abs(actual - exact) <= (reference.CHUNK + 6) * u * size


@pytest.mark.parametrize("place", [0, 2 * 16384 + 7])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_compiled_surrogate_gap_shows_what_is_not_finite(bad, place):
    first, second = (ordinary(2 * reference.CHUNK + 777, torch.float32, seed) for seed in (1, 2))
    first[place] = bad
    assert ops.surrogate_gap(first, second).isfinite().tolist() == [False, False, True]


@pytest.fixture
def threads():
    """`threads(n)` sets the number of PyTorch's threads, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_norms_do_not_depend_on_the_number_of_threads(threads):
    grad, norms = ordinary(40 * reference.CHUNK + 777, torch.float32, seed=1), set()
    for n in (1, 2, 3):
        threads(n)
        norms.add((float(ops.grad_norm_sq(grad, None, None)), *ops.surrogate_gap(grad, grad * 0.7).tolist()))
    assert len(norms) == 1


def test_stochastic_rounding_does_not_depend_on_the_number_of_threads(threads):
    results = []
    for n in (1, 2):
        threads(n)
        args = perturb_arguments(LENGTHS[-1], "bf16")
        ops.perturb_(*args)
        results.append(args[0])
    assert_same_bits(*results)


def test_parts_of_a_buffer_with_keys_of_their_own_draw_what_the_whole_draws():
    n, cuts = LENGTHS[-1], [0, 64, 5024, (1 << 20) - 32, LENGTHS[-1]]
    for operator, make, case, keys in (
        (ops.perturb_, perturb_arguments, {"random": True}, [1]),
        (ops.adamw_l2sp_, adamw_arguments, {"perturb": True}, [8, 11]),
    ):
        whole, parts = (make(n, "bf16", **case) for _ in range(2))
        operator(*whole)
        for start, stop in itertools.pairwise(cuts):
            part = [arg[start:stop] if isinstance(arg, Tensor) and len(arg) == n else arg for arg in parts]
            coef = next(i for i, arg in enumerate(part) if isinstance(arg, Tensor) and arg.dtype == torch.float64)
            part[coef] = part[coef].clone()
            for key in keys:
                part[coef][key] = reference.key_at(part[coef][key], start)
            operator(*part)
        for one, other in zip(whole, parts, strict=True):
            if isinstance(one, Tensor):
                assert_same_bits(other, one)


# -- compilation ------------------------------------------------------------------------------------------------------


def train(dtype=torch.float32, mask=None, lrs=(1e-3,) * 3, rho=0.05) -> list[float]:
    """Weights after some steps on the sum of cubes."""
    weight = torch.nn.Parameter((torch.arange(1, 601) / 100).view(20, 30).to(dtype))
    optimizer = FSAM([("weight", weight)], rho=rho, mask=mask, stochastic_rounding=False)

    def closure():
        optimizer.zero_grad()
        loss = weight.pow(3).sum()
        loss.backward()
        return loss

    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step(closure)
        optimizer.param_groups[0]["rho"] *= 0.9
    return weight.detach().double().flatten().tolist()


@pytest.mark.parametrize("mask", [None, FisherMask(0.5)], ids=["sam", "fisher_sam"])
def test_schedules_of_lr_and_rho_compile_nothing(mask, monkeypatch):
    train(mask=mask, lrs=[1e-3])
    monkeypatch.delattr(passes_cpu, "library")
    train(mask=mask, lrs=[1e-3 / (1 + step) for step in range(5)])


# -- machines without -------------------------------------------------------------------------------------------------


def in_new_process(code: str, **env: str) -> dict:
    """What the code printed last, as JSON."""
    program = f"{inspect.getsource(train)}\n{code}"
    header = "import json, sys, warnings\nimport torch\nfrom fsam_triton import FSAM, FisherMask\n"
    if "BLOCKED" in env:
        header = f"import sys\nsys.modules[{env.pop('BLOCKED')!r}] = None\n" + header
    command = [sys.executable, "-c", header + program]
    run = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def assert_few_ulps_apart(actual: list[float], expected: list[float], steps: int) -> None:
    """Three steps of at most 1e-3: one rounding of the weight each, and PyTorch's square root of an update."""
    tolerance = 2 * steps * torch.finfo(torch.float32).eps
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=tolerance, atol=1e-9)


def test_without_a_compiler_it_warns_once_and_computes_the_same(tmp_path):
    code = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    result = {"sam": train(), "fisher_sam": train(mask=FisherMask(0.5)), "bf16": train(torch.bfloat16)}
texts = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
print(json.dumps({**result, "warnings": texts}))
"""
    missing = str(tmp_path / "no_such_compiler")
    result = in_new_process(code, CXX=missing, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert len(result["warnings"]) == 1
    assert "C++ compiler" in result["warnings"][0]
    assert_few_ulps_apart(result["sam"], train(), steps=3)
    assert_few_ulps_apart(result["fisher_sam"], train(mask=FisherMask(0.5)), steps=3)


def test_with_a_compiler_it_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train()


def test_without_triton_it_computes_the_same():
    code = """
try:
    import triton
except ImportError:
    print(json.dumps({"sam": train(), "fisher_sam": train(mask=FisherMask(0.5))}))
"""
    result = in_new_process(code, BLOCKED="triton")
    assert result == {"sam": train(), "fisher_sam": train(mask=FisherMask(0.5))}


def test_importing_it_does_not_import_the_triton_kernels():
    code = "print(json.dumps([name for name in sys.modules if name.startswith('fsam_triton.kernels.')]))"
    without_triton = ("cpp", "passes_cpu", "reference", "sparse_cpu", "topk_mask_cpu")
    assert sorted(in_new_process(code)) == [f"fsam_triton.kernels.{name}" for name in without_triton]
