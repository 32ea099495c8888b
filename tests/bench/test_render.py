"""The page of the benchmarks shows what their committed results say."""

import json

import pytest

from bench.render import PAGES, Run, draw, load, render

MACHINE = {"cpu": "A CPU", "threads": 2, "torch": "2.13.0"}


def row(suite, implementation, seconds, **changed):
    defaults = {
        "suite": suite,
        "subject": "SAM",
        "implementation": implementation,
        "model": "BERT-base",
        "precision": "fp32",
        "device": "cpu",
        "weights": 10**6,
        "tensors": 10,
        "held_bytes": 12 * 10**6,
        "peak_bytes": 14 * 10**6,
        "bytes_per_weight": 48.0,
        "bandwidth": 6e10,
        "fraction": 0.8e-3 / seconds,
        "rates": [40e9, 60e9, 30e9],
        "min": seconds,
    }
    return defaults | changed


def run_of(*rows):
    return Run("here", "cpu", MACHINE, list(rows))


def lines_of(block, *runs):
    page = render(f"before\n\n<!-- {block} -->\n\nold\n\n<!-- /{block} -->\n\nafter", list(runs))
    return page.split("\n")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_page_shows_the_committed_results(path):
    page = path.read_text(encoding="utf-8")
    assert render(page, load()) == page, "run `python -m bench.render`"


def test_a_step_is_shown_per_weight_as_a_ratio_and_as_a_share_of_the_bandwidth():
    lines = lines_of("steps", run_of(row("steps", "FSAM", 1e-3), row("steps", "another", 2.5e-3)))
    assert "| FSAM | 48 | 1.00 ns, 80% |" in lines
    assert "| another | 48 | 2.50 ns (2.50x), 32% |" in lines


def test_a_ratio_is_to_the_first_of_the_same_algorithm_precision_and_model():
    lines = lines_of(
        "steps",
        run_of(
            row("steps", "FSAM", 1e-3),
            row("steps", "FSAM", 4e-3, model="MiniLM"),
            row("steps", "GSAM", 2e-3, subject="GSAM"),
            row("steps", "another", 3e-3, subject="GSAM"),
        ),
    )
    assert "| GSAM | 48 | 2.00 ns, 40% | - |" in lines
    assert "| another | 48 | 3.00 ns (1.50x), 27% | - |" in lines


def test_times_are_compared_at_equal_bandwidth():
    """The second one took as long, but the memory was twice as fast."""
    run = run_of(row("steps", "FSAM", 1e-3), row("steps", "another", 1e-3, fraction=0.4))
    assert "| another | 48 | 1.00 ns (2.00x), 40% |" in lines_of("steps", run)


def test_bandwidth_is_shown_with_its_range():
    run = run_of(*(row("steps", "FSAM", 1e-3, rates=[read, 60e9, 30e9]) for read in (40e9, 20e9, 35e9)))
    assert "| read | 35.0 | 20.0 | 40.0 |" in lines_of("bandwidth", run)


def test_memory_is_shown_per_weight():
    assert "| FSAM | 14.0 (12.0) |" in lines_of("memory", run_of(row("steps", "FSAM", 1e-3)))


def test_cost_of_a_tensor_is_the_slope_from_the_fewest_to_the_most():
    rows = [row("sizes", "FSAM", 1e-3), row("tensors", "FSAM", 1e-3), row("tensors", "FSAM", 3e-3, tensors=1010)]
    assert "Each tensor more, from the fewest to the most: FSAM: 2.00 µs." in lines_of("scaling", run_of(*rows))


def test_a_suite_without_a_table_of_its_own_is_shown_too():
    rows = [row("topk", "ours", 1e-3), row("topk", "torch.topk", 5e-3)]
    assert "| SAM | BERT-base | torch.topk | 5.00 ms | 5.00x | 14.00 MB |" in lines_of("topk", run_of(*rows))


def test_text_outside_the_marks_stays_and_old_tables_go():
    lines = lines_of("steps", run_of(row("steps", "FSAM", 1e-3)))
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines


def test_work_of_the_host_is_shown_with_what_each_tensor_adds():
    rows = [row("host", name, 1e-3 * n, model=f"{n}", tensors=n) for n in (10, 110) for name in ("FSAM", "another")]
    rows[-1]["min"] = 1.0
    lines = lines_of("host", run_of(*rows))
    assert "| SAM | 110 | another | 1.00e+03 ms | 9.09x | 14.00 MB |" in lines
    assert "Each tensor more, from the fewest to the most: FSAM: 1000.00 µs, another: 9900.00 µs." in lines


def test_runs_are_read_by_device(tmp_path):
    rows = [row("steps", "FSAM", 1e-3), row("steps", "FSAM", 1e-4, device="cuda")]
    (tmp_path / "benchmarks_b.json").write_text(json.dumps({"machine_info": MACHINE, "benchmarks": rows}))
    (tmp_path / "others.json").write_text("not a result")
    assert [(run.name, run.device, len(run.rows)) for run in load(tmp_path)] == [("b", "cpu", 1), ("b", "cuda", 1)]


def test_plots_are_the_same_bytes_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    run = run_of(*(row(suite, "FSAM", 1e-3) for suite in ("steps", "sizes", "tensors")))
    for folder in ("first", "second"):
        draw(run, tmp_path / folder)
    for kind in ("steps", "scaling"):
        first, second = ((tmp_path / folder / run.image(kind)).read_bytes() for folder in ("first", "second"))
        assert first == second
        assert b"FSAM" in first
