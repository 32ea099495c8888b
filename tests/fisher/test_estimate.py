"""estimate_fisher: which samples it takes; what it leaves as it was; errors."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fsam_triton import FishMask
from fsam_triton.fisher import estimate_fisher
from tests.fisher.cases import (
    MODELS,
    Cnn,
    assert_equal_but_for_rounding,
    bert,
    by_loop,
    estimate,
    images,
    inputs,
    made,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# -- samples -----------------------------------------------------------------------------------------------------------


def test_last_batch_is_cut_and_no_other_is_asked_for():
    model, batches = made(bert), MODELS["bert"][1]

    def loader():
        yield from batches[:2]
        raise AssertionError("one batch too many")

    cut = [batches[0], {key: value[:2] for key, value in batches[1].items()}]
    actual = estimate_fisher(model, loader(), 6, progress=False)
    assert_equal_but_for_rounding(actual, by_loop(model, cut))


def test_fewer_samples_than_asked_for_are_used_with_a_warning():
    model, batches = made(Cnn, torch.float32), MODELS["cnn"][1]
    with pytest.warns(UserWarning, match="9 samples instead of 100"):
        actual = estimate_fisher(model, batches, 100, progress=False)
    expected = estimate(model, batches)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_as_many_samples_as_asked_for_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate(made(Cnn, torch.float32), MODELS["cnn"][1])


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar_counts_samples(progress, capsys):
    estimate_fisher(made(Cnn, torch.float32), MODELS["cnn"][1], 7, progress=progress)
    assert ("7/7" in capsys.readouterr().err) == progress


# -- biases that no training moves -------------------------------------------------------------------------------------


def normalised(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def test_bias_in_front_of_batch_norm_has_information_in_eval_mode_alone():
    model, batch = made(lambda: normalised(nn.BatchNorm2d(8)), torch.float32), images(9, 12, 1)
    fisher = estimate(model, [batch])
    assert fisher["0.bias"].max() > fisher["0.weight"].mean()
    model[0].bias.requires_grad_(False)
    frozen = estimate(model, [batch])
    assert "0.bias" not in frozen
    assert all(torch.equal(frozen[name], fisher[name]) for name in frozen)
    model[0].bias.requires_grad_(True)
    F.cross_entropy(model.train()(batch[0]), batch[1]).backward()
    # Sums over 9 x 10 x 10 positions.
    assert model[0].bias.grad.abs().max() < 900 * torch.finfo(torch.float32).eps * model[0].weight.grad.abs().max()


def test_bias_that_has_no_influence_scores_less_than_what_is_worth_training():
    model = made(lambda: normalised(nn.GroupNorm(8, 8)), torch.float32)
    fisher = estimate(model, [images(9, 12, 1)])
    largest = max(float(score.max()) for score in fisher.values())
    assert fisher["0.bias"].max() < torch.finfo(torch.float32).eps ** 2 * largest
    # Exactly as many weights as have another score are selected: the bias is none of them.
    others = sum(int((score > 0).sum()) for name, score in fisher.items() if name != "0.bias")
    total = sum(score.numel() for score in fisher.values())
    assert FishMask.from_scores(fisher, (others + 0.5) / total).density_by_tensor()["0.bias"] == 0.0


# -- what stays as it was ----------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["bert", "raw"])
def test_modes_gradients_and_hooks_stay_as_they_were(name, fails):
    make, batches = MODELS[name]
    model, called = made(make, torch.float32).train(), []
    frozen = next(module for module in model.modules() if isinstance(module, nn.Linear))
    frozen.eval()
    params = dict(model.named_parameters())
    for i, p in enumerate(params.values()):
        p.grad = torch.full_like(p, 7.0) if i % 2 else None
        p.register_hook(lambda g: called.append("tensor hook"))
        p.register_post_accumulate_grad_hook(lambda p: called.append("post-accumulate hook"))
    next(iter(params.values())).requires_grad_(name == "raw")
    before = {name: (p, p.detach().clone(), p.grad, p.requires_grad) for name, p in params.items()}
    modes = [module.training for module in model.modules()]

    def loader():
        assert not any(module.training for module in model.modules())
        yield batches[0]
        if fails:
            raise Boom

    if fails:
        with pytest.raises(Boom):
            estimate_fisher(model, loader(), 100, progress=False)
    else:
        estimate_fisher(model, loader(), 4, progress=False)
    assert [module.training for module in model.modules()] == modes
    for key, p in model.named_parameters():
        same, value, grad, requires_grad = before[key]
        assert p is same
        assert torch.equal(p, value)
        assert p.grad is grad
        assert grad is None or bool((grad == 7.0).all())
        assert p.requires_grad == requires_grad
    assert not called


def test_dropout_is_off():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    first, second = (estimate(model, [inputs(5, 4)]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_may_be_off_around_the_call():
    model, batch = made(bert), MODELS["bert"][1][0]
    with torch.no_grad():
        actual = estimate(model, [batch])
    assert_equal_but_for_rounding(actual, by_loop(model, [batch]))


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 1.5}, "num_samples"),
        ({"num_samples": True}, "num_samples"),
        ({"kind": "labels"}, "kind"),
        ({"statistic": "mean"}, "statistic"),
        ({"loss_fn": 3}, "loss_fn"),
        ({"loss_fn": F.cross_entropy, "kind": "expect"}, "loss_fn"),
        ({"loss_fn": F.cross_entropy}, "loss_fn"),
        ({"dataloader": []}, "dataloader"),
        ({"dataloader": [torch.ones(2, 4)]}, "dataloader"),
        ({"dataloader": [{"input": torch.ones(2, 4)}]}, "dataloader"),
        ({"dataloader": [({}, {})]}, "dataloader"),
        ({"model": nn.Linear(4, 3).requires_grad_(False)}, "model"),
        ({"model": nn.LazyLinear(3)}, "model"),
        ({"model": nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1)))}, "model"),
    ],
)
def test_bad_argument_is_named(options, name):
    arguments = {"model": nn.Linear(4, 3), "dataloader": [inputs(4, 4)], "num_samples": 2} | options
    with pytest.raises(ValueError, match=f"Invalid {name}"):
        estimate_fisher(**arguments, progress=False)


def test_error_of_the_model_is_the_users_to_see():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        estimate(nn.Linear(4, 3), [inputs(4, 5)])


def test_mean_is_finite_for_confident_predictions():
    """Probabilities of zero have a logarithm of -inf in places, and a weight of zero."""
    model = nn.Linear(2, 2)
    model.weight.data = torch.tensor([[1e3, 0.0], [0.0, 1e3]])
    actual = estimate(model, [(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))], kind="expect")
    assert all(math.isfinite(value) for value in actual["weight"].flatten())
