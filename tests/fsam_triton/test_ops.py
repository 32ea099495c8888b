"""The operators on CPU: registration, compiled passes against the reference, machines without compiler or Triton."""

import inspect
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
from fsam_triton.kernels import reference
from tests.kernel_cases import FLOATS, assert_same_bits, label, ordinary, random_mask

COEF = torch.tensor([1.0, 1e-3, 0.1, 0.999, 0.001, 1e-2, 1.3, 1e-8, 0x9ABCDEF0], dtype=torch.float64)
# Whole words, a ragged end, and more than the noise of one go.
LENGTHS = [4096, 5003, (1 << 20) + 16384]

pytestmark = pytest.mark.skipif(ops.interpreting(), reason="the interpreter takes the place of the compiled passes")


def perturb_arguments(n: int, dtype: str, backup=True, masked=False, adaptive=False, stochastic=True, zero_grad=False):
    weight, grad = ordinary(n, FLOATS[dtype], seed=n), ordinary(n, FLOATS[dtype], seed=n + 1)
    copy = torch.full_like(weight, 7.0) if backup else None
    mask = random_mask(n, seed=n + 2) if masked else None
    return weight, grad, copy, mask, COEF[[5, 8]], adaptive, stochastic, zero_grad


def adamw_arguments(n, dtype, keep="backup", anchor=False, amsgrad=False, stochastic=True, zero_grad=False):
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
        COEF,
        stochastic,
        zero_grad,
    )


PERTURB = [
    {"dtype": "fp32"},
    {"dtype": "fp32", "masked": True, "adaptive": True, "zero_grad": True},
    {"dtype": "fp64", "adaptive": True},
    {"dtype": "bf16"},
    {"dtype": "bf16", "masked": True, "stochastic": False},
    {"dtype": "bf16", "backup": False, "masked": True},
    {"dtype": "fp16", "adaptive": True, "masked": True},
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
]


def copies(args: tuple) -> tuple:
    return tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)


def one_of_each_operator(n: int = 100) -> dict[str, tuple[Callable, tuple]]:
    values, number = ordinary(n, torch.float32, seed=1), torch.tensor(3, dtype=torch.int64)
    words = torch.zeros((n + 31) // 32, dtype=torch.int32)
    return {
        "grad_norm_sq": (ops.grad_norm_sq, (values, values * 2, random_mask(n, seed=1))),
        "perturb_": (ops.perturb_, perturb_arguments(n, "bf16", masked=True)),
        "perturb_without_backup_": (ops.perturb_, perturb_arguments(n, "bf16", backup=False)),
        "adamw_l2sp_": (ops.adamw_l2sp_, adamw_arguments(n, "bf16", anchor=True, amsgrad=True)),
        "adamw_l2sp_with_master_": (ops.adamw_l2sp_, adamw_arguments(n, "bf16", keep="master")),
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

    Both do the same IEEE operations, none of them fused; only PyTorch's own square root may be wrong in the last bit.
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


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_compiled_passes_treat_non_finite_gradients_as_the_reference_does(bad, monkeypatch):
    for dtype in ("fp32", "bf16"):
        for operator, function, args in (
            (ops.perturb_, reference.perturb_, perturb_arguments(4096, dtype)),
            (ops.adamw_l2sp_, reference.adamw_l2sp_, adamw_arguments(4096, dtype)),
        ):
            args[1][::7] = bad
            assert_equal_after(operator, function, args, monkeypatch)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 64])
def test_few_elements_are_no_special_case(n, monkeypatch):
    args = perturb_arguments(n, "fp32", masked=True, adaptive=True, zero_grad=True)
    assert_equal_after(ops.perturb_, reference.perturb_, args, monkeypatch)


def test_no_elements_are_no_work():
    for operator, args in (
        (ops.perturb_, perturb_arguments(0, "fp32")),
        (ops.perturb_, perturb_arguments(0, "bf16", masked=True)),
        (ops.adamw_l2sp_, adamw_arguments(0, "bf16")),
    ):
        operator(*args)


@pytest.mark.parametrize("case", [case for case in PERTURB if case.get("backup", True)], ids=label)
def test_backup_holds_the_weights_from_before(case):
    """torch.compile writes mutated arguments back in an order of its own, so this is not a matter of course."""
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


@pytest.fixture
def threads():
    """`threads(n)` sets the number of PyTorch's threads, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_norm_does_not_depend_on_the_number_of_threads(threads):
    grad, norms = ordinary(40 * reference.CHUNK + 777, torch.float32, seed=1), set()
    for n in (1, 2, 3):
        threads(n)
        norms.add(float(ops.grad_norm_sq(grad, None, None)))
    assert len(norms) == 1


def test_stochastic_rounding_does_not_depend_on_the_number_of_threads(threads):
    results = []
    for n in (1, 2):
        threads(n)
        args = perturb_arguments(LENGTHS[-1], "bf16")
        ops.perturb_(*args)
        results.append(args[0])
    assert_same_bits(*results)


# -- recompilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "make", "case"),
    [
        (ops.perturb_, perturb_arguments, {"dtype": "fp32"}),
        (ops.perturb_, perturb_arguments, {"dtype": "fp32", "masked": True, "adaptive": True, "zero_grad": True}),
        (ops.perturb_, perturb_arguments, {"dtype": "bf16"}),
        (ops.adamw_l2sp_, adamw_arguments, {"dtype": "fp32"}),
        (ops.adamw_l2sp_, adamw_arguments, {"dtype": "bf16"}),
    ],
    ids=lambda value: label(value) if isinstance(value, dict) else getattr(value, "__name__", ""),
)
def test_new_coefficients_and_lengths_compile_nothing(operator, make, case):
    operator(*make(2048, **case))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n, factor in ((4096, 0.5), (16384, 2.0), (3 * 16384, 0.0), (2 << 20, 1.5)):
            args = tuple(
                arg * factor if isinstance(arg, Tensor) and arg.numel() in (2, 9) else arg for arg in make(n, **case)
            )
            operator(*args)


def test_parts_of_buffers_compile_nothing():
    """A step in which some parameters have no gradient updates slices, at any offset and of any length."""
    flat, coefficients = torch.zeros(5, 4096), torch.ones(4, 9, dtype=torch.float64)

    def update(start, stop, run):
        parts = [buffer[start:stop] for buffer in flat.unbind()]
        ops.adamw_l2sp_(*parts[:4], None, parts[4], None, None, coefficients[run], False, False)

    update(0, 4096, 0)
    with torch.compiler.set_stance("fail_on_recompile"):
        for run, (start, stop) in enumerate(((0, 32), (32, 4096), (64, 96), (4000, 4096))):
            update(start, stop, run)


def test_norms_of_other_lengths_compile_nothing():
    ops.grad_norm_sq(torch.ones(2 * reference.CHUNK), None, None)
    with torch.compiler.set_stance("fail_on_recompile"):
        for chunks in (3, 64):
            ops.grad_norm_sq(torch.ones(chunks * reference.CHUNK + 5), None, None)


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
def test_schedules_of_lr_and_rho_compile_nothing(mask):
    train(mask=mask, lrs=[1e-3])
    with torch.compiler.set_stance("fail_on_recompile"):
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


def test_importing_it_does_not_import_the_kernels():
    code = "print(json.dumps([name for name in sys.modules if name.startswith('fsam_triton.kernels.')]))"
    assert in_new_process(code) == ["fsam_triton.kernels.reference"]
