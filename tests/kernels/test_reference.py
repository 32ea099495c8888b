"""The reference passes against the formulas of the papers in exact arithmetic, and the packing of masks."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import reference, spec
from tests.kernels.cases import FLOATS, assert_same_bits, ordinary, random_mask
from tests.kernels.launches import HYPER
from tests.kernels.one_tensor import descended, perturbed, tensors_of

wide = pytest.mark.parametrize("name", ["fp32", "fp64"])
narrow = pytest.mark.parametrize("name", ["bf16", "fp16"])
N = 200


def exact(values: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in values.double().tolist()]


def roundings(count: int, name: str) -> Fraction:
    """The relative error of that many roundings, at the most."""
    return count * Fraction(torch.finfo(FLOATS[name]).eps) / 2


def stored(value: float, name: str) -> Fraction:
    """A coefficient as a pass gets it."""
    return exact(torch.tensor([value], dtype=torch.float64).to(FLOATS[name]))[0]


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 31, 32, 33, 1000, 4096])
def test_packed_mask_unpacks_to_the_same_bits(n):
    bits = ordinary(n, torch.float32, seed=n) > 0
    assert torch.equal(reference.unpack_mask(reference.pack_mask(bits), torch.empty(n)), bits)


def test_bit_i_of_a_word_belongs_to_element_i():
    bits = torch.zeros(64, dtype=torch.bool)
    bits[[0, 5, 31, 33]] = True
    assert reference.pack_mask(bits).tolist() == [(1 << 0) + (1 << 5) - (1 << 31), 1 << 1]


def test_bits_after_the_end_are_packed_as_zeros():
    assert reference.pack_mask(torch.ones(35, dtype=torch.bool)).tolist() == [-1, 0b111]


# -- perturbation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
@wide
def test_perturbation_is_the_published_one(name, adaptive, masked):
    """eps takes three roundings at the most (product, square, product), the sum one more."""
    weight, grad = (ordinary(N, FLOATS[name], seed) for seed in (1, 2))
    mask = random_mask(N, seed=3) if masked else None
    moves = reference.unpack_mask(mask, weight).tolist() if masked else [True] * N
    after, _ = perturbed(reference, weight, grad, 0.0123, mask=mask, adaptive=adaptive)
    for new, w, g, moved in zip(exact(after), exact(weight), exact(grad), moves, strict=True):
        eps = stored(0.0123, name) * g * (w * w if adaptive else 1) * moved
        assert abs(new - (w + eps)) <= roundings(3, name) * abs(eps) + roundings(1, name) * abs(w + eps) * 2


@narrow
def test_stochastic_perturbation_realises_the_intended_one_on_average(name):
    """Steps far below half an ulp: n roundings whose steps are at most s have a mean within 5 s / (2 sqrt(n))."""
    n, move = 1 << 16, 2.0**-14
    ones = torch.ones(n, dtype=FLOATS[name])
    after, _ = perturbed(reference, ones, ones, move, key=12345)
    step = torch.finfo(FLOATS[name]).eps
    assert abs(float(after.double().mean() - 1) - move) <= 5 * step / (2 * math.sqrt(n)) + step * 2.0**-13


@narrow
def test_perturbation_rounded_to_nearest_loses_small_steps(name):
    ones = torch.ones(100, dtype=FLOATS[name])
    assert (perturbed(reference, ones, ones, 2.0**-14, stochastic=False)[0] == 1.0).all()


# -- update ------------------------------------------------------------------------------------------------------------


def hyper(name: str, rule: str) -> dict[str, Fraction]:
    return {column: stored(HYPER[column], name) for column in spec.DESCEND[rule]}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("anchored", [False, True])
@wide
def test_adamw_is_the_published_one(name, anchored, amsgrad):
    """With u half an ulp of 1: the moments take four roundings of their terms, the quotient at most twelve, the decay
    and the sum three of the weight."""
    before = tensors_of(name, N, make=ordinary, anchor=anchored, all_lanes=amsgrad)
    for lane in ("exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])):
        before[lane] += 0.01
    after = descended(reference, before)
    old, new = ({k: exact(t) for k, t in tensors.items() if t is not None} for tensors in (before, after))
    c, u = hyper(name, "adamw"), roundings(1, name)
    for i in range(N):
        g, w, m0 = c["factor"] * old["grad"][i], old["clean"][i], old["exp_avg"][i]
        m, v = m0 + c["new1"] * (g - m0), c["beta2"] * old["exp_avg_sq"][i] + c["new2"] * g * g
        pull = c["decay"] * (w - (old["anchor"][i] if anchored else 0))
        largest = max(v, old["max_exp_avg_sq"][i]) if amsgrad else v
        root = Fraction(math.sqrt(largest))
        update = c["step_size"] * m / (root * c["inv_sqrt_bias2"] + c["eps"])
        terms = abs(m0) + abs(g)
        assert abs(new["exp_avg"][i] - m) <= 4 * u * terms
        assert abs(new["exp_avg_sq"][i] - v) <= 5 * u * v
        if amsgrad:
            assert abs(new["max_exp_avg_sq"][i] - largest) <= 5 * u * largest
        error = 12 * abs(update) + 4 * c["step_size"] * terms / root + 3 * (abs(w) + abs(update)) + 3 * abs(pull)
        assert abs(new["weight"][i] - (w - pull - update)) <= u * error


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("has_momentum", [False, True])
@wide
def test_sgd_is_the_published_one(name, has_momentum, anchored):
    """Each product and each sum takes a rounding of its terms: at most eight of the terms' magnitudes."""
    before = tensors_of(name, N, "sgd", make=ordinary, anchor=anchored)
    before["momentum_buffer"] = before["momentum_buffer"] if has_momentum else None
    after = descended(reference, before, "sgd")
    old, new = ({k: exact(t) for k, t in tensors.items() if t is not None} for tensors in (before, after))
    c, u = hyper(name, "sgd"), roundings(1, name)
    for i in range(N):
        g, w, a = c["factor"] * old["grad"][i], old["clean"][i], old["anchor"][i] if anchored else 0
        d, size = g + c["decay"] * (w - a), abs(g) + c["decay"] * (abs(w) + abs(a))
        step, terms = d, size
        if has_momentum:
            buffer = c["momentum"] * old["momentum_buffer"][i] + c["new"] * d
            held = c["momentum"] * abs(old["momentum_buffer"][i]) + c["new"] * size
            assert abs(new["momentum_buffer"][i] - buffer) <= 6 * u * held
            step, terms = c["of_grad"] * d + c["of_buffer"] * buffer, c["of_grad"] * size + c["of_buffer"] * held
        assert abs(new["weight"][i] - (w - c["lr"] * step)) <= u * (10 * c["lr"] * terms + abs(w) + abs(c["lr"] * step))


