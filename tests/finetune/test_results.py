"""The files that are left: of an earlier command, after an interruption, on a full disk; and how a run is resumed."""

import contextlib
import importlib.util
import json
import re
import shutil

import pytest
import safetensors.torch
import torch

transformers = pytest.importorskip("transformers")

from fsam_triton import finetune, from_pretrained  # noqa: E402
from fsam_triton.finetune import training  # noqa: E402
from tests.finetune.running import files_of_at_most  # noqa: E402
from tests.finetune.running import results as written  # noqa: E402

NEW = ["--sam_type", "none", "--max_steps", "1"]


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def stopped(steps, run=0, error=KeyboardInterrupt):
    """Stop training with an error when a run, counted from 0, has made so many steps."""
    step, seen = training.Trainer.step, []

    def stopping(self, features):
        if self.run not in seen:
            seen.append(self.run)
        if len(seen) > run and len(self.run.losses) == steps:
            raise error
        return step(self, features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Trainer, "step", stopping)
        yield


# -- an earlier command ------------------------------------------------------------------------------------------------


def test_folder_that_is_not_empty_stops_before_training(options, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert finetune.main([*options, *NEW]) == 2
    assert f"--output_dir {tmp_path / 'out'}: not empty; --overwrite_output_dir" in capsys.readouterr().err
    assert names(tmp_path / "out") == {"thesis.txt"}


def test_hidden_files_do_not_make_a_folder_full(options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".gitignore").write_text("*")
    assert finetune.main([*options, *NEW]) == 0


@pytest.mark.parametrize("first", [["--trainable", "random", "--save_delta"], ["--trainable", "bitfit"], []])
@pytest.mark.parametrize("second", [["--trainable", "random", "--save_delta"], []])
def test_overwriting_leaves_the_new_files_and_those_of_others(options, tmp_path, first, second):
    out, clean = tmp_path / "out", tmp_path / "clean"
    assert finetune.main([*options, "--max_steps", "1", *first]) == 0
    (out / "none" / "notes.txt").write_text("mine")
    assert finetune.main([*options, *NEW, *second, "--overwrite_output_dir"]) == 0
    assert finetune.main([*options, *NEW, *second, "--output_dir", str(clean)]) == 0
    assert names(out) == names(clean) | {"none/notes.txt"}
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"none"}
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model = from_pretrained(None, out) if second else load(out)
    assert model.config.id2label == {0: "neg", 1: "pos"}


def test_files_that_the_results_name_outside_the_folder_are_left_alone(options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "out" / "all_results.json").write_text(json.dumps({"files": ["../mine.txt", "gone.txt", 3]}))
    assert finetune.main([*options, *NEW, "--overwrite_output_dir"]) == 0
    assert (tmp_path / "mine.txt").exists()


def test_adapter_of_peft_that_would_be_loaded_in_place_of_the_model_is_refused(options, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    assert finetune.main([*options, *NEW, "--overwrite_output_dir"]) == 2
    assert "adapter_config.json is PEFT's, and would be loaded in place of the model" in capsys.readouterr().err


def test_output_folder_that_is_a_file_stops_before_training(options, reviews, capsys):
    assert finetune.main([*options, "--output_dir", reviews]) == 2
    assert f"--output_dir {reviews}: File exists" in capsys.readouterr().err


def test_missing_matplotlib_costs_only_the_plot(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert finetune.main([*options, *NEW]) == 0
    assert "no training_curves.png: matplotlib is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out" / "training_curves.png").exists()


# -- interruptions -----------------------------------------------------------------------------------------------------


def test_interrupted_training_leaves_no_files(options, tmp_path, capsys):
    with stopped(steps=2):
        assert finetune.main([*options, "--sam_type", "none", "--trainable", "fish", "--save_delta"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "fsam-finetune: interrupted"
    assert not list((tmp_path / "out").iterdir())


def test_interrupted_comparison_keeps_the_runs_that_are_finished(options, tmp_path, capsys):
    with stopped(steps=2, run=1):
        assert finetune.main([*options, "--sam_type", "none", "sam", "gsam"]) == 130
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()[2:4]] == ["optimizer", "AdamW"]
    assert printed.err.splitlines()[-1] == "fsam-finetune: interrupted"
    assert [run["name"] for run in written(tmp_path)["runs"]] == ["AdamW"]
    assert {name for name in written(tmp_path)["files"] if "/" not in name} == {
        "all_results.json",
        "training_curves.png",
    }
    assert transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "none").num_labels == 2


def test_interrupted_run_keeps_its_figures_once_it_was_evaluated(options, tmp_path, capsys):
    with stopped(steps=5):
        assert finetune.main([*options, "--sam_type", "sam", "--max_steps", "8"]) == 130
    table = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in table[:2]] == ["optimizer", "SAM"]
    assert table[2] == "SAM: stopped after step 5 of 8"
    (run,) = written(tmp_path)["runs"]
    assert (len(run["losses"]), [step for step, *_ in run["evaluations"]], run["total_steps"]) == (5, [3], 8)
    assert run["peak_memory_bytes"] > 0
    assert names(tmp_path / "out") == {"all_results.json", "training_curves.png"}


def test_error_in_training_keeps_the_runs_that_are_finished(options, tmp_path):
    with stopped(steps=2, run=1, error=ZeroDivisionError), pytest.raises(ZeroDivisionError):
        finetune.main([*options, "--sam_type", "none", "sam"])
    assert [run["name"] for run in written(tmp_path)["runs"]] == ["AdamW"]


