"""Long experiments lose no run and make none twice, however they are interrupted."""

import itertools
from dataclasses import dataclass

import pytest

from bench.records import find, record, recorded


@dataclass(frozen=True)
class Setting:
    method: str
    learning_rate: float
    seed: int


SETTINGS = [Setting(*values) for values in itertools.product(("SAM", "FSAM"), (5e-4, 2e-3), (0, 1))]


class Runs:
    """Counts the runs: each has the number of those before as its accuracy."""

    def __init__(self):
        self.made = []

    def __call__(self, setting):
        self.made.append(setting)
        return {"accuracy": len(self.made)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "runs.jsonl"


def test_finished_runs_are_not_made_again(path):
    first, second = Runs(), Runs()
    before = list(record(SETTINGS[:3], path, first))
    after = list(record(SETTINGS, path, second))
    assert first.made == SETTINGS[:3]
    assert second.made == SETTINGS[3:]
    assert after[:3] == before
    assert list(record(SETTINGS, path, None)) == after


def test_runs_before_an_interruption_are_kept(path):
    def interrupted(setting):
        if setting == SETTINGS[2]:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        list(record(SETTINGS, path, interrupted))
    rest = Runs()
    list(record(SETTINGS, path, rest))
    assert rest.made == SETTINGS[2:]


def test_run_whose_line_was_cut_off_is_made_again(path):
    whole = list(record(SETTINGS[:3], path, Runs()))
    path.write_text(path.read_text()[:-5])
    again = Runs()
    assert recorded(path) == whole[:2]
    assert list(record(SETTINGS[:3], path, again))[:2] == whole[:2]
    assert again.made == SETTINGS[2:3]
    assert len(list(record(SETTINGS[:3], path, None))) == 3


def test_looking_into_a_file_leaves_an_unfinished_line_to_its_writer(path):
    list(record(SETTINGS[:1], path, Runs()))
    with path.open("a") as file:
        file.write('{"method": ')
    before = path.read_bytes()
    recorded(path)
    assert path.read_bytes() == before


def test_second_process_is_refused_while_the_first_makes_runs(path):
    first = record(SETTINGS, path, Runs())
    next(first)
    second = Runs()
    with pytest.raises(BlockingIOError):
        next(record(SETTINGS, path, second))
    assert second.made == []
    first.close()
    assert next(record(SETTINGS[1:], path, second))["accuracy"] == 1


def test_record_is_found_by_all_values_of_its_setting(path):
    records = list(record(SETTINGS, path, Runs()))
    assert [find(setting, records)["accuracy"] for setting in SETTINGS] == list(range(1, 9))
    assert find(Setting("SAM", 5e-4, 2), records) is None
