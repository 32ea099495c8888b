"""SAM around any optimizer: the numbers, what it shares with its base, and what it perturbs."""

import pytest
import torch
from torch import nn

from fsam_triton import FSAM, SAM, ArgumentError, FisherMask, MomentumSAM, Schedule
from tests.fp64_optimizers import ReferenceFSAM, ReferenceMask, global_norm
from tests.optim.bases import every_base, matrices_of
from tests.optim.variants import loss_of
from tests.problem import Problem, assert_weights_close, small_model
from tests.training import assert_same_bits, closure_of, several_groups, train, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(params: list[nn.Parameter], base, rho: float, step: int, adaptive: bool = False) -> None:
    """SAM as the paper has it, twenty lines of it around any optimizer."""
    clean = [p.detach().clone() for p in params]
    gradients = Problem().gradients(params, step)
    scales = [p.detach().abs() if adaptive else torch.ones_like(p) for p in params]
    norm = sum(float((s * g).double().square().sum()) for s, g in zip(scales, gradients, strict=True)) ** 0.5
    with torch.no_grad():
        for p, g, s in zip(params, gradients, scales, strict=True):
            p += rho / (norm + 1e-12) * (s * s * g)
    second = Problem().gradients(params, step)
    with torch.no_grad():
        for p, w, g in zip(params, clean, second, strict=True):
            p.copy_(w)
            p.grad = g
    base.step()


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@every_base
def test_ten_steps_equal_sam_written_by_hand_around_the_same_base(base, adaptive):
    model, twin = matrices_of(torch.float64), matrices_of(torch.float64)
    optimizer, plain = SAM(base(model.parameters()), rho=0.5, adaptive=adaptive), base(twin.parameters())
    train(model, optimizer, 10)
    for step in range(10):
        by_hand(list(twin.parameters()), plain, 0.5, step, adaptive)
    # The bases' quotients are no worse conditioned than AdamW's, and are computed by the same code on both sides.
    assert_weights_close(model.parameters(), twin.parameters(), 10, 0.01)


@pytest.mark.parametrize("kwargs", [{}, {"adaptive": True}, {"mask": FisherMask(0.3, interval=5)}], ids=str)
def test_around_adamw_it_is_the_reference_and_fsam(kwargs):
    model, twin = small_model(torch.float64), small_model(torch.float64)
    expected = {**kwargs, "mask": ReferenceMask(0.3, interval=5)} if "mask" in kwargs else kwargs
    reference = ReferenceFSAM(several_groups(model), **expected)
    optimizer = SAM(torch.optim.AdamW(several_groups(model)), **kwargs)
    fused = FSAM(several_groups(twin), **kwargs)
    for step in range(20):
        reference.step(lambda weights, step=step: Problem().gradients(weights, step))
    train(model, optimizer, 20)
    train(twin, fused, 20)
    assert_weights_close(model.parameters(), reference.weights, 20, 0.01)
    assert_weights_close(model.parameters(), twin.parameters(), 20, 0.01)


@pytest.mark.parametrize("way", ["perturb", "first_step"])
@every_base
def test_protocols_give_the_same_bits(base, way):
    model, twin = matrices_of(), matrices_of()
    optimizer = SAM(base(model.parameters()), rho=0.5)
    halves = (optimizer.perturb, optimizer.step) if way == "perturb" else (optimizer.first_step, optimizer.second_step)
    for step in range(5):
        for finish in halves:
            Problem().loss(model.parameters(), step).backward()
            finish()
            optimizer.zero_grad()
    train(twin, SAM(base(twin.parameters()), rho=0.5), 5)
    assert_same_bits(model, twin)


@every_base
def test_without_a_perturbation_or_with_a_rho_of_zero_it_is_the_base_to_the_bit(base):
    models = [matrices_of() for _ in range(3)]
    optimizers = [base(models[0].parameters()), SAM(base(models[1].parameters()), rho=0.0)]
    unperturbed = SAM(base(models[2].parameters()))
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=False):
            train(model, optimizer, 1, start=step)
        closure_of(models[2], unperturbed, step)()
        unperturbed.step()
    assert_same_bits(models[1], models[0])
    assert_same_bits(models[2], models[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_restore_is_bit_exact(dtype):
    model = small_model(dtype)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.01), rho=1.0, adaptive=True)
    closure_of(model, optimizer, 0)()
    optimizer.perturb()
    assert optimizer.perturbed
    assert not torch.equal(model["dense"].weight, small_model(dtype)["dense"].weight)
    optimizer.restore()
    assert not optimizer.perturbed
    assert_same_bits(model, small_model(dtype))


