"""What is misused is refused with an error that names it, and nothing is changed."""

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, AdamWL2SP, MomentumSAM
from tests.reference import Problem, small_model
from tests.training import assert_same_bits, assert_unchanged, closure_of, train, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = [AdamWL2SP, FSAM, MomentumSAM]
every_kind = pytest.mark.parametrize("kind", KINDS)


def trained(kind=AdamWL2SP, steps: int = 3, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = small_model(seed=seed)
    optimizer = kind(model.named_parameters(), lr=0.01)
    train(model, optimizer, steps)
    return model, optimizer


def assert_trains_on_as_if_nothing_had_happened(kind, model, optimizer) -> None:
    twin, expected = trained(kind)
    for each, own in ((model, optimizer), (twin, expected)):
        train(each, own, 3, start=3)
    assert_same_bits(model, twin)


# -- states that are not ours ------------------------------------------------------------------------------------------


def state_of_sgd() -> dict:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 2)
    return optimizer.state_dict()


def state_of_adafactor() -> dict:
    model = small_model()
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer, 2)
    return optimizer.state_dict()


def damaged(**changes) -> dict:
    """Our own state with changes in the first parameter's entry; a value of None takes the key away."""
    state = copy.deepcopy(trained()[1].state_dict())
    entry = state["state"][0]
    entry.update(changes)
    for name in [name for name, value in changes.items() if value is None]:
        del entry[name]
    return state


def without(key: str) -> dict:
    return {name: value for name, value in damaged().items() if name != key}


def with_group(**changes) -> dict:
    state = damaged()
    state["param_groups"][0].update(changes)
    return state


FOREIGN = {
    "sgd": (state_of_sgd, r"dense\.weight.*momentum_buffer"),
    "adafactor": (state_of_adafactor, r"dense\.weight.*row_var"),
    "lion": (lambda: damaged(step=None, exp_avg_sq=None), r"dense\.weight.*'exp_avg'\]"),
    "nadam": (lambda: damaged(mu_product=torch.ones(())), "mu_product"),
    "other_layout": (lambda: damaged(exp_avg_sq=None, exp_avg_sq_blocks=torch.ones(3)), "exp_avg_sq_blocks"),
    "integers": (lambda: damaged(exp_avg=torch.ones(16, 24, dtype=torch.int64)), r"exp_avg.*torch\.int64"),
    "complex": (lambda: damaged(exp_avg=torch.ones(16, 24, dtype=torch.complex64)), r"exp_avg.*torch\.complex64"),
    "sparse": (lambda: damaged(exp_avg=torch.ones(16, 24).to_sparse()), "exp_avg.*dense"),
    "not_a_tensor": (lambda: damaged(exp_avg=[0.0] * 384), "exp_avg.*list"),
    "step_of_text": (lambda: damaged(step="three"), "step.*three"),
    "negative_step": (lambda: damaged(step=torch.tensor(-1.0)), "step.*-1"),
    "complex_mask": (lambda: damaged(mask=torch.ones(12, dtype=torch.complex64)), r"mask.*torch\.complex64"),
    "selected_weights": (lambda: damaged(index=torch.zeros(16, 24, dtype=torch.int32)), "index.*trainable"),
    "no_state": (lambda: without("state"), "must have.*state"),
    "no_groups": (lambda: without("param_groups"), "must have.*param_groups"),
    "betas_of_text": (lambda: with_group(betas="0.9"), "betas.*0.9"),
    "infinite_lr": (lambda: with_group(lr=math.inf), "learning rate.*inf"),
}


