"""The default comparison says how its seed compares with others, and no other comparison does."""

import dataclasses
import json

import pytest

from fsam_triton.finetune import evidence
from fsam_triton.finetune.options import SAM_TYPES, Arguments
from fsam_triton.finetune.parser import parse
from fsam_triton.finetune.report import Run
from tests.test_fidelity import load_bench

NAMES = [SAM_TYPES[sam_type] for sam_type in Arguments().sam_type]


def finished(name, accuracy, rounded, sharpness):
    figures = {"rounded": rounded and (rounded, 0.1), "m_sharpness": sharpness}
    return Run(name, 1, losses=[1.0], evaluations=[(1, accuracy, 0.1)], **figures)


RUNS = [finished(name, 0.9 + i / 100, 0.8, 0.05 - i / 100) for i, name in enumerate(NAMES)]


def test_rows_give_the_differences_here_and_those_of_the_file():
    heading, *rows = evidence.other_seeds(Arguments(), RUNS)
    found = evidence.read_evidence()
    assert heading[2] == f"mean of {len(found['seeds'])} other seeds"
    mean, low, high = found["differences"]["Fisher-SAM"]["accuracy"]
    assert ("Fisher-SAM, accuracy", "+0.0200", f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}") in rows
    assert len(rows) == 2 * len(evidence.FIGURES)


def test_what_was_not_measured_is_not_compared():
    runs = [dataclasses.replace(run, m_sharpness=None) for run in RUNS]
    assert {name.partition(", ")[2] for name, *_ in evidence.other_seeds(Arguments(), runs)[1:]} == {
        "accuracy",
        "4-bit accuracy",
    }


@pytest.mark.parametrize("words", [["--seed", "7"], ["--output_dir", "a"], ["--report", "none"], ["--use_cpu"]])
def test_options_that_change_no_setting_leave_the_comparison_the_default(words):
    assert evidence.other_seeds(parse(words), RUNS)


@pytest.mark.parametrize(
    "words", [["--learning_rate", "1e-3"], ["--sam_type", "none", "sam"], ["--train_file", "a.csv"], ["--rho", "0.1"]]
)
def test_other_comparisons_are_not_compared_with_other_seeds(words):
    assert evidence.other_seeds(parse(words), RUNS) == []


def test_interrupted_comparison_is_not_compared_with_other_seeds():
    assert evidence.other_seeds(Arguments(), [*RUNS[:2], dataclasses.replace(RUNS[2], total_steps=2)]) == []
    assert evidence.other_seeds(Arguments(), RUNS[:1]) == []


def test_file_is_the_summary_of_the_recorded_runs_and_its_seeds_are_not_the_default():
    load_bench()
    demo = pytest.importorskip("bench.demo")
    records = demo.recorded(demo.RESULTS)
    assert json.loads(evidence.FILE.read_text(encoding="utf-8")) == demo.summary(records)
    assert Arguments().seed not in [one["seed"] for one in records]
    assert all(one["figures"].keys() == set(NAMES) for one in records)
