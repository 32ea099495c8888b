"""`SAMTrainer` saves and evaluates clean weights, and a training that was killed resumes to the same bits."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fsam_triton import FisherMask
from tests.integration.tiny import assert_equal, batch_of, bert, copied, saved_in
from tests.processes import ROOT

pytest.importorskip("transformers")
import transformers

from fsam_triton.integrations.transformers import SAMTrainer
from tests.integration.sam_trainer import (
    SAM,
    TRAINING,
    assert_close,
    classifier,
    logged,
    sam_trainer,
    trained_by_closure,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class SaveEverywhere(transformers.TrainerCallback):
    """Saves the model between the second pass and the step, as transformers' own callback for SIGTERM does."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        model.save_pretrained(self.folder / f"before-{state.global_step + 1}")


def test_every_checkpoint_and_every_evaluation_is_of_the_clean_weights(tmp_path):
    trainer = sam_trainer(
        tmp_path,
        classifier(),
        given={"callbacks": [SaveEverywhere(tmp_path)], "eval_dataset": TRAINING},
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=40,
    )
    trainer.train()
    _, weights = trained_by_closure(classifier(), trainer.args, TRAINING, **SAM)
    model = classifier().eval()
    for step, (expected, measured) in enumerate(zip(weights, logged(trainer, "eval_loss"), strict=True), start=1):
        saved = saved_in(tmp_path / f"checkpoint-{step}")
        assert_close(saved, expected)
        if step < 5:
            assert_equal(saved_in(tmp_path / f"before-{step + 1}"), saved)
        model.load_state_dict(saved)
        with torch.no_grad():
            assert float(model(**batch_of(TRAINING)).loss) == pytest.approx(measured, abs=1e-6)


def resumable(folder: Path, same_dropout: bool, seed: int = 0, cls=SAMTrainer):
    """A training with dropout, shuffling, a mask and anchors, whose state is more than Adam's."""
    model = bert(seed)
    heads = {name for name, _ in model.named_parameters() if name.startswith("classifier")}
    kwargs = {**SAM, "l2_sp": 0.1, "novel": heads, "mask": FisherMask(0.3, interval=3)}
    return sam_trainer(
        folder,
        model,
        cls=cls,
        given={"optimizer_kwargs": kwargs, "same_dropout": same_dropout},
        max_steps=8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        train_sampling_strategy="random",
        save_strategy="steps",
        save_steps=2,
    )


class Killed(SAMTrainer):
    """Kills its process in a pass over the model, which `last_pass` counts from 0."""

    last_pass = 0

    def compute_loss(self, *args, **kwargs):
        import os
        import signal

        if self.last_pass == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.last_pass -= 1
        return super().compute_loss(*args, **kwargs)


def train_until_killed(folder: str, same_dropout: bool, last_pass: int) -> None:
    torch.set_num_threads(1)
    trainer = resumable(Path(folder), same_dropout, cls=Killed)
    trainer.last_pass = last_pass
    trainer.train()


@pytest.mark.parametrize("same_dropout", [False, True])
def test_training_killed_anywhere_and_resumed_ends_with_the_same_bits(same_dropout, tmp_path):
    """Four passes a step: the kill comes after the first checkpoint, in a clean or a perturbed pass."""
    last_pass = random.randrange(2 * 4 + 1, 8 * 4)
    print("killed in pass", last_pass)
    call = f"train_until_killed({str(tmp_path / 'killed')!r}, {same_dropout}, {last_pass})"
    code = f"from tests.integration.test_sam_trainer_checkpoints import train_until_killed; {call}"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == -9, run.stderr

    uninterrupted = resumable(tmp_path / "whole", same_dropout)
    uninterrupted.train()
    resumed = resumable(tmp_path / "killed", same_dropout, seed=1)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(copied(resumed.model), copied(uninterrupted.model))
