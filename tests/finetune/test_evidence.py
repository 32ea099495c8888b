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


def test_notes_give_the_differences_here_and_those_of_the_file():
    lines = evidence.notes(Arguments(), RUNS)
    found = evidence.read_evidence()
    assert f"at {len(found['seeds'])} other seeds" in lines[0]
    mean, low, high = found["differences"]["Fisher-SAM"]["accuracy"]
    assert f"  Fisher-SAM   accuracy        +0.0200   {mean:+.4f} [{low:+.4f}, {high:+.4f}]" in lines
    assert len(lines) == 1 + 2 * len(evidence.FIGURES)


def test_what_was_not_measured_is_not_compared():
    runs = [dataclasses.replace(run, m_sharpness=None) for run in RUNS]
    assert not [line for line in evidence.notes(Arguments(), runs) if "m-sharpness" in line]


@pytest.mark.parametrize("words", [["--seed", "7"], ["--output_dir", "a"], ["--report", "none"], ["--use_cpu"]])
def test_options_that_change_no_setting_leave_the_comparison_the_default(words):
    assert evidence.notes(parse(words), RUNS)


@pytest.mark.parametrize(
    "words", [["--learning_rate", "1e-3"], ["--sam_type", "none", "sam"], ["--train_file", "a.csv"], ["--rho", "0.1"]]
)
def test_other_comparisons_have_no_notes(words):
    assert evidence.notes(parse(words), RUNS) == []


def test_interrupted_comparison_has_no_notes():
    assert evidence.notes(Arguments(), [*RUNS[:2], dataclasses.replace(RUNS[2], total_steps=2)]) == []
    assert evidence.notes(Arguments(), RUNS[:1]) == []


def test_file_is_the_summary_of_the_recorded_runs_and_its_seeds_are_not_the_default():
    load_bench()
    demo = pytest.importorskip("bench.demo")
    records = demo.recorded(demo.RESULTS)
    assert json.loads(evidence.FILE.read_text(encoding="utf-8")) == demo.summary(records)
    assert Arguments().seed not in [one["seed"] for one in records]
    assert all(one["figures"].keys() == set(NAMES) for one in records)
