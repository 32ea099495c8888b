"""MomentumSAM in training loops with all that stands around an optimizer: edits, averages, schedulers, autocast."""

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrizations, vector_to_parameters
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from fsam_triton import MomentumSAM
from tests.optim.momentum import PRECISIONS, Objective, backward, pair, perturbed_weights, same, train
from tests.optim.nets import Net, X, clean_copy, loss_of, optimizer_of
from tests.optim.nets import train as train_net
from tests.optim.nets import trained as trained_net
from tests.problem import small_model
from tests.training import weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


# -- edits between steps -----------------------------------------------------------------------------------------------


def clamp(model, optimizer):
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.5, 0.5)


def clamp_data(model, optimizer):
    for p in model.parameters():
        p.data.clamp_(-0.5, 0.5)


def limit_norm(model, optimizer):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.renorm(2, 0, 0.5) if p.dim() > 1 else p)


def load(model, optimizer):
    model.load_state_dict(small_model(next(model.parameters()).dtype, seed=4).state_dict())


def load_by_assignment_of_data(model, optimizer):
    for p, other in zip(
        model.parameters(), small_model(next(model.parameters()).dtype, seed=4).parameters(), strict=True
    ):
        p.data = other.data


def broadcast(model, optimizer):
    vector_to_parameters(torch.full((568,), 0.25, dtype=next(model.parameters()).dtype), model.parameters())


def edit_group(model, optimizer):
    for group in optimizer.param_groups:
        with torch.no_grad():
            torch._foreach_mul_(group["params"], 0.5)


EDITS = [clamp, clamp_data, limit_norm, load, load_by_assignment_of_data, broadcast, edit_group]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(("dtype", "kwargs"), PRECISIONS.values(), ids=PRECISIONS.keys())
def test_edits_between_steps_are_of_clean_weights_and_stay(dtype, kwargs, edit):
    model, optimizer = pair(dtype, **kwargs)
    for step in range(3):
        train(model, optimizer, 1, start=step)
        before = weights_of(model)
        edit(model, optimizer)
        edited = weights_of(model)
        assert not same(edited, before)
        for _ in range(2):
            assert not same(perturbed_weights(model, optimizer), edited)
            assert same(model.parameters(), edited)


@pytest.mark.parametrize("edit", EDITS)
def test_step_after_an_edit_starts_from_the_edited_weights(edit):
    """Without decay it moves each weight by at most lr * |m_hat| / sqrt(v_hat), 3 * lr here."""
    model, optimizer = pair(weight_decay=0.0, lr=1e-3)
    for step in range(3):
        train(model, optimizer, 1, start=step)
        edit(model, optimizer)
        edited = weights_of(model)
    train(model, optimizer, 1, start=3)
    for p, before in zip(model.parameters(), edited, strict=True):
        moved = (p.detach() - before).abs()
        assert float(moved.max()) <= 3e-3
        assert float(moved.min()) > 0


def test_clipping_of_gradients_between_backward_pass_and_step_is_max_grad_norm():
    (model, optimizer), (twin, other) = pair(), pair(max_grad_norm=0.5)
    for step in range(4):
        backward(model, optimizer, step)
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        train(twin, other, 1, start=step)
    # Two norms of 568 terms differ by at most 568 eps, and so do, times lr, four of Adam's quotients of about 1.
    for p, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=0, atol=4 * 0.01 * 600 * torch.finfo(torch.float32).eps)


# -- averages ----------------------------------------------------------------------------------------------------------


def test_averaged_model_averages_clean_weights():
    model, optimizer = pair(rho=4.0)
    averaged, seen = AveragedModel(model), []
    for step in range(4):
        train(model, optimizer, 1, start=step)
        averaged.update_parameters(model)
        seen.append(weights_of(model))
    for p, *weights in zip(averaged.parameters(), *seen, strict=True):
        torch.testing.assert_close(p.detach(), torch.stack(weights).mean(0))
    train(averaged.module, MomentumSAM(averaged.module.parameters()), 1)


