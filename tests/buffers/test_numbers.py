"""Numbers of groups and of parameters on the device, sent again only when they have changed; keys of parameters."""

import pytest
import torch

from fsam_triton.buffers.lanes import Lanes
from fsam_triton.buffers.members import Member
from fsam_triton.buffers.numbers import Numbers
from fsam_triton.kernels import formulas, spec

CPU = torch.device("cpu")


def test_hyper_parameters_are_rows_of_fp64():
    rows = Numbers(CPU).rows([(0.1, 1e-8), (0.2, 1e-6)])
    assert rows.dtype == torch.float64
    assert rows.tolist() == [[0.1, 1e-8], [0.2, 1e-6]]


def test_unchanged_hyper_parameters_are_not_sent_again():
    numbers = Numbers(CPU)
    first = numbers.rows([(0.1, 0.2)])
    assert numbers.rows([(0.1, 0.2)]) is first


@pytest.mark.parametrize("changed", [[(0.1, 0.3)], [(0.1, 0.2), (0.1, 0.2)], [(0.1,)]], ids=["value", "row", "column"])
def test_changed_hyper_parameters_are_sent(changed):
    numbers = Numbers(CPU)
    numbers.rows([(0.1, 0.2)])
    assert numbers.rows(changed).tolist() == [list(row) for row in changed]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_tensor_among_them_is_followed(shape):
    numbers, lr = Numbers(CPU), torch.full(shape, 0.5)
    assert numbers.rows([(lr, 0.25)]).tolist() == [[0.5, 0.25]]
    lr.fill_(0.125)
    assert numbers.rows([(lr, 0.25)]).tolist() == [[0.125, 0.25]]


def test_number_in_place_of_a_tensor_is_sent():
    numbers = Numbers(CPU)
    numbers.rows([(torch.tensor(0.5), 0.25)])
    assert numbers.rows([(0.0, 0.25)]).tolist() == [[0.0, 0.25]]


# -- of parameters -----------------------------------------------------------------------------------------------------


def lanes_of(groups: list[dict]) -> Lanes:
    pairs = [(group, i) for group in groups for i in range(len(group["params"]))]
    return Lanes([Member(group["params"][i], group, i, number) for number, (group, i) in enumerate(pairs)])


def parameters(n: int) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3)) for _ in range(n)]


def test_every_parameter_has_the_row_of_its_group():
    groups = [{"params": parameters(n)} for n in (2, 1, 3)]
    rows = lanes_of(groups).about_members()[:, spec.MEMBER.index("group")]
    assert rows.tolist() == [0, 0, 1, 2, 2, 2]


def keys_of(lanes: Lanes, purpose: int) -> list[int]:
    rho, chance = torch.ones(2, len(lanes.groups), dtype=torch.float64)
    numbers, norm = torch.stack([rho, chance], 1), torch.ones((), dtype=torch.float64)
    rest = (lanes.about_members(), lanes.steps, purpose, norm, None, torch.float32)
    return formulas.climb_coefficients(numbers, *rest)[1].tolist()


def test_random_numbers_of_a_parameter_depend_on_its_number_and_count_of_updates_alone():
    params = parameters(4)
    together = lanes_of([{"params": params}])
    apart = lanes_of([{"params": params[:2]}, {"params": params[2:]}])
    for lanes in (together, apart):
        lanes.steps.copy_(torch.arange(4))
    one = Lanes([Member(params[3], {"params": params}, 3, 3)])
    one.steps.fill_(3)
    keys = keys_of(together, 5)
    assert len(set(keys)) == 4
    assert keys_of(apart, 5) == keys
    assert keys_of(one, 5) == keys[3:]
    assert set(keys_of(together, 6)).isdisjoint(keys)