@pytest.mark.parametrize(("make", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_state_that_is_not_ours_is_refused_and_changes_nothing(make, message):
    model, optimizer = trained()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make())
    assert_trains_on_as_if_nothing_had_happened(AdamWL2SP, model, optimizer)


@pytest.mark.parametrize("kind", [FSAM, MomentumSAM])
def test_foreign_state_is_refused_while_the_weights_are_perturbed_and_leaves_them_so(kind):
    model, optimizer = trained(kind)
    if kind is FSAM:
        closure_of(model, optimizer, 3)()
        optimizer.perturb()
    before = weights_of(model)
    with pytest.raises(ValueError, match="momentum_buffer"):
        optimizer.load_state_dict(state_of_sgd())
    assert optimizer.perturbed
    assert_unchanged(model, before)
    optimizer.restore()
    assert_same_bits(model, _clean(kind))


def _clean(kind) -> nn.Module:
    model, optimizer = trained(kind)
    optimizer.restore()
    return model


def test_group_without_its_parameters_in_a_state_is_refused():
    state = damaged()
    del state["param_groups"][0]["params"]
    with pytest.raises(ValueError, match="params"):
        trained()[1].load_state_dict(state)


def test_count_of_steps_as_a_plain_number_is_accepted():
    model, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = int(entry["step"])
    optimizer.load_state_dict(state)
    assert_trains_on_as_if_nothing_had_happened(AdamWL2SP, model, optimizer)


# -- parameters that cannot be trained ---------------------------------------------------------------------------------


class Wrapped(Tensor):
    """A tensor without memory of its own, like a quantised weight of torchao."""

    @staticmethod
    def __new__(cls, data: Tensor) -> "Wrapped":
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data: Tensor) -> None:
        self.inner = data

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(function)


def quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8)


def fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


UNFIT = {
    "quantised": (lambda: fixed(quantised()), "qint8"),
    "complex": (lambda: fixed(torch.ones(4, 4, dtype=torch.complex64)), "complex64"),
    "sparse": (lambda: fixed(torch.eye(4).to_sparse()), "sparse"),
    "integer": (lambda: fixed(torch.ones(4, 4, dtype=torch.int8)), "int8"),
    "float8": (lambda: fixed(torch.ones(4, 4).to(torch.float8_e4m3fn)), "float8"),
    "meta": (lambda: fixed(torch.ones(4, 4, device="meta")), "meta"),
    "wrapped": (lambda: nn.Parameter(Wrapped(torch.ones(4, 4))), "Wrapped"),
    "lazy": (lambda: nn.LazyLinear(4).weight, "uninitialized"),
}


@every_kind
@pytest.mark.parametrize(("make", "what"), UNFIT.values(), ids=UNFIT.keys())
def test_parameter_that_cannot_be_trained_is_refused_by_name_before_anything_is_moved(kind, make, what):
    good = nn.Parameter(torch.ones(3))
    address = good.data_ptr()
    with pytest.raises(ValueError, match=rf"'head\.weight'.*{what}"):
        kind([("dense.weight", good), ("head.weight", make())])
    assert good.data_ptr() == address


@every_kind
def test_refused_group_is_not_added(kind):
    model, optimizer = trained(kind)
    with pytest.raises(ValueError, match=r"'more'.*int8"):
        optimizer.add_param_group({"params": [("more", fixed(torch.ones(4, dtype=torch.int8)))]})
    assert len(optimizer.param_groups) == 1
    assert_trains_on_as_if_nothing_had_happened(kind, model, optimizer)


def test_parameter_in_two_groups_is_refused():
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="more than one parameter group"):
        AdamWL2SP([{"params": [weight]}, {"params": [weight]}])


# -- models that change under the optimizer ----------------------------------------------------------------------------


MOVES = {
    "dtype": (lambda model: model.to(torch.float64), "float64"),
    "half": (lambda model: model.half(), "float16"),
}


@every_kind
@pytest.mark.parametrize(("move", "shown"), MOVES.values(), ids=MOVES.keys())
def test_model_moved_after_the_optimizer_was_made_is_refused_at_the_next_step(kind, move, shown):
    model, optimizer = trained(kind)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    move(model)

    def closure():
        optimizer.zero_grad()
        sum(p.sum() for p in model.parameters()).backward()
        return torch.zeros(())

    with pytest.raises(RuntimeError, match=rf"'dense\.weight' was moved.*{shown}.*then make the optimizer"):
        optimizer.step(closure)
    for i, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[i][name]) for name, value in entry.items())


