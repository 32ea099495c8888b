"""What bench/memory.py measures, where the right answer is known."""

import pytest
import torch

pytest.importorskip("psutil")

from bench.memory import Memory, build_and_measure

KB = 1024


def zeros(kilobytes):
    return torch.zeros(kilobytes * KB, dtype=torch.uint8)


def test_what_is_held_and_what_is_freed_within_a_step_are_told_apart():
    def build():
        state = zeros(10)

        def step():
            first = zeros(3)
            second = zeros(4)
            del first
            third = zeros(2)
            return len(state) + len(second) + len(third)

        return step

    assert build_and_measure(build)[1] == Memory(10 * KB, (10 + 3 + 4) * KB)


def test_state_made_by_the_first_step_is_held():
    state = []

    def step():
        if not state:
            state.append(zeros(5))

    assert build_and_measure(lambda: step)[1] == Memory(5 * KB, 5 * KB)


def test_inputs_do_not_count_also_where_a_step_replaces_them():
    def build():
        inputs = [zeros(8)]

        def step():
            inputs[0] = inputs[0].clone()

        return step

    assert build_and_measure(build, inputs=8 * KB)[1] == Memory(0, 8 * KB)


def test_memory_from_before_does_not_count():
    before = zeros(64)
    assert build_and_measure(lambda: before.zero_)[1] == Memory(0, 0)


def test_adamw_holds_two_moments():
    weights = 1000

    def build():
        p = torch.nn.Parameter(torch.ones(weights))
        p.grad = torch.ones(weights)
        return torch.optim.AdamW([p], fused=True).step

    # And a count of steps, fp32.
    assert build_and_measure(build, inputs=2 * 4 * weights)[1].held == 2 * 4 * weights + 4


def test_the_step_returned_is_the_one_measured():
    calls = []
    step, _ = build_and_measure(lambda: lambda: calls.append(1))
    step()
    assert len(calls) == 4
