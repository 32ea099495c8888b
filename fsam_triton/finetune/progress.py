"""Shows how far a run is, and says what is waited for when that is not a step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from .optional import tqdm


@contextlib.contextmanager
def waiting(doing: str, total: int, unit: str, shown: bool = True) -> Iterator[Callable[[], object]]:
    """Context with a progress bar that disappears at its end; gives a function to call after each part.

    Args:
        doing: what is done, in words.
        total: how many parts it has.
        unit: what a part is.
        shown: False for no bar (default: True).
    """
    with tqdm(total=total, desc=doing, unit=unit, leave=False, disable=not shown) as bar:
        yield bar.update


class Progress:
    """The progress bar of a run's steps, whose time per step leaves out whatever else is waited for.

    Args:
        name: what runs.
        total: steps of the run.
        done: steps that an earlier process has made (default: 0).
        shown: False for a bar that shows nothing (default: True).
    """

    def __init__(self, name: str, total: int, done: int = 0, shown: bool = True) -> None:
        self.name = name
        self.shown = shown
        self.first: int = done + 1
        self.start: float = time.time()
        self.bar: tqdm[NoReturn] = tqdm(total=total, initial=done, desc=name, unit="step", disable=not shown)
        self.bar.set_postfix_str("first step: compiling")

    def note(self, text: str) -> None:
        """Show a text behind the bar, until the next step."""
        self.bar.set_postfix_str(text)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()

    def step(self, number: int, loss: float) -> None:
        """Show that a step is done, counted from 1; the first one of this process takes no time, as it may compile."""
        self.bar.set_postfix_str(f"loss={loss:.3f}", refresh=False)
        if number == self.first and self.shown:
            self.bar.n = self.bar.initial = self.bar.last_print_n = number
            self._leave_out(time.time() - self.start)
        else:
            self.bar.update()

    @contextlib.contextmanager
    def waiting(self, doing: str, total: int, unit: str = "batch") -> Iterator[Callable[[], object]]:
        """Context for what is done between two steps: `waiting`, whose time the bar of the steps leaves out."""
        self.bar.set_postfix_str(doing)
        start = time.time()
        with waiting(f"{self.name}: {doing}", total, unit, self.shown) as passed:
            yield passed
        self._leave_out(time.time() - start)

    def _leave_out(self, seconds: float) -> None:
        """Take so much time out of the bar's account."""
        if self.shown:
            self.bar.start_t += seconds
            self.bar.last_print_t += seconds
            self.bar.refresh()
