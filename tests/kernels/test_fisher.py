"""The linear layer's Fisher kernel: in the interpreter and the reference against fp64; compiled ahead of time."""

import re

import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import reference
from tests.kernels.cases import FLOATS, ordinary, pairwise

pytest.importorskip("fsam_triton.kernels.fisher")

from bench.kernel_builds import FISHER, fisher_build
from bench.machine_code import NVIDIA, accesses, assembly, resources
from bench.machine_code import TARGETS as TARGET_LIMITS
from fsam_triton.kernels import fisher

# Whole tiles; ragged ends in every direction; less than a tile; one position, one sample; nothing.
SHAPES = [(2, 32, 64, 128), (3, 37, 70, 65), (2, 5, 3, 2), (4, 1, 66, 5), (1, 16, 64, 64), (0, 4, 3, 2), (2, 0, 3, 2)]


@pytest.fixture(params=["kernel", "reference"])
def linear_fisher_(request, interpret):
    """`linear_fisher_(fisher, inputs, output_grads, absolute)`, as the kernel and as the reference do it."""
    if request.param == "reference":
        return reference.linear_fisher_

    def launch(total, *args):
        # What is written in the other process is seen here, for tensors in shared memory.
        interpret(fisher.linear_fisher_, total.share_memory_(), *args)

    return launch


def arguments(shape: tuple, dtype: torch.dtype, make=ordinary) -> tuple[Tensor, Tensor, Tensor]:
    batch, positions, n_out, n_in = shape
    total = make(n_out * n_in, torch.float64, seed=1).square().view(n_out, n_in)
    inputs = make(batch * positions * n_in, dtype, seed=2).view(batch, positions, n_in)
    grads = make(batch * positions * n_out, dtype, seed=3).view(batch, positions, n_out)
    return total.to(reference.compute_dtype(dtype)), inputs, grads


def by_hand(total: Tensor, inputs: Tensor, grads: Tensor, absolute: bool) -> Tensor:
    """The formula, one sample after the other, in fp64."""
    total = total.double()
    for a, d in zip(inputs.double(), grads.double(), strict=True):
        g = d.T @ a
        total = total + (g.abs() if absolute else g.square())
    return total


def integers(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """-2 to 2: gradients of 37 positions are at most 148, their squares below 2**15, all sums exact in fp32."""
    return torch.randint(-2, 3, (n,), generator=torch.Generator().manual_seed(seed)).to(dtype)


CASES = pairwise(dtype=list(FLOATS), shape=SHAPES, absolute=[False, True])


def name_of(case: dict) -> str:
    return "-".join((case["dtype"], "x".join(map(str, case["shape"])), "abs" if case["absolute"] else "square"))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_sum_of_integers_is_exact(linear_fisher_, case):
    total, inputs, grads = arguments(case["shape"], FLOATS[case["dtype"]], integers)
    expected = by_hand(total, inputs, grads, case["absolute"])
    linear_fisher_(total, inputs, grads, case["absolute"])
    assert torch.equal(total.double(), expected)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_error_is_that_of_the_sums(linear_fisher_, case):
    """A dot product of T terms is off by at most T u sum |d a|; a square then by twice that times |g|, and one more
    rounding each for the square and for the addition to the total."""
    total, inputs, grads = arguments(case["shape"], FLOATS[case["dtype"]])
    batch, positions = inputs.shape[:2]
    u = torch.finfo(total.dtype).eps / 2
    expected = by_hand(total, inputs, grads, case["absolute"])
    g = torch.bmm(grads.double().mT, inputs.double()).abs()
    off = (positions + 1) * u * torch.bmm(grads.double().mT.abs(), inputs.double().abs())
    bound = (off if case["absolute"] else 2 * g * off + off * off).sum(0) + (batch + 2) * u * expected
    linear_fisher_(total, inputs, grads, case["absolute"])
    assert bool(((total.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gradients_of_16_bit_inputs_are_not_rounded_to_16_bits(linear_fisher_, dtype):
    total = torch.zeros(1, 1)
    inputs, grads = torch.ones(1, 2, 1, dtype=dtype), torch.tensor([[[1.0], [2.0**-12]]], dtype=dtype)
    linear_fisher_(total, inputs, grads, True)
    assert float(total) == 1 + 2.0**-12


def test_samples_do_not_cancel(linear_fisher_):
    """The square of a mean would be zero."""
    total = torch.zeros(2, 3)
    linear_fisher_(total, torch.ones(2, 2, 3), torch.tensor([1.0, -1.0])[:, None, None].expand(2, 2, 2), False)
    assert torch.equal(total, torch.full((2, 3), 8.0))


def test_transposed_views_are_read_right(linear_fisher_):
    """Patches of a convolution come as such."""
    total, inputs, grads = arguments((2, 5, 3, 4), torch.float32, integers)
    expected = by_hand(total, inputs, grads, False)
    linear_fisher_(total, inputs.mT.contiguous().mT, grads.mT.contiguous().mT, False)
    assert torch.equal(total.double(), expected)


def test_nan_shows_in_its_row_alone(linear_fisher_):
    total, inputs, grads = arguments((2, 5, 3, 4), torch.float32)
    grads[1, 2, 1] = float("nan")
    linear_fisher_(total, inputs, grads, False)
    assert torch.equal(total.isnan().any(1), torch.tensor([False, True, False]))


# -- ahead of time -----------------------------------------------------------------------------------------------------

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
SMALL = {dtype: fisher_build(dtype, 384, 1536) for dtype in ("fp32", "bf16")}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("one", FISHER, ids=lambda one: one.name)
def test_nothing_is_spilled(one, target):
    assert resources(one, target).spills == 0


@pytest.mark.parametrize(("target", "instruction"), {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}.items())
@pytest.mark.parametrize("shape", [(384, 1536), (4096, 4096)])
def test_16_bit_products_run_on_tensor_cores(shape, target, instruction):
    assert instruction in assembly(fisher_build("bf16", *shape), target)


@pytest.mark.parametrize("target", NVIDIA)
def test_fp32_products_are_fused_and_not_of_fewer_bits(target):
    """No tensor core, so no TF32; and more fused multiplications than plain ones."""
    sass = assembly(SMALL["fp32"], target)
    assert re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", sass) == []
    assert len(re.findall(r"\bFFMA2?\b", sass)) > 10 * len(re.findall(r"\bFMUL2?\b", sass))


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("dtype", SMALL)
def test_rows_of_whole_vectors_are_read_16_bytes_at_a_time(dtype, target):
    assert set(accesses(SMALL[dtype], target).loads) == {16}


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_is_within_that_of_each_processor(target):
    for one in FISHER:
        assert resources(one, target).shared <= TARGET_LIMITS[target].block_shared << 10
