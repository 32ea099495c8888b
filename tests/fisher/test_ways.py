"""Uses of parameters that the fast way of estimate_fisher cannot do are found, and done exactly."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fsam_triton.fisher import slow
from tests.fisher.cases import (
    KINDS,
    MODELS,
    assert_equal_but_for_rounding,
    by_loop,
    cast,
    estimate,
    inputs,
    made,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grads):
        x, weight = ctx.saved_tensors
        return grads * weight, (grads * x).sum(0)


class OwnFunction(nn.Module):
    """The first layer's weight is also used by an autograd.Function, which no torch function sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Scale.apply(torch.tanh(self.first(x)), self.first.weight[0]) + self.through(x))

    def through(self, x: Tensor) -> Tensor:
        return Scale.apply(x, self.first.bias)


class Outside(nn.Module):
    """A module holds another's weight where the tree of modules, and so torch.func, does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.others = [self.first.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) @ self.others[0])


class DataDependent(nn.Module):
    """What vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.last = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([row @ self.matrix if float(row.sum()) > 0 else row @ self.matrix.T for row in x])
        return self.last(torch.tanh(h))


class PositionsFirst(nn.Module):
    """Activations are [positions, samples, features] until the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x.transpose(0, 1))))[0])


class Mixing(nn.Module):
    """Samples see each other: normalised by the batch's statistics in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4, track_running_stats=False)
        self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.norm(self.first(x))).mean(-1))))


class Tokens(nn.Module):
    """Rows of all samples' positions in one dimension; a module called for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        once = torch.tanh(self.first(x.flatten(0, 1))).view(len(x), -1, 5).mean(1)
        return self.last(torch.cat([once, self.first(x[:, 0])], -1))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(
            checkpoint(lambda x: torch.tanh(self.middle(torch.tanh(x))), self.first(x), use_reentrant=False)
        )


class Cast(nn.Module):
    """Casts that do nothing, and a look at attributes, are no uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight.to(x.dtype)
        x = F.linear(x.to(self.last.weight.dtype), weight, self.first.bias.contiguous())
        with torch.no_grad():
            norm = self.last.weight.norm()
        return self.last(x / norm)


class Twice(nn.Module):
    """One parameter as two arguments of a function; results in a tuple; a parameter normalised itself."""

    def __init__(self) -> None:
        super().__init__()
        self.vector, self.matrix, self.last = (
            nn.Parameter(torch.randn(4)),
            nn.Parameter(torch.randn(4, 4)),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, (4,), self.vector, self.vector)
        return self.last(x * torch.max(self.matrix, dim=0).values)


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(20, 3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)[0][:, -1])


def everything(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def attention(model: nn.Module) -> set[str]:
    return {name for name in everything(model) if "self_attn" in name}


def recurrent(model: nn.Module) -> set[str]:
    return {name for name in everything(model) if "first" in name}


WAYS = {
    "own_function": (OwnFunction, (4,), {"first.weight", "first.bias"}),
    "outside": (Outside, (4,), {"first.weight"}),
    "data_dependent": (DataDependent, (4,), {"matrix"}),
    "positions_first": (PositionsFirst, (6, 4), everything),
    "as_many_positions_as_samples": (PositionsFirst, (5, 4), everything),
    "mixing": (Mixing, (2, 6), everything),
    "tokens": (Tokens, (6, 4), set()),
    "cast": (Cast, (4,), set()),
    "twice": (Twice, (4,), {"matrix"}),
    "checkpointed": (Checkpointed, (4,), everything),
    "scripted": (Scripted, (4,), {"first.weight", "first.bias"}),
    "attention": (encoder, (5, 4), attention),
    "recurrent": (Recurrent, (5, 4), recurrent),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WAYS)
def test_uses_that_the_fast_way_cannot_do_are_found_and_done_exactly(name, kind, slow_names):
    make, shape, slow = WAYS[name]
    model, batches = made(make), [cast(inputs(size, *shape), torch.float64) for size in (5, 3)]
    assert_equal_but_for_rounding(estimate(model, batches, kind=kind), by_loop(model, batches, kind))
    assert slow_names == (slow(model) if callable(slow) else slow)


def test_batches_of_one_sample_do_not_hide_that_later_ones_are_arranged_otherwise(slow_names):
    model, batches = made(PositionsFirst), [cast(inputs(size, 5, 4), torch.float64) for size in (1, 5, 5)]
    assert_equal_but_for_rounding(estimate(model, batches), by_loop(model, batches))


def test_use_that_comes_up_in_a_later_batch_is_found():
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            return self.last(h @ self.first.weight if x.shape[1] > 2 else h).mean(1)

    model, batches = made(Later), [cast(inputs(size, size - 2, 4), torch.float64) for size in (4, 5, 3)]
    assert_equal_but_for_rounding(estimate(model, batches), by_loop(model, batches))


def test_slow_way_of_a_parameter_does_several_samples_at_once(monkeypatch):
    """The loop serves only to check vmap on one sample."""
    sizes, original = [], slow.SlowPasses.by_loop

    def by_loop(self, names, batch):
        sizes.append(batch.size)
        return original(self, names, batch)

    monkeypatch.setattr(slow.SlowPasses, "by_loop", by_loop)
    make, batches = MODELS["raw"]
    estimate(made(make), batches)
    assert sizes == [1]


def test_slow_way_needs_no_more_memory_than_it_is_given(monkeypatch):
    """One sample at a time, if there is no room for two."""
    make, batches = MODELS["raw"]
    model = made(make)
    monkeypatch.setattr(slow, "ELEMENTS", 1)
    assert_equal_but_for_rounding(estimate(model, batches), by_loop(model, batches))


def test_empty_batches_are_left_out():
    model, batches = made(Cast), [cast(inputs(size, 4), torch.float64) for size in (0, 4, 0, 3)]
    assert_equal_but_for_rounding(estimate(model, batches), by_loop(model, batches))


def test_compiled_model_is_run_uncompiled():
    model = made(OwnFunction)
    batches = [cast(inputs(4, 4), torch.float64)]
    expected = by_loop(model, batches)
    compiled = torch.compile(model)
    actual = estimate(compiled, batches)
    assert_equal_but_for_rounding({name.removeprefix("_orig_mod."): value for name, value in actual.items()}, expected)
