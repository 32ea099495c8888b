"""The files that are left: of an earlier command, after an interruption, on a full disk, and where one is resumed."""

import importlib.util

import pytest

pytest.importorskip("transformers")

from fsam_triton import finetune
from fsam_triton.finetune import training
from tests.finetune.running import trained


def test_interrupted_training_leaves_no_files(options, tmp_path, monkeypatch):
    step = training.Trainer.step

    def interrupted(self, features):
        if len(self.run.losses) == 2:
            raise KeyboardInterrupt
        return step(self, features)

    monkeypatch.setattr(training.Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(options, "--sam_type", "none", "--trainable", "fish", "--save_delta")
    assert not list((tmp_path / "out").iterdir())


def test_output_folder_that_is_a_file_stops_before_training(options, reviews, capsys):
    assert finetune.main([*options, "--output_dir", reviews]) == 2
    assert f"--output_dir {reviews}: File exists" in capsys.readouterr().err


def test_missing_matplotlib_costs_only_the_plot(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert finetune.main([*options, "--sam_type", "none", "--max_steps", "1"]) == 0
    assert "no training_curves.png: matplotlib is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out" / "training_curves.png").exists()
