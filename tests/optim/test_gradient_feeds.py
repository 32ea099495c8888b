"""The same gradients give the same numbers in whichever way they come to the optimizer."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fsam_triton import AdamWL2SP
from tests.optim.by_hand import assert_states_close
from tests.problem import Problem, assert_weights_close, small_model
from tests.training import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Feed:
    """One of the ways in which gradients come to an optimizer."""

    name: str
    give: Callable[[Problem, nn.Module, torch.optim.Optimizer, int], None]


def after(zero: Callable[[nn.Module, torch.optim.Optimizer], None]):
    def give(problem, model, optimizer, step):
        zero(model, optimizer)
        problem.loss(model.parameters(), step).backward()

    return give


def assigned(problem, model, optimizer, step):
    for parameter, gradient in zip(model.parameters(), problem.gradients(model.parameters(), step), strict=True):
        parameter.grad = gradient


def accumulated(problem, model, optimizer, step):
    optimizer.zero_grad()
    for fraction in (0.25, 0.5, 0.25):
        (fraction * problem.loss(model.parameters(), step)).backward()


def discarded(problem, model, optimizer, step):
    optimizer.zero_grad()
    Problem(problem.curvature, sparse=False, seed=problem.seed).loss(model.parameters(), step).backward()
    for index, parameter in enumerate(model.parameters()):
        if not problem.present(step, index):
            parameter.grad = None


def in_one_buffer(problem, model, optimizer, step):
    """As DDP has them: views of a bucket, here at odd places, into which they are reduced."""
    gradients = problem.gradients(model.parameters(), step)
    bucket = torch.empty(1 + sum(p.numel() for p in model.parameters()))
    start = 1
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        view = bucket[start : start + parameter.numel()].view_as(parameter)
        parameter.grad = None if gradient is None else view.copy_(gradient)
        start += parameter.numel()


def alternating(problem, model, optimizer, step):
    (assigned, FEEDS[0].give, in_one_buffer, accumulated)[step % 4](problem, model, optimizer, step)


FEEDS = [
    Feed("model.zero_grad", after(lambda model, optimizer: model.zero_grad())),
    Feed("optimizer.zero_grad", after(lambda model, optimizer: optimizer.zero_grad())),
    Feed("assigned", assigned),
    Feed("accumulated", accumulated),
    Feed("discarded", discarded),
    Feed("in_one_buffer", in_one_buffer),
    Feed("alternating", alternating),
]
every_feed = pytest.mark.parametrize("feed", FEEDS, ids=lambda feed: feed.name)


@every_feed
def test_gradients_give_the_same_numbers_whichever_way_they_arrive(feed):
    # Without curvature the gradients, and the fractions of them that are accumulated, are exact.
    problem, model, twin = Problem(curvature=0.0, sparse=True), small_model(), small_model()
    optimizer = AdamWL2SP(model.parameters(), lr=0.01)
    expected = torch.optim.AdamW(twin.parameters(), lr=0.01)
    for step in range(40):
        feed.give(problem, model, optimizer, step)
        optimizer.step()
        assigned(problem, twin, expected, step)
        expected.step()
    assert_weights_close(model.parameters(), twin.parameters(), 40, 0.01)
    assert_states_close(optimizer, expected, 40)


@every_feed
def test_gradients_give_the_same_bits_whichever_way_they_arrive(feed):
    problem, model, twin = Problem(curvature=0.0, sparse=True), small_model(), small_model()
    optimizer = AdamWL2SP(model.parameters(), lr=0.01)
    expected = AdamWL2SP(twin.parameters(), lr=0.01)
    for step in range(20):
        feed.give(problem, model, optimizer, step)
        optimizer.step()
        assigned(problem, twin, expected, step)
        expected.step()
    assert_same_bits(model, twin)


@every_feed
def test_parameter_without_gradient_is_left_alone_to_the_bit(feed):
    model, problem = small_model(), Problem(sparse=True)
    optimizer = AdamWL2SP(model.parameters(), lr=0.01, weight_decay=0.5)
    parameters = list(model.parameters())
    for step in range(8):
        before = [(p.detach().clone(), copy.deepcopy(optimizer.state.get(p))) for p in parameters]
        feed.give(problem, model, optimizer, step)
        optimizer.step()
        for index, (parameter, (weight, state)) in enumerate(zip(parameters, before, strict=True)):
            if problem.present(step, index):
                assert not torch.equal(parameter, weight)
                continue
            assert torch.equal(parameter, weight)
            for name, value in (state or {}).items():
                assert torch.equal(optimizer.state[parameter][name], value), name