def test_groups_and_state_are_the_bases():
    model = small_model()
    base = torch.optim.Adagrad(several_groups(model))
    optimizer = SAM(base, rho=0.1)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    # Those of groups that say so go before.
    assert [group["rho"] for group in base.param_groups] == [0.2, 0.1, 1.0]
    train(model, optimizer, 2)
    assert optimizer.state[model["dense"].weight]["step"] == 2


def test_learning_rate_scheduler_of_either_steers_the_steps():
    models = [small_model(), small_model()]
    for model, of_base in zip(models, (True, False), strict=True):
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = SAM(base, rho=0.5)
        scheduler = torch.optim.lr_scheduler.StepLR(base if of_base else optimizer, 2, gamma=0.1)
        for step in range(6):
            train(model, optimizer, 1, start=step)
            scheduler.step()
        assert base.param_groups[0]["lr"] == pytest.approx(1e-4)
    assert_same_bits(*models)


def test_schedule_says_which_steps_are_sharp():
    model, calls = small_model(), []
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), schedule=Schedule(every=3))
    for step in range(6):
        closure = closure_of(model, optimizer, step)
        optimizer.step(lambda closure=closure, step=step: calls.append(step) or closure())
    assert calls == [0, 0, 1, 2, 3, 3, 4, 5]


def test_rho_that_follows_the_learning_rate_is_in_proportion_to_it():
    model = small_model(torch.float64)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SAM(base, rho=0.5, schedule=Schedule(rho_follows="lr"))
    for lr in (0.1, 0.05, 0.025, 0.4):
        base.param_groups[0]["lr"] = lr
        before = weights_of(model)
        closure_of(model, optimizer, 0)()
        optimizer.perturb()
        moved = global_norm(p.detach() - w for p, w in zip(model.parameters(), before, strict=True))
        assert moved == pytest.approx(0.5 * min(lr / 0.1, 1.0), rel=1e-12)
        optimizer.restore()


def test_group_added_later_is_perturbed_and_updated():
    model, twin = small_model(), small_model()
    optimizer = SAM(torch.optim.SGD(list(model.parameters())[:4], lr=0.1), rho=0.5)
    optimizer.step(lambda: loss_of(Problem(), optimizer, list(model.parameters())[:4], 0))
    whole = SAM(torch.optim.SGD(list(twin.parameters()), lr=0.1), rho=0.5)
    twin.load_state_dict(model.state_dict())
    optimizer.add_param_group({"params": list(model.parameters())[4:]})
    train(model, optimizer, 3, start=1)
    train(twin, whole, 3, start=1)
    assert_same_bits(model, twin)
    assert optimizer.param_groups[1]["updates"] == 4


def test_methods_of_the_base_can_be_called():
    class Switching(torch.optim.SGD):
        mode = "train"

        def eval(self) -> None:
            self.mode = "eval"

    optimizer = SAM(Switching([nn.Parameter(torch.ones(3))], lr=0.1))
    optimizer.eval()
    assert optimizer.mode == optimizer.base.mode == "eval"
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = optimizer.no_such_thing


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("base", lambda params: SAM(params)),
        ("base", lambda params: SAM(FSAM(params))),
        ("base", lambda params: SAM(SAM(torch.optim.SGD(params)))),
        ("base", lambda params: SAM(MomentumSAM(params))),
        ("rho", lambda params: SAM(torch.optim.SGD(params), rho=-1.0)),
        ("gamma", lambda params: SAM(torch.optim.SGD(params), gamma=0.0)),
        ("beta", lambda params: SAM(torch.optim.SGD(params), beta=2.0)),
        ("schedule.reuse", lambda params: SAM(torch.optim.SGD(params), schedule=Schedule(every=2, reuse=0.5))),
    ],
)
def test_bad_argument_is_refused_by_its_name(name, make):
    with pytest.raises(ArgumentError) as error:
        make([nn.Parameter(torch.zeros(4, 4))])
    assert error.value.name == name


def test_perturbation_moves_what_the_mask_chose():
    model = small_model()
    named = list(model.named_parameters())
    optimizer = SAM(torch.optim.SGD(named, lr=0.1), rho=1.0, mask=FisherMask(0.25, excluded="never"))
    before = weights_of(model)
    closure_of(model, optimizer, 0)()
    optimizer.perturb()
    chosen = [optimizer.mask_of(p) for p in model.parameters()]
    assert sum(int(mask.sum()) for mask in chosen) == 128
    for p, w, mask in zip(model.parameters(), before, chosen, strict=True):
        assert torch.equal(p != w, mask)
    assert sum(optimizer.mask_density().values()) > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_trains(dtype):
    model = small_model(dtype)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.05), rho=0.05)
    losses = [float(optimizer.step(closure_of(model, optimizer, 0))) for _ in range(20)]
    assert losses[-1] < losses[0] - 1
    assert all(p.isfinite().all() for p in model.parameters())
