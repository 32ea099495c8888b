"""Weights are rounded as torchao rounds them, and come back to the bit."""

import pytest
import torch

from fsam_triton import ArgumentError
from fsam_triton.analysis import round_to_nearest, rounded_weights
from fsam_triton.analysis.rounding import linear_weights
from tests.analysis.cases import TiedHead


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("columns", [128, 100])
def test_weight_moves_by_at_most_half_a_step_of_its_group(bits, columns):
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    left = round_to_nearest(weight, bits)
    for group, own in zip(weight.split(64, 1), left.split(64, 1), strict=True):
        step = group.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        # The largest weight is itself; 2**-20 for the roundings of fp32.
        assert ((group - own).abs() <= step * (0.5 + 2**-20)).all()
        assert all(len(row.unique()) <= 2**bits - 1 for row in own)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_rounding_is_torchaos(bits):
    pytest.importorskip("torchao")
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    weight = torch.randn(5, 192, generator=torch.Generator().manual_seed(1))
    limits = {"quant_min": 1 - 2 ** (bits - 1), "quant_max": 2 ** (bits - 1) - 1}
    scale, zero = choose_qparams_affine(weight, MappingType.SYMMETRIC, (1, 64), torch.int8, **limits)
    codes = quantize_affine(weight, (1, 64), scale, zero, torch.int8, **limits)
    expected = dequantize_affine(codes, (1, 64), scale, zero, torch.int8, **limits)
    # torchao multiplies by the scale's reciprocal, so that a weight midway between two values may go either way.
    far = (round_to_nearest(weight, bits) - expected).abs() > 2**-20
    step = scale.repeat_interleave(64, dim=1)
    midway = ((weight / step).abs() % 1 - 0.5).abs() < 2**-16
    assert not (far & ~midway).any()


def test_zeros_stay_zeros():
    assert (round_to_nearest(torch.zeros(2, 64), 4) == 0).all()


def test_only_linear_weights_are_rounded_and_come_back_to_the_bit():
    model = TiedHead()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert [weight.data_ptr() for weight in linear_weights(model)] == [model.linear.weight.data_ptr()]
    with rounded_weights(model, 4):
        changed = {name for name, p in model.named_parameters() if not p.equal(before[name])}
        assert model.linear.weight.equal(round_to_nearest(before["linear.weight"], 4))
    assert changed == {"linear.weight"}
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


def test_weights_come_back_after_an_exception():
    model = TiedHead()
    before = model.linear.weight.clone()
    with pytest.raises(KeyError), rounded_weights(model, 3):
        raise KeyError
    assert model.linear.weight.equal(before)


@pytest.mark.parametrize("bits", [1, 9, 4.0])
def test_bits_out_of_range_are_refused_before_a_weight_is_touched(bits):
    model = TiedHead()
    before = model.linear.weight.clone()
    with pytest.raises(ArgumentError, match=r"Invalid bits: .*from 2 to 8"), rounded_weights(model, bits):
        pass
    assert model.linear.weight.equal(before)


def test_model_without_linear_layers_is_refused():
    with pytest.raises(ArgumentError, match="Invalid model: 'Embedding'"), rounded_weights(torch.nn.Embedding(2, 2)):
        pass


def test_gpt2s_transposed_layers_are_rounded_by_output():
    transformers = pytest.importorskip("transformers")
    layer = transformers.pytorch_utils.Conv1D(3, 64)
    before = layer.weight.detach().clone()
    with rounded_weights(layer, 3):
        assert layer.weight.equal(round_to_nearest(before.T, 3).T)
    assert layer.weight.equal(before)