def test_exponential_average_of_torch_is_that_of_ema_decay():
    model, optimizer = pair(ema_decay=0.9)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)
    for step in range(5):
        train(model, optimizer, 1, start=step)
        averaged.update_parameters(model)
    clean = weights_of(model)
    with optimizer.ema_weights():
        for p, expected in zip(model.parameters(), averaged.module.parameters(), strict=True):
            torch.testing.assert_close(p, expected)
        Objective(model)(5)
        assert not optimizer.perturbed
        with pytest.raises(RuntimeError, match="ema_weights"):
            optimizer.perturb()
    assert same(model.parameters(), clean)
    Objective(model)(5)
    with pytest.raises(RuntimeError, match=r"restore\(\)"), optimizer.ema_weights():
        pass
    optimizer.step()


def test_update_of_batch_norm_after_training_sees_clean_weights_and_leaves_them():
    """`update_bn` evaluates the model in train mode, without gradients."""
    model, twin = (nn.Sequential(Net(), nn.BatchNorm1d(3)) for _ in range(2))
    optimizer = optimizer_of(model)
    train_net(model, optimizer)
    twin.load_state_dict(model.state_dict())
    before = weights_of(model)
    for m in (model, twin):
        update_bn([X, X + 1], m)
    assert not optimizer.perturbed
    assert same(model.parameters(), before)
    assert torch.equal(model[1].running_mean, twin[1].running_mean)
    assert torch.equal(model[1].running_var, twin[1].running_var)


# -- schedulers --------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "one_cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=20),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=10),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[3],
    ),
    "swa": lambda optimizer: SWALR(optimizer, swa_lr=0.001, anneal_epochs=5),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["float", "tensor"])
def test_schedulers_of_torch_set_the_rate_of_each_step(make, lr):
    """As the same rates set by hand do; a scheduler that cycles betas sets these, too."""
    (model, optimizer), (twin, other) = pair(lr=lr), pair()
    scheduler = make(optimizer)
    for step in range(10):
        other.param_groups[0].update({name: optimizer.param_groups[0][name] for name in ("betas",)})
        other.param_groups[0]["lr"] = float(optimizer.param_groups[0]["lr"])
        train(model, optimizer, 1, start=step)
        train(twin, other, 1, start=step)
        scheduler.step()
    assert same(model.parameters(), twin.parameters())


def test_reduce_on_plateau_sees_the_loss_and_reduces_the_rate():
    model, optimizer = pair()
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for step in range(3):
        train(model, optimizer, 1, start=step)
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0001)


# -- autocast and parametrizations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perturbation_within_autocast_is_that_outside_and_its_cache_does_not_keep_weights(dtype):
    (model, optimizer), (twin, other) = ((net := Net(dtype=dtype), optimizer_of(net)) for _ in range(2))
    x = X.to(dtype)
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            # The cache then has copies of the clean weights.
            with torch.no_grad():
                model(x)
            model(x).float().square().mean().backward()
        other.perturb()
        assert same(model.parameters(), twin.parameters())
        with torch.autocast("cpu", torch.bfloat16):
            twin(x).float().square().mean().backward()
        for o in (optimizer, other):
            o.step()
            o.zero_grad()
    assert same(model.parameters(), twin.parameters())


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights_are_perturbed_and_clean_after_the_step(parametrize):
    model, twin = Net(), Net()
    for m in (model, twin):
        torch.manual_seed(0)
        parametrize(m.head)
    optimizer, other = optimizer_of(model), optimizer_of(twin)
    for _ in range(4):
        loss_of(model).backward()
        other.perturb()
        loss_of(twin).backward()
        for o in (optimizer, other):
            o.step()
            o.zero_grad()
        assert same(model.state_dict().values(), twin.state_dict().values())
        assert not optimizer.perturbed


def test_evaluation_at_the_end_of_each_epoch_in_eval_mode_of_model_and_optimizer():
    (model, optimizer), (twin, straight) = trained_net(0), trained_net(0)
    for _ in range(3):
        train_net(model, optimizer, 2)
        optimizer.eval()
        model.eval()
        with torch.inference_mode():
            assert torch.equal(model(X), clean_copy(model)(X))
        model.train()
        optimizer.train()
    train_net(twin, straight, 6)
    assert same(model.parameters(), twin.parameters())