@every_kind
@pytest.mark.parametrize("second", KINDS)
def test_of_two_optimizers_on_one_model_the_first_is_refused(kind, second):
    model, first = trained(kind)
    first.restore()
    twin = small_model()
    twin.load_state_dict(model.state_dict())
    optimizers = [second(each.named_parameters(), lr=0.01) for each in (model, twin)]
    with pytest.raises(RuntimeError, match=r"'dense\.weight'.*only one optimizer"):
        first.step(closure_of(model, first, 3))
    for each, own in zip((model, twin), optimizers, strict=True):
        train(each, own, 2, start=3)
    assert_same_bits(model, twin)


# -- losses, gradients and closures ------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipped"])
def test_loss_that_is_nan_leaves_weights_and_moments_as_they_were(kind, kwargs):
    model = small_model()
    optimizer = kind(model.named_parameters(), lr=0.01, **kwargs)
    train(model, optimizer, 2)
    optimizer.restore()
    before, state = weights_of(model), copy.deepcopy(optimizer.state_dict()["state"])

    def closure():
        optimizer.zero_grad()
        loss = Problem().loss(model.parameters(), 2) * float("nan")
        loss.backward()
        return loss

    assert torch.isnan(optimizer.step(closure))
    optimizer.restore()
    assert_unchanged(model, before)
    for i, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(entry[name], state[i][name]) for name in ("exp_avg", "exp_avg_sq"))


class Interrupt(KeyboardInterrupt):
    """Nobody's Ctrl-C."""


@pytest.mark.parametrize(("kind", "call"), [(AdamWL2SP, 0), (FSAM, 0), (FSAM, 1), (MomentumSAM, 0)])
@pytest.mark.parametrize("error", [Interrupt, MemoryError])
def test_closure_that_raises_in_either_call_leaves_everything_as_it_was(kind, call, error):
    model, optimizer = trained(kind)
    before, calls = weights_of(model), []

    def closure():
        calls.append(None)
        if len(calls) > call:
            raise error
        return closure_of(model, optimizer, 3)()

    with pytest.raises(error):
        optimizer.step(closure)
    assert_unchanged(model, before)
    assert_trains_on_as_if_nothing_had_happened(kind, model, optimizer)


@pytest.mark.parametrize(
    "grad",
    [torch.ones(3), torch.ones(16, 24, dtype=torch.float64), torch.ones(16, 24, device="meta")],
    ids=["shape", "dtype", "device"],
)
def test_gradient_of_another_shape_dtype_or_device_is_refused_by_torch(grad):
    model, _ = trained()
    with pytest.raises((RuntimeError, TypeError), match=r"grad"):
        model["dense"].weight.grad = grad


# -- arguments ---------------------------------------------------------------------------------------------------------


BAD = [
    ("lr", math.inf, "learning rate"),
    ("lr", math.nan, "learning rate"),
    ("lr", "1e-3", "learning rate"),
    ("betas", "0.9", "betas"),
    ("betas", 0.9, "betas"),
    ("betas", (0.9,), "betas"),
    ("betas", (0.9, math.nan), "beta parameter at index 1"),
    ("betas", ("0.9", 0.999), "beta parameter at index 0"),
    ("eps", math.inf, "eps"),
    ("weight_decay", math.nan, "weight_decay"),
    ("l2_sp", "0.1", "l2_sp"),
]


@every_kind
@pytest.mark.parametrize(("name", "value", "shown"), BAD, ids=str)
def test_argument_that_is_no_finite_number_is_refused_for_optimizers_and_groups(kind, name, value, shown):
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=f"^Invalid {shown}.*; must be"):
        kind([weight], **{name: value})
    with pytest.raises(ValueError, match=f"^Invalid {shown}.*; must be"):
        kind([{"params": [weight], name: value}])


def test_betas_may_be_a_list():
    models = [small_model(), small_model()]
    for model, betas in zip(models, ([0.8, 0.95], (0.8, 0.95)), strict=True):
        train(model, AdamWL2SP(model.parameters(), betas=betas), 3)
    assert_same_bits(*models)
