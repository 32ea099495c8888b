"""estimate_fisher against a loop over samples, in all types."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsam_triton import ops
from fsam_triton.fisher import estimate_fisher
from fsam_triton.kernels import reference
from tests.fisher.cases import (
    KINDS,
    MODELS,
    STATISTICS,
    assert_equal_but_for_rounding,
    by_loop,
    cast,
    estimate,
    inputs,
    made,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_estimate_in_fp64_equals_a_loop_over_samples(name, kind, statistic, slow_names):
    make, batches = MODELS[name]
    model, batches = made(make), [cast(batch, torch.float64) for batch in batches]
    actual = estimate(model, batches, kind=kind, statistic=statistic)
    assert_equal_but_for_rounding(actual, by_loop(model, batches, kind, statistic), statistic)
    assert slow_names == ({"matrix"} if name == "raw" else set())
    assert {value.dtype for value in actual.values()} == {torch.float64}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_estimate_in_fp32_is_as_exact_as_a_loop_over_samples(name, kind):
    """Within 1e-5 of the loop in fp64, and four times that loop's largest rounding error in fp32 for each tensor: two
    ways of adding differ by the errors of both, and twice as much is left to the order of their additions."""
    make, batches = MODELS[name]
    model = made(make, torch.float32)
    actual, loop = estimate(model, batches, kind=kind), by_loop(model, batches, kind)
    exact = by_loop(made(make), [cast(batch, torch.float64) for batch in batches], kind)
    noise = {name: 4 * float((loop[name].sqrt() - exact[name].sqrt()).abs().max()) for name in exact}
    assert_equal_but_for_rounding(actual, exact, noise=noise)
    assert {value.dtype for value in actual.values()} == {torch.float32}
    assert {name: value.shape for name, value in actual.items()} == {n: p.shape for n, p in model.named_parameters()}


def relative(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of the tensors' relative errors, of those that are not zero except for rounding."""
    return max(
        float((actual[name].double().sqrt() - value.sqrt()).norm() / value.sqrt().norm())
        for name, value in expected.items()
        if "key.bias" not in name
    )


@pytest.mark.parametrize("way", ["bf16 weights", "bf16 autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_estimate_in_bf16_is_near_that_in_fp64(name, way):
    """About ten operations from the loss to each gradient, each rounding to 8 bits."""
    make, batches = MODELS[name]
    exact = by_loop(made(make), [cast(batch, torch.float64) for batch in batches])
    if way == "bf16 weights":
        actual = estimate(made(make, torch.bfloat16), [cast(batch, torch.bfloat16) for batch in batches])
    else:
        with torch.autocast("cpu", torch.bfloat16):
            actual = estimate(made(make, torch.float32), batches)
    assert relative(actual, exact) < 0.1
    assert {value.dtype for value in actual.values()} == {torch.float32}


def test_squares_of_bf16_gradients_are_summed_in_fp32():
    """4096 samples of one gradient: in bf16 the sum would stop at 256 of them."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    batches = [(torch.ones(64, 1, dtype=torch.bfloat16), torch.zeros(64))] * 64
    actual = estimate(model, batches, loss_fn=lambda logits, labels: logits[:, 0])
    assert actual["weight"].item() == 1.0


def test_gradients_of_a_batch_do_not_cancel():
    """The square of the batch's mean gradient is zero here."""
    model = nn.Linear(1, 1, bias=False)
    batch = (torch.tensor([[1.0], [-1.0]]), torch.zeros(2))
    assert estimate(model, [batch], loss_fn=lambda logits, labels: logits[:, 0])["weight"].item() == 1.0


def test_expectation_does_not_look_at_labels():
    make, batches = MODELS["bert"]
    model = made(make)
    unlabelled = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    actual = estimate_fisher(model, unlabelled, 12, kind="expect", progress=False)
    assert_equal_but_for_rounding(actual, by_loop(model, batches, "expect"))


def test_loss_function_takes_the_place_of_cross_entropy():
    make, batches = MODELS["cnn"]
    model, batches = made(make), [cast(batch, torch.float64) for batch in batches]

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits - F.one_hot(labels, 3)).square().sum(-1)

    expected = by_loop(model, batches, loss_fn=loss)
    assert_equal_but_for_rounding(estimate(model, batches, loss_fn=loss), expected)


def test_only_parameters_that_require_a_gradient_are_estimated(slow_names):
    make, batches = MODELS["bert"]
    model = made(make)
    for name, p in model.named_parameters():
        p.requires_grad_("layer.1.attention" in name or "classifier" in name)
    assert_equal_but_for_rounding(estimate(model, batches), by_loop(model, batches))
    assert not slow_names


def test_unused_parameter_has_no_information():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    model.forward = lambda x: model["used"](x)
    assert not estimate(model, [inputs(4, 3)])["unused.weight"].any()


def layer(batch: int, positions: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 5), (batch, positions, 5), (batch, positions, 6)
    total, a, d = (torch.randn(shape, generator=generator) for shape in shapes)
    return total.square(), a.to(dtype), d.to(dtype)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("used", [[4, 0, 7], [1, 1, 1], [7, 7, 7], [0, 0, 0]], ids=str)
def test_positions_without_a_gradient_change_nothing(used, absolute):
    total, a, d = layer(3, 7)
    for i, n in enumerate(used):
        d[i, n:] = 0.0
    expected = total.double()
    reference.linear_fisher_(expected, a.double(), d.double(), absolute)
    ops.linear_fisher_(total, a, d, absolute)
    # Seven products and additions for a gradient of numbers of about one, three squares or sizes.
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-5)
