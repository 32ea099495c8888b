"""What an interrupted run of a language model leaves behind, and how it is resumed."""

import contextlib
import json

import pytest
import safetensors.torch
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

from fsam_triton import finetune
from fsam_triton.finetune import sft
from tests.finetune.running import files_of_at_most


@contextlib.contextmanager
def stopped(steps, run=0):
    """Press Ctrl-C when a run, counted from 0, begins its next step after so many."""
    begin, seen = sft.Notes.on_step_begin, []

    def stopping(self, *arguments, **keywords):
        if self not in seen:
            seen.append(self)
        if len(seen) > run and len(self.trainer.run.losses) == steps:
            raise KeyboardInterrupt
        return begin(self, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft.Notes, "on_step_begin", stopping)
        yield


def curves(folder):
    runs = json.loads((folder / "all_results.json").read_text())["runs"]
    return [(run["name"], run["losses"], run["evaluations"], run["mask_density"]) for run in runs]


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def weights(folder):
    (path,) = folder.glob("*model.safetensors")
    return safetensors.torch.load_file(path)


@pytest.fixture
def long(lm_options):
    """Options of a run of 8 steps, 5 to an epoch, of a model with dropout."""
    return [*lm_options, "--max_steps", "8"]


@pytest.mark.parametrize(
    ("more", "saved", "last"),
    [
        (["--sam_type", "none", "--ema_decay", "0.9"], 2, 6),
        (
            ["--sam_type", "sam", "--sam_every", "3", "--sam_reuse", "0.7"],
            5,
            7,
        ),  # after an epoch, before its evaluation
        (["--sam_type", "fisher-gsam", "--mask_interval", "3", "--l2_sp", "0.1"], 2, 3),
        (["--sam_type", "momentum-sam", "--rho_follows", "cosine", "--gradient_accumulation_steps", "2"], 4, 5),
        (["--sam_type", "sam", "--lora", "--packing"], 2, 3),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else str(value),
)
def test_resumed_run_is_the_one_that_was_not_interrupted(long, tmp_path, more, saved, last):
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert finetune.main([*long, *more, "--output_dir", str(whole)]) == 0
    with stopped(steps=last):
        assert finetune.main([*long, *more, "--save_steps", str(saved)]) == 130
    assert finetune.main([*long, *more, "--resume_from_checkpoint"]) == 0
    assert curves(out) == curves(whole)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(out)[name]), name
    assert names(out) == names(whole)


@pytest.mark.slow
def test_resumed_comparison_does_not_repeat_what_was_finished(long, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    long = [*long, "--sam_type", "none", "sam"]
    assert finetune.main([*long, "--output_dir", str(whole)]) == 0
    with stopped(steps=3, run=1):
        assert finetune.main([*long, "--save_steps", "2"]) == 130
    assert [path.name for path in (out / "trainer_checkpoints").glob("*/checkpoint-*")] == ["checkpoint-2"]
    before = (out / "none" / "model.safetensors").stat().st_mtime_ns
    assert finetune.main([*long, "--resume_from_checkpoint"]) == 0
    assert (out / "none" / "model.safetensors").stat().st_mtime_ns == before
    assert curves(out) == curves(whole)
    assert names(out) == names(whole)


def test_interrupted_run_leaves_no_files_unless_it_was_evaluated(long, tmp_path):
    with stopped(steps=2):
        assert finetune.main([*long, "--sam_type", "sam"]) == 130
    assert not list((tmp_path / "out").iterdir())
    with stopped(steps=6):
        assert finetune.main([*long, "--sam_type", "sam"]) == 130
    ((_, losses, evaluations, _),) = curves(tmp_path / "out")
    assert (len(losses), [step for step, *_ in evaluations]) == (6, [5])
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_checkpoints_of_an_overwritten_run_are_not_taken_for_the_new_ones(long, tmp_path):
    long = [*long, "--sam_type", "none", "--save_steps", "2"]
    for steps in (7, 3):
        with stopped(steps=steps):
            assert finetune.main([*long, "--overwrite_output_dir"]) == 130
    assert [path.name for path in (tmp_path / "out").glob("trainer_checkpoints/none/checkpoint-*")] == ["checkpoint-2"]


def test_checkpoint_whose_folder_is_gone_is_refused(long, tmp_path, capsys):
    long = [*long, "--sam_type", "none"]
    with stopped(steps=3):
        assert finetune.main([*long, "--save_steps", "2"]) == 130
    folder = tmp_path / "out" / "trainer_checkpoints" / "none" / "checkpoint-2"
    (folder / "trainer_state.json").unlink()
    capsys.readouterr()
    assert finetune.main([*long, "--resume_from_checkpoint"]) == 2
    message = f"fsam-finetune: error: --resume_from_checkpoint: {folder} is missing or damaged"
    assert capsys.readouterr().err.splitlines()[-1] == message


@pytest.mark.parametrize("more", [["--save_steps", "2"], []], ids=["checkpoint", "model"])
def test_what_does_not_fit_on_the_disk_is_an_error_of_one_line(long, tmp_path, capsys, more):
    with files_of_at_most(10_000):
        assert finetune.main([*long, "--sam_type", "none", *more]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    place = tmp_path / "out" / "trainer_checkpoints" / "none" if more else tmp_path / "out"
    assert line.startswith(f"fsam-finetune: error: {place}: ")
    assert "too large" in line
    assert not list((tmp_path / "out").glob("*.safetensors"))
