"""SAM around any optimizer: the numbers, what it shares with its base, and the surroundings of a training loop."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from fsam_triton import FSAM, SAM, ArgumentError, FisherMask, MomentumSAM, Schedule
from tests.fp64_optimizers import ReferenceFSAM, ReferenceMask, global_norm
from tests.optim.variants import loss_of
from tests.problem import Problem, assert_weights_close, small_model
from tests.training import assert_same_bits, assert_unchanged, closure_of, round_trip, several_groups, train, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

BASES = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "fused adamw": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.001),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.01),
}
if hasattr(torch.optim, "Muon"):
    BASES["muon"] = lambda params: torch.optim.Muon(params, lr=0.01)
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())


def matrices_of(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.ParameterDict:
    """Two matrices, which Muon can train too."""
    model = small_model(dtype, seed)
    return nn.ParameterDict({"a": model["dense"].weight, "b": model["head"].weight})


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


# -- what is shared with the base --------------------------------------------------------------------------------------


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


# -- masks -------------------------------------------------------------------------------------------------------------


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


MASKS = {
    "interval": FisherMask(0.3, interval=4),
    "samples": FisherMask(0.3, interval=4, samples=3),
    "random": FisherMask(0.3, interval=4, scores="random"),
}


@pytest.mark.parametrize("mask", [None, *MASKS.values()], ids=["none", *MASKS])
@every_base
def test_resumed_training_equals_uninterrupted_training_to_the_bit(base, mask):
    def fresh(seed: int):
        model = matrices_of(seed=seed)
        return model, SAM(base(model.named_parameters()), rho=0.5, mask=mask, beta=0.5, seed=3)

    model, optimizer = fresh(0)
    # In the middle of an interval, and between two squares that are added up.
    train(model, optimizer, 6)
    saved = round_trip({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, 6, start=6)
    other, resumed = fresh(1)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, 6, start=6)
    assert_same_bits(model, other)


def test_state_of_the_base_alone_can_be_loaded():
    model, twin = small_model(), small_model()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, base, 3)
    twin.load_state_dict(model.state_dict())
    optimizer = SAM(torch.optim.AdamW(twin.parameters()), rho=0.7)
    optimizer.load_state_dict(base.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert optimizer.param_groups[0]["rho"] == 0.7
    train(twin, optimizer, 2, start=3)
    assert optimizer.state[twin["dense"].weight]["step"] == 5


# -- copies ------------------------------------------------------------------------------------------------------------


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("mask", [None, *MASKS.values()], ids=["none", *MASKS])
def test_copy_of_model_and_optimizer_continues_identically(mask, duplicate):
    model = small_model()
    optimizer = SAM(torch.optim.AdamW(model.named_parameters(), lr=0.01), rho=0.5, mask=mask)
    train(model, optimizer, 6)
    twin, twins = duplicate((model, optimizer))
    train(twin, twins, 6, start=6)
    assert not torch.equal(twin["dense"].weight, model["dense"].weight)
    train(model, optimizer, 6, start=6)
    assert_same_bits(twin, model)


def test_copying_while_perturbed_is_refused():
    model = small_model()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    closure_of(model, optimizer, 0)()
    optimizer.perturb()
    for thing in (optimizer, model):
        with pytest.raises(RuntimeError, match="perturbed"):
            copy.deepcopy(thing)
        with pytest.raises(RuntimeError, match="perturbed"):
            pickle.dumps(thing)
    optimizer.restore()
    copy.deepcopy((model, optimizer))


def test_state_dict_of_the_model_between_the_passes_is_clean():
    model = small_model()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=1.0)
    closure_of(model, optimizer, 0)()
    optimizer.perturb()
    clean = small_model().state_dict()
    assert all(torch.equal(value, clean[name]) for name, value in model.state_dict().items())


def test_dropped_between_the_passes_it_leaves_clean_weights():
    model = small_model()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=1.0)
    closure_of(model, optimizer, 0)()
    optimizer.perturb()
    del optimizer
    assert_same_bits(model, small_model())


# -- what goes wrong ---------------------------------------------------------------------------------------------------


class PassFails(Exception):
    """Raised by closures."""


@every_base
def test_exception_between_the_passes_leaves_weights_and_state_as_they_were(base):
    model, twin = matrices_of(), matrices_of()
    optimizer, expected = SAM(base(model.parameters())), SAM(base(twin.parameters()))
    train(model, optimizer, 2)
    train(twin, expected, 2)
    before, calls, closure = weights_of(model), [], closure_of(model, optimizer, 2)

    def failing() -> Tensor:
        calls.append(None)
        if len(calls) == 2:
            raise PassFails
        return closure()

    with pytest.raises(PassFails):
        optimizer.step(failing)
    assert not optimizer.perturbed
    assert_unchanged(model, before)
    train(model, optimizer, 2, start=2)
    train(twin, expected, 2, start=2)
    assert_same_bits(model, twin)


def test_base_that_fails_leaves_the_weights_as_they_were():
    class Failing(torch.optim.SGD):
        def step(self, closure=None) -> None:
            raise PassFails

    model = small_model()
    optimizer = SAM(Failing(model.parameters(), lr=0.1))
    with pytest.raises(PassFails):
        train(model, optimizer, 1)
    assert not optimizer.perturbed
    assert_same_bits(model, small_model())


def test_closure_that_computes_no_gradients_is_refused():
    model = small_model()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="no gradients"):
        optimizer.step(lambda: Problem().loss(model.parameters(), 0))
    assert_same_bits(model, small_model())


# -- GradScaler --------------------------------------------------------------------------------------------------------

SCALED = {name: BASES[name] for name in ("adamw", "fused adamw", "sgd", "adagrad")}
every_scaled = pytest.mark.parametrize("base", SCALED.values(), ids=SCALED.keys())


def scaled_step(model: nn.Module, optimizer: SAM, scaler: GradScaler, step: int, spoil=(), unscale=False) -> None:
    for number, finish in enumerate((lambda: optimizer.perturb(scaler), lambda: scaler.step(optimizer))):
        optimizer.zero_grad()
        scaler.scale(Problem().loss(model.parameters(), step)).backward()
        if number in spoil:
            next(model.parameters()).grad[0, 0] = float("inf")
        if unscale and number == 1:
            scaler.unscale_(optimizer)
        finish()
    scaler.update()


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled"])
@every_scaled
def test_steps_under_a_growing_scale_equal_unscaled_ones_to_the_bit(base, unscale):
    model, twin = matrices_of(), matrices_of()
    optimizer, straight = SAM(base(model.parameters()), rho=0.5), SAM(base(twin.parameters()), rho=0.5)
    scaler = GradScaler("cpu", init_scale=256.0, growth_interval=2)
    for step in range(6):
        scaled_step(model, optimizer, scaler, step, unscale=unscale)
    train(twin, straight, 6)
    assert scaler.get_scale() == 256.0 * 2**3
    assert_same_bits(model, twin)


@every_scaled
def test_overflow_in_the_first_pass_makes_a_step_of_the_base(base):
    model, twin = matrices_of(), matrices_of()
    optimizer, plain = SAM(base(model.parameters()), rho=0.5), base(twin.parameters())
    scaler = GradScaler("cpu", init_scale=256.0)
    scaled_step(model, optimizer, scaler, 0, spoil={0})
    train(twin, plain, 1)
    assert_same_bits(model, twin)


@every_scaled
def test_overflow_in_the_second_pass_skips_the_step_and_restores_the_weights_to_the_bit(base):
    model, twin = matrices_of(), matrices_of()
    optimizer, straight = SAM(base(model.parameters()), rho=0.5), SAM(base(twin.parameters()), rho=0.5)
    scaler = GradScaler("cpu", init_scale=256.0)
    scaled_step(model, optimizer, scaler, 0)
    before = weights_of(model)
    scaled_step(model, optimizer, scaler, 1, spoil={1})
    assert not optimizer.perturbed
    assert scaler.get_scale() == 128.0
    assert_unchanged(model, before)
    # Nothing is left of it in the base's state.
    scaled_step(model, optimizer, scaler, 2)
    train(twin, straight, 1)
    train(twin, straight, 1, start=2)
    assert_same_bits(model, twin)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_trains(dtype):
    model = small_model(dtype)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.05), rho=0.05)
    losses = [float(optimizer.step(closure_of(model, optimizer, 0))) for _ in range(20)]
    assert losses[-1] < losses[0] - 1
    assert all(p.isfinite().all() for p in model.parameters())