@pytest.mark.parametrize("anchored", [False, True])
@wide
def test_lion_is_the_published_one(name, anchored):
    """The sign is that of the exact sum wherever that is larger than its rounding errors."""
    before = tensors_of(name, N, "lion", make=ordinary, anchor=anchored)
    after = descended(reference, before, "lion")
    old, new = ({k: exact(t) for k, t in tensors.items() if t is not None} for tensors in (before, after))
    c, u = hyper(name, "lion"), roundings(1, name)
    for i in range(N):
        g, w, m0 = c["factor"] * old["grad"][i], old["clean"][i], old["exp_avg"][i]
        inner, m = c["beta1"] * m0 + c["new1"] * g, m0 + c["new2"] * (g - m0)
        assert abs(inner) > 5 * u * (abs(m0) + abs(g))
        assert abs(new["exp_avg"][i] - m) <= 4 * u * (abs(m0) + abs(g))
        pull = c["decay"] * (w - (old["anchor"][i] if anchored else 0))
        expected = w - pull - c["lr"] * (1 if inner > 0 else -1)
        assert abs(new["weight"][i] - expected) <= 4 * u * (abs(w) + 2 * abs(pull) + c["lr"])


@wide
def test_update_with_a_second_gradient_is_that_with_the_sum(name):
    """Times 1 - beta1, six roundings of a gradient's term (coefficient, product, sum, difference, two of the product
    with 1 - beta1) and the last three of the old moment; one of the new moment. One more each for products of errors.
    """
    before = tensors_of(name, N, make=ordinary, other=True)
    after, c = descended(reference, before), hyper(name, "adamw")
    columns = (exact(before[column]) for column in ("exp_avg", "grad", "other"))
    for new, m, g, o in zip(exact(after["exp_avg"]), *columns, strict=True):
        terms = abs(c["factor"] * g) + abs(c["other"] * o)
        expected = m + c["new1"] * (c["factor"] * g + c["other"] * o - m)
        error = c["new1"] * (7 * terms + 4 * abs(m)) + 2 * abs(expected)
        assert abs(new - expected) <= roundings(1, name) * error


@narrow
def test_stochastic_update_realises_the_intended_one_on_average(name):
    """As for the perturbation: steps of Lion far below half an ulp."""
    n, move = 1 << 16, 2.0**-14
    tensors = tensors_of(name, n, "lion", make=ordinary)
    ones = torch.ones(n, dtype=FLOATS[name])
    tensors |= {"clean": ones, "grad": ones, "exp_avg": torch.zeros_like(tensors["exp_avg"])}
    after = descended(reference, tensors, "lion", lr=move, decay=0.0)["weight"]
    step = torch.finfo(FLOATS[name]).eps
    assert abs(float(1 - after.double().mean()) - move) <= 5 * step / (2 * math.sqrt(n)) + step * 2.0**-13


# -- rounding and noise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remainder", [torch.int16, torch.int32], ids=["bf16", "fp16"])
def test_master_weights_that_are_split_are_combined_to_the_same(remainder):
    """But for half a step upwards in bf16, of which one fp32 step is lost: 1 in 2**16 numbers."""
    dtype = torch.bfloat16 if remainder == torch.int16 else torch.float16
    master = torch.cat([ordinary(1 << 16, torch.float32, seed=1) * scale for scale in (1e-9, 1e-4, 1.0, 300.0, 1e5)])
    weight, lost = torch.empty_like(master, dtype=dtype), torch.empty_like(master, dtype=remainder)
    reference.split(master, weight, lost)
    assert_same_bits(weight, master.to(dtype))
    back = reference.combine(weight, lost)
    exact_back = lost != 32767 if remainder == torch.int16 else torch.ones_like(lost, dtype=torch.bool)
    assert_same_bits(back[exact_back], master[exact_back])
    off = (back[~exact_back].view(torch.int32) - master[~exact_back].view(torch.int32)).abs()
    assert ((off == 0) | (off == 1)).all()


def test_compute_type_is_fp64_for_fp64_alone():
    types = {name: reference.compute_dtype(dtype) for name, dtype in FLOATS.items()}
    assert types == {name: torch.float64 if name == "fp64" else torch.float32 for name in FLOATS}


def test_uniform_takes_odd_multiples_of_a_spacing_equally_often():
    values = reference.uniform(torch.arange(-32768, 32768, dtype=torch.int32))
    assert values.dtype == torch.float32
    odd = torch.arange(-32767, 32768, 2, dtype=torch.float64) * 2.0**-16
    assert torch.equal(values.double(), odd.repeat_interleave(2))
