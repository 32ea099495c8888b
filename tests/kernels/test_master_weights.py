"""Master weights of 16-bit parameters: what a remainder makes of weights that somebody else has written."""

import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import cpu, reference, spec
from tests.kernels.cases import bits, ordinary
from tests.kernels.launches import assert_as_the_reference, descend, descend_launch

REMAINDERS = {torch.bfloat16: torch.int16, torch.float16: torch.int32}
every_dtype = pytest.mark.parametrize("dtype", REMAINDERS, ids=str)


@every_dtype
def test_master_weights_are_their_rounding_and_what_it_lost(dtype):
    master = ordinary(4096, torch.float32, seed=1)
    weight = torch.empty(4096, dtype=dtype)
    remainder = torch.empty(4096, dtype=REMAINDERS[dtype])
    reference.split(master, weight, remainder)
    assert torch.equal(weight, master.to(dtype))
    # Half a step upwards is kept as one fp32 step less.
    assert (bits(reference.combine(weight, remainder)) - bits(master)).abs().max() <= 1


@every_dtype
@pytest.mark.parametrize("written", [0.0, -0.0, 1.0, -0.75, 2.0**-126, float("inf"), -float("inf")])
def test_number_written_over_a_weight_is_the_master_to_within_half_a_step(dtype, written):
    """Bits below those of a zero are those of a NaN."""
    remainder = torch.arange(-(2**15), 2**15, 7).to(REMAINDERS[dtype])
    weight = torch.full(remainder.shape, written).to(dtype)
    master = reference.combine(weight, remainder)
    if weight[0].isinf():
        # The largest numbers are rounded to it.
        assert (master.abs() >= torch.finfo(dtype).max).all()
        assert torch.equal(master.sign(), weight.float().sign())
    else:
        step = max(float(weight[0].abs()) * torch.finfo(dtype).eps, torch.finfo(torch.float32).tiny)
        assert (master - weight.float()).abs().max() <= step / 2


def zeros(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Of both signs."""
    out = torch.zeros(n, dtype=dtype)
    out[1::2] *= -1.0
    return out


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("rule", list(spec.DESCEND))
def test_compiled_update_of_weights_that_were_set_to_zero_is_the_references(rule, dtype):
    launch = descend_launch(rule, dtype, state="fp32", lanes="all", remainder="32bit", make=zeros)
    after = assert_as_the_reference(descend, launch, cpu)
    assert all(tensor.isfinite().all() for tensor in after.columns["weight"].tensors())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_kernels_update_of_weights_that_were_set_to_zero_is_the_references(dtype, kernels):
    shapes = [(3, 5), (1,), (0,), (1030,), (7,), (32,), (64,), (9, 33)]
    launch = descend_launch("adamw", dtype, state="fp32", lanes="all", remainder="32bit", make=zeros, shapes=shapes)
    after = assert_as_the_reference(descend, launch, kernels)
    assert all(tensor.isfinite().all() for tensor in after.columns["weight"].tensors())
