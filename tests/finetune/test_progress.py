"""The bar of a run's steps says what is waited for, and leaves that out of its time per step."""

import io
import types

import pytest

pytest.importorskip("tqdm")

from fsam_triton.finetune import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved, which all bars read; and what the bars have printed."""
    now, printed = [100.0], io.StringIO()

    class Bar(progress.tqdm):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, file=printed, mininterval=0.0, **keywords)
            self._time = lambda: now[0]
            self.start_t = self.last_print_t = now[0]

    monkeypatch.setattr(progress, "tqdm", Bar)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(time=lambda: now[0]))
    return now, printed


def shown(printed):
    return printed.getvalue().replace("\r", "\n").split("\n")[-1]


def test_time_per_step_leaves_out_the_first_step_and_the_evaluation(clock):
    now, printed = clock
    bar = progress.Progress("SAM", 4)
    assert "first step: compiling" in shown(printed)
    now[0] += 60.0
    bar.step(1, 0.5)
    assert "1/4 [00:00" in shown(printed)
    now[0] += 2.0
    bar.step(2, 0.5)
    with bar.waiting("evaluating", 2) as passed:
        assert "SAM: evaluating:" in shown(printed)
        now[0] += 30.0
        passed()
        assert "1/2" in shown(printed)
    now[0] += 2.0
    bar.step(3, 0.25)
    assert "3/4 [00:04<00:02,  2.00s/step, loss=0.250]" in shown(printed)
    bar.close()


def test_first_step_of_a_resumed_run_is_left_out_too(clock):
    now, printed = clock
    bar = progress.Progress("SAM", 10, done=7)
    now[0] += 60.0
    bar.step(8, 0.5)
    now[0] += 3.0
    bar.step(9, 0.5)
    assert "9/10 [00:03<" in shown(printed)
    assert " 3.00s/step" in shown(printed)
    bar.close()


def test_hidden_bar_prints_nothing(clock):
    _, printed = clock
    bar = progress.Progress("SAM", 2, shown=False)
    bar.step(1, 0.5)
    with bar.waiting("evaluating", 1) as passed:
        passed()
    bar.close()
    assert printed.getvalue() == ""


def test_steps_that_are_too_fast_to_be_printed_count(clock):
    now, printed = clock
    bar = progress.Progress("SAM", 4)
    bar.step(1, 0.5)
    bar.bar.mininterval = 10.0
    for number in (2, 3):
        now[0] += 1.0
        bar.step(number, 0.5)
    with bar.waiting("evaluating", 1) as passed:
        now[0] += 30.0
        passed()
    assert "3/4 [00:02<" in shown(printed)
    bar.close()