@pytest.mark.parametrize("more", [[], ["--trainable", "random", "--keep_ratio", "0.9", "--save_delta"]])
def test_model_that_does_not_fit_on_the_disk_costs_the_model_and_no_figures(options, tmp_path, capsys, more):
    with files_of_at_most(40_000):
        assert finetune.main([*options, "--sam_type", "none", *more]) == 1
    printed = capsys.readouterr()
    assert re.match(r"fsam-finetune: error: .*/out: .*too large", printed.err.splitlines()[-1])
    assert "Traceback" not in printed.err
    assert "\nAdamW " in printed.out
    assert [run["name"] for run in written(tmp_path)["runs"]] == ["AdamW"]
    assert not [name for name in names(tmp_path / "out") if name.startswith((".unfinished", "model", "fsam_delta"))]


def test_figures_that_do_not_fit_on_the_disk_are_printed(options, tmp_path, capsys):
    with files_of_at_most(100):
        assert finetune.main([*options, "--sam_type", "none"]) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith(f"fsam-finetune: error: {tmp_path}")
    assert "\nAdamW " in printed.out
    assert not list((tmp_path / "out").iterdir())


def test_checkpoint_that_does_not_fit_on_the_disk_is_an_error_of_one_line(options, tmp_path, capsys):
    with files_of_at_most(40_000):
        assert finetune.main([*options, "--sam_type", "none", "--save_steps", "1"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"fsam-finetune: error: {tmp_path / 'out' / 'checkpoint.pt'}: File too large"
    assert not list((tmp_path / "out").iterdir())


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture
def long(options, tiny_bert, tmp_path):
    """Options of a run of 8 steps, 3 to an epoch, of a model with dropout."""
    shutil.copytree(tiny_bert, tmp_path / "dropping")
    config = tmp_path / "dropping" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_dropout_prob": 0.1}))
    return [*options, "--model_name_or_path", str(tmp_path / "dropping"), "--max_steps", "8"]


def weights(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def curves(folder):
    runs = json.loads((folder / "all_results.json").read_text())["runs"]
    return [[run[key] for key in ("name", "losses", "evaluations", "mask_density", "rho_search")] for run in runs]


@pytest.mark.parametrize(
    ("more", "saved"),
    [
        (["--sam_type", "none", "--ema_decay", "0.9"], 2),
        (["--sam_type", "none", "--trainable", "fish", "--keep_ratio", "0.5"], 2),
        (["--sam_type", "sam", "--rho", "auto", "--sam_every", "3", "--sam_reuse", "0.7"], 2),
        (["--sam_type", "esam", "--mixup_alpha", "1", "--gamma", "1"], 3),  # after an epoch, before its evaluation
        (["--sam_type", "fisher-sam", "--mask_interval", "3", "--l2_sp", "0.1"], 2),
        (["--sam_type", "fisher-gsam", "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "8"], 3),
        (["--sam_type", "momentum-sam", "--rho_follows", "cosine"], 2),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else str(value),
)
def test_resumed_run_is_the_one_that_was_not_interrupted(long, tmp_path, more, saved):
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert finetune.main([*long, *more, "--output_dir", str(whole)]) == 0
    with stopped(steps=5):
        assert finetune.main([*long, *more, "--save_steps", str(saved)]) == 130
    assert (out / "checkpoint.pt").exists()
    assert finetune.main([*long, *more, "--resume_from_checkpoint"]) == 0
    assert curves(out) == curves(whole)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(out)[name]), name
    assert names(out) == names(whole)


@pytest.mark.slow
def test_resumed_comparison_does_not_repeat_what_was_finished(long, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    long = [*long, "--sam_type", "none", "sam", "gsam"]
    assert finetune.main([*long, "--output_dir", str(whole)]) == 0
    with stopped(steps=3, run=1):
        assert finetune.main([*long, "--save_steps", "2"]) == 130
    before = (out / "none" / "model.safetensors").stat().st_mtime_ns
    with stopped(steps=0, run=1):
        assert finetune.main([*long, "--resume_from_checkpoint", "--save_steps", "100"]) == 130
    assert finetune.main([*long, "--resume_from_checkpoint"]) == 0
    assert (out / "none" / "model.safetensors").stat().st_mtime_ns == before
    assert curves(out) == curves(whole)
    assert names(out) == names(whole)


def test_checkpoint_of_other_options_is_refused(long, tmp_path, capsys):
    with stopped(steps=2):
        assert finetune.main([*long, "--save_steps", "1"]) == 130
    checkpoint = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    assert finetune.main([*long, "--learning_rate", "1e-3", "--resume_from_checkpoint"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--resume_from_checkpoint: learning_rate is 0.001; in " in line
    assert line.endswith("checkpoint.pt it is 0.003")
    assert finetune.main([*long, "--max_train_samples", "20", "--resume_from_checkpoint"]) == 2
    (tmp_path / "out" / "checkpoint.pt").write_bytes(checkpoint[:1000])
    assert finetune.main([*long, "--resume_from_checkpoint"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"no mask")])
def test_checkpoint_without_its_mask_is_refused(long, tmp_path, capsys, damage):
    long = [*long, "--sam_type", "none", "--trainable", "random"]
    with stopped(steps=2):
        assert finetune.main([*long, "--save_steps", "1"]) == 130
    damage(tmp_path / "out" / "mask.safetensors")
    assert finetune.main([*long, "--resume_from_checkpoint"]) == 2
    assert capsys.readouterr().err.endswith("mask.safetensors is missing or damaged\n")


def test_folder_without_a_checkpoint_cannot_be_resumed(options, tmp_path, capsys):
    assert finetune.main([*options, "--resume_from_checkpoint"]) == 2
    message = f"--resume_from_checkpoint: {tmp_path / 'out' / 'checkpoint.pt'} does not exist"
    assert capsys.readouterr().err == f"fsam-finetune: error: {message}\n"
