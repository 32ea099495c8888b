"""Shows how far a run is, and says what is waited for when that is not a step."""

import contextlib
import time

from .optional import tqdm


@contextlib.contextmanager
def waiting(doing, total, unit, shown=True):
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

    def __init__(self, name, total, done=0, shown=True):
        self.name, self.shown, self.first, self.start = name, shown, done + 1, time.time()
        self.bar = tqdm(total=total, initial=done, desc=name, unit="step", disable=not shown)
        self.bar.set_postfix_str("first step: compiling")

    def note(self, text):
        """Show a text behind the bar, until the next step."""
        self.bar.set_postfix_str(text)

    def close(self):
        """Leave the bar as it is."""
        self.bar.close()

    def step(self, number, loss):
        """Show that a step is done, counted from 1; the first one of this process takes no time, as it may compile."""
        self.bar.set_postfix_str(f"loss={loss:.3f}", refresh=False)
        if number == self.first and self.shown:
            self.bar.n = self.bar.initial = self.bar.last_print_n = number
            self._leave_out(time.time() - self.start)
        else:
            self.bar.update()

    @contextlib.contextmanager
    def waiting(self, doing, total, unit="batch"):
        """Context for what is done between two steps: `waiting`, whose time the bar of the steps leaves out."""
        self.bar.set_postfix_str(doing)
        start = time.time()
        with waiting(f"{self.name}: {doing}", total, unit, self.shown) as passed:
            yield passed
        self._leave_out(time.time() - start)

    def _leave_out(self, seconds):
        """Take so much time out of the bar's account."""
        if self.shown:
            self.bar.start_t += seconds
            self.bar.last_print_t += seconds
            self.bar.refresh()
