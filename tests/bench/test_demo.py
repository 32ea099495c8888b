"""The evidence about the default comparison: its statistics, its table, and the page that shows it."""

import pathlib
import shutil

import pytest
import scipy.stats

pytest.importorskip("transformers")

from bench import demo
from bench.generalisation import put_into
from bench.records import recorded

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "evidence.md"
ADAMW, SAM = [0.90, 0.91, 0.89, 0.92], [0.92, 0.92, 0.92, 0.92]
RECORDS = [
    {"seed": seed, "figures": {"AdamW": dict.fromkeys(demo.FIGURES, a), "SAM": dict.fromkeys(demo.FIGURES, b)}}
    for seed, (a, b) in enumerate(zip(ADAMW, SAM, strict=True), start=1)
]


def test_summary_has_the_mean_and_the_interval_of_paired_differences():
    found = demo.summary(RECORDS)
    interval = scipy.stats.ttest_rel(SAM, ADAMW).confidence_interval(0.95)
    assert found["seeds"] == [1, 2, 3, 4]
    assert found["differences"].keys() == {"SAM"}
    for figures in found["differences"]["SAM"].values():
        assert figures == pytest.approx([0.015, interval.low, interval.high], abs=1e-6)


def test_report_has_a_table_for_each_figure():
    report = demo.report(RECORDS)
    assert report.startswith("4 seeds\n")
    for name in demo.FIGURES:
        assert f"\n{name}" in report
    assert report.count("SAM             0.9200  +0.0150 [") == len(demo.FIGURES)
    assert demo.report([]) == "no runs"


def test_page_is_of_the_recorded_runs(tmp_path):
    copy = tmp_path / "evidence.md"
    shutil.copy(PAGE, copy)
    put_into(copy, demo.report(recorded(demo.RESULTS)), demo.MARKER)
    assert copy.read_text() == PAGE.read_text()
