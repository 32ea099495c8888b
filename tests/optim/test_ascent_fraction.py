"""A first gradient of a part of the batch: in the closure form, against the same two passes by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, SAM, ArgumentError, Schedule
from fsam_triton.batches.samples import first_samples
from tests.training import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")


def around(params, **kwargs) -> SAM:
    return SAM(torch.optim.SGD(params, lr=0.1), **kwargs)


every_optimizer = pytest.mark.parametrize("make", [FSAM, around])


def data(step: int) -> dict[str, Tensor]:
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(step))
    return {"x": x, "y": (x[:, 0] > 0).long()}


def losses_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def by_hand(model: nn.Module, optimizer, batch: dict[str, Tensor], n: int) -> None:
    optimizer.zero_grad()
    losses_of(model, {name: value[:n] for name, value in batch.items()}).mean().backward()
    optimizer.perturb()
    losses_of(model, batch).mean().backward()
    optimizer.step()


@every_optimizer
def test_first_pass_sees_the_first_samples_and_the_second_one_all(make):
    model = nn.Linear(4, 2)
    twin = copy.deepcopy(model)
    optimizer = make(model.parameters(), rho=0.5, ascent_fraction=0.25)
    other = make(twin.parameters(), rho=0.5)
    for step in range(3):
        batch, sizes = data(step), []

        def closure(part, sizes=sizes):
            sizes.append(len(part["x"]))
            return losses_of(model, part)

        losses = optimizer.step(closure, batch)
        # 2.5 samples.
        assert sizes == [3, 10]
        assert losses.shape == (3,)
        by_hand(twin, other, batch, 3)
    assert_same_bits(model, twin)


def test_plain_steps_see_all_samples():
    model, sizes = nn.Linear(4, 2), []
    optimizer = FSAM(model.parameters(), ascent_fraction=0.25, schedule=Schedule(every=2))
    for step in range(2):
        optimizer.step(lambda part: sizes.append(len(part["x"])) or losses_of(model, part), data(step))
    assert sizes == [3, 10, 10]


def test_after_a_perturbation_by_hand_the_closure_sees_all_samples():
    model, sizes = nn.Linear(4, 2), []
    optimizer = FSAM(model.parameters(), ascent_fraction=0.25)
    losses_of(model, data(0)).mean().backward()
    optimizer.perturb()
    optimizer.step(lambda part: sizes.append(len(part["x"])) or losses_of(model, part), data(0))
    assert sizes == [10]


@every_optimizer
def test_copy_keeps_the_part(make):
    assert copy.deepcopy(make(nn.Linear(4, 2).parameters(), ascent_fraction=0.25)).ascent_fraction == 0.25


def test_batch_without_samples_leaves_the_weights_alone():
    model = nn.Linear(4, 2)
    twin = copy.deepcopy(model)
    optimizer = FSAM(model.parameters(), ascent_fraction=0.25)
    with pytest.raises(ArgumentError, match="batch"):
        optimizer.step(lambda part: losses_of(model, part), {"x": 3})
    assert_same_bits(model, twin)


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"ascent_fraction": 0.0}, "ascent_fraction"),
        ({"ascent_fraction": 1.5}, "ascent_fraction"),
        ({"ascent_fraction": 0.5, "gamma": 0.5}, "ascent_fraction"),
    ],
)
@every_optimizer
def test_wrong_part_is_named(make, kwargs, name):
    with pytest.raises(ArgumentError) as caught:
        make(nn.Linear(4, 2).parameters(), **kwargs)
    assert caught.value.name == name


def test_closure_without_a_batch_is_refused():
    optimizer = FSAM(nn.Linear(4, 2).parameters(), ascent_fraction=0.5)
    with pytest.raises(ArgumentError, match="ascent_fraction"):
        optimizer.step(lambda: torch.zeros(()))


# -- parts of batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "n"), [(0.01, 1), (0.2, 1), (0.21, 2), (0.99, 5), (1.0, 5)])
def test_samples_are_rounded_up(fraction, n):
    assert torch.equal(first_samples(torch.arange(5), fraction), torch.arange(n))


def test_what_has_not_a_row_for_each_sample_stays_as_it_is():
    positions, scale = torch.arange(7)[None], torch.tensor(2.0)
    batch = {"ids": torch.zeros(4, 7), "positions": positions, "scale": scale, "texts": ["a", "b", "c", "d"], "n": 4}
    part = first_samples(batch, 0.5)
    assert part["ids"].shape == (2, 7)
    assert part["positions"] is positions
    assert part["scale"] is scale
    assert part["texts"] == ["a", "b"]
    assert batch["ids"].shape == (4, 7)


def test_samples_are_views():
    batch = (torch.zeros(4, 7), [torch.zeros(4)])
    part = first_samples(batch, 0.5)
    assert part[0].data_ptr() == batch[0].data_ptr()
    assert part[1][0].shape == (2,)
