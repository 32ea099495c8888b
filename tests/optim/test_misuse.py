"""What is misused is refused with an error that names it, and nothing is changed."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, SAM, AdamWL2SP, ArgumentError, MomentumSAM
from tests.problem import Problem, small_model
from tests.training import assert_same_bits, assert_unchanged, closure_of, train, weights_of

# The loss of a `Problem` calls no module.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:MomentumSAM has taken")]

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


UNFIT = {
    "complex": (lambda: nn.Parameter(torch.ones(4, 4, dtype=torch.complex64)), "complex64"),
    "sparse": (lambda: nn.Parameter(torch.eye(4).to_sparse()), "sparse"),
    "float8": (lambda: nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn)), "float8"),
    "meta": (lambda: nn.Parameter(torch.ones(4, 4, device="meta")), "meta"),
    "wrapped": (lambda: nn.Parameter(Wrapped(torch.ones(4, 4))), "Wrapped"),
    "lazy": (lambda: nn.LazyLinear(4).weight, "uninitialized"),
}


@every_kind
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(("make", "what"), UNFIT.values(), ids=UNFIT.keys())
def test_parameter_that_cannot_be_trained_is_refused_by_name_before_anything_is_moved(kind, make, what, flatten):
    good = nn.Parameter(torch.ones(3))
    address = good.data_ptr()
    with pytest.raises(ArgumentError) as error:
        kind([("dense.weight", good), ("head.weight", make())], flatten=flatten)
    assert error.value.name == "parameter 'head.weight'"
    assert what in error.value.value
    assert good.data_ptr() == address


@every_kind
def test_refused_group_is_not_added(kind):
    model, optimizer = trained(kind)
    with pytest.raises(ArgumentError) as error:
        optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(4, dtype=torch.complex64)))]})
    assert error.value.name == "parameter 'more'"
    assert len(optimizer.param_groups) == 1
    assert_trains_on_as_if_nothing_had_happened(kind, model, optimizer)


@every_kind
def test_parameter_without_a_name_is_refused_by_its_number(kind):
    with pytest.raises(ArgumentError) as error:
        kind([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    assert error.value.name == "parameter number 1"


@every_kind
def test_parameter_in_two_groups_is_refused(kind):
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="more than one parameter group"):
        kind([{"params": [weight]}, {"params": [weight]}])


@every_kind
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_parameter_that_is_twice_in_a_group_is_refused_by_name(kind):
    """PyTorch's updates it twice, and says that it will raise an error."""
    weight, bias = (nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.raises(ArgumentError) as error:
        kind([("weight", weight), ("bias", bias), ("tied.weight", weight)])
    assert error.value.name == "parameter 'tied.weight'"


@pytest.mark.parametrize("kind", [*KINDS, lambda params: SAM(torch.optim.SGD(params, lr=0.1))])
def test_parameter_that_is_put_into_the_groups_a_second_time_is_refused(kind):
    model = small_model()
    optimizer = kind(model.parameters())
    optimizer.param_groups[0]["params"].append(model["dense"].weight)
    with pytest.raises(ArgumentError, match="twice"):
        optimizer.step(closure_of(model, optimizer, 0))
    assert_same_bits(model, small_model())


@every_kind
def test_empty_parameter_list_is_refused_as_torch_refuses_it(kind):
    with pytest.raises(ValueError, match="empty parameter list"):
        kind([])


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
