"""ESAM: the part of the samples that the second gradient is of."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, ArgumentError
from tests.training import assert_same_bits, assert_unchanged, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


class PassFails(Exception):
    """Raised by the closure of a test."""


class Counting:
    """A classifier's losses per sample, with a record of how many samples were seen, and where."""

    def __init__(self, wrap: Callable[[dict], object] = dict) -> None:
        generator = torch.Generator().manual_seed(3)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 4)
        inputs = torch.randn(12, 8, generator=generator, dtype=torch.float64)
        self.batch = wrap({"inputs": inputs, "labels": torch.randint(0, 3, (12,), generator=generator)})
        self.clean = weights_of(self.model)
        self.calls: list[tuple[int, bool, bool]] = []

    def losses(self, batch) -> Tensor:
        at_clean = all(torch.equal(p, w) for p, w in zip(self.model.parameters(), self.clean, strict=True))
        self.calls.append((len(batch["labels"]), at_clean, torch.is_grad_enabled()))
        return nn.functional.cross_entropy(self.model(batch["inputs"]), batch["labels"], reduction="none")


def batch_encoding(values: dict):
    return pytest.importorskip("transformers").BatchEncoding(values)


@pytest.mark.parametrize("wrap", [dict, batch_encoding], ids=["dict", "BatchEncoding"])
def test_second_gradient_is_of_the_samples_whose_loss_rose_most(wrap):
    ours = Counting(wrap)
    optimizer = FSAM(ours.model.parameters(), lr=0.01, rho=0.5, gamma=0.5)
    expected = ours.losses(ours.batch).detach()
    ours.calls.clear()
    losses = optimizer.step(ours.losses, ours.batch)
    # At w with gradient, at w + eps without, and with gradient on the half of the batch.
    assert ours.calls == [(12, True, True), (12, False, False), (6, False, True)]
    assert torch.equal(losses, expected)
    assert not losses.requires_grad

    theirs = Counting()
    twin = FSAM(theirs.model.parameters(), lr=0.01, rho=0.5)
    before = theirs.losses(theirs.batch)
    before.mean().backward()
    twin.perturb()
    with torch.no_grad():
        rise = theirs.losses(theirs.batch) - before
    chosen = sorted(sorted(range(12), key=lambda i: -float(rise[i]))[:6])
    theirs.losses({name: value[chosen] for name, value in theirs.batch.items()}).mean().backward()
    twin.step()
    assert_same_bits(ours.model, theirs.model)


@pytest.mark.parametrize("gamma", [0.01, 0.3, 1.0])
def test_part_of_the_batch_is_rounded_down_to_at_least_one_sample(gamma):
    ours = Counting()
    optimizer = FSAM(ours.model.parameters(), gamma=gamma, rho=0.5)
    optimizer.step(ours.losses, ours.batch)
    sizes = [size for size, _, _ in ours.calls]
    assert sizes == ([12, 12] if gamma == 1 else [12, 12, max(1, int(gamma * 12))])


def test_step_with_a_batch_equals_the_step_without_one_to_the_bit():
    ours, theirs = Counting(), Counting()
    optimizer, twin = (FSAM(side.model.parameters(), lr=0.01, rho=0.5) for side in (ours, theirs))

    def closure():
        twin.zero_grad()
        loss = theirs.losses(theirs.batch).mean()
        loss.backward()
        return loss

    for _ in range(3):
        losses = optimizer.step(ours.losses, ours.batch)
        assert losses.mean() == twin.step(closure)
    assert_same_bits(ours.model, theirs.model)


def test_gamma_below_one_without_a_batch_is_refused_before_anything_is_evaluated():
    ours = Counting()
    optimizer = FSAM(ours.model.parameters(), gamma=0.5)
    with pytest.raises(ArgumentError, match=r"step\(closure, batch\)") as error:
        optimizer.step(lambda: ours.losses(ours.batch))
    assert (error.value.name, error.value.value) == ("gamma", 0.5)
    assert not ours.calls


def test_exception_on_the_selected_samples_puts_the_clean_weights_back():
    ours = Counting()
    optimizer = FSAM(ours.model.parameters(), gamma=0.5, rho=0.5, beta=0.5, beta_per="tensor")

    def failing(batch):
        if len(ours.calls) == 2:
            raise PassFails
        return ours.losses(batch)

    with pytest.raises(PassFails):
        optimizer.step(failing, ours.batch)
    assert not optimizer.perturbed
    assert_unchanged(ours.model, ours.clean)


def test_closure_that_returns_one_loss_for_the_batch_is_refused_with_gamma():
    ours = Counting()
    optimizer = FSAM(ours.model.parameters(), gamma=0.5, rho=0.5)
    with pytest.raises(ValueError, match="losses per sample"):
        optimizer.step(lambda batch: ours.losses(batch).mean(), ours.batch)
    assert_unchanged(ours.model, ours.clean)
