"""Training some of the weights: which they are, what is saved of them, and that workers merge them."""

import os
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from fsam_triton import FishMask, finetune, from_pretrained  # noqa: E402
from fsam_triton.finetune import models, training  # noqa: E402
from tests.finetune.running import WORDS, results, trained  # noqa: E402


def logits(model, tiny_bert):
    batch = transformers.AutoTokenizer.from_pretrained(tiny_bert)(WORDS, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["fish", "random", "bitfit"])
@pytest.mark.parametrize("sam_type", ["none", "sam", "momentum-sam"])
def test_adapter_reloads_with_the_logits_of_the_whole_model(options, tiny_bert, tmp_path, trainable, sam_type):
    options = [*options, "--trainable", trainable, "--sam_type", sam_type, "--rho", "0.01"][
        : None if sam_type != "none" else -2
    ]
    trained(options)
    trained(options, "--save_delta", "--output_dir", str(tmp_path / "small"))
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    reloaded = from_pretrained(None, tmp_path / "small")
    assert torch.equal(logits(reloaded, tiny_bert), logits(whole, tiny_bert))
    assert reloaded.config.id2label == {0: "neg", 1: "pos"}


@pytest.mark.parametrize("trainable", ["fish", "random", "bitfit"])
def test_few_weights_and_the_head_learn_a_task_that_one_word_decides(options, trainable):
    share = [] if trainable == "bitfit" else ["--keep_ratio", "0.035"]  # BitFit's own here
    line = [*options, "--sam_type", "none", "--trainable", trainable, *share]
    (run,) = trained(line, "--max_steps", "60", "--learning_rate", "2e-2")
    _, accuracy, loss = run.evaluations[-1]
    assert accuracy == 1.0
    assert loss < 0.5  # by chance: log 2, that is 0.69


@pytest.mark.parametrize(("trainable", "share"), [("fish", 0.005), ("random", 0.005), ("bitfit", None)])
def test_mask_is_written_and_holds_the_head_and_what_was_trained(
    options, tiny_bert, tmp_path, capsys, trainable, share
):
    trained(options, "--sam_type", "none", "--trainable", trainable)
    mask = FishMask.load(tmp_path / "out" / "mask.safetensors")
    base, novel = models.load_model(tiny_bert, ["neg", "pos"])
    assert mask.count == (int(share * mask.total) if share else FishMask.bias_only(base, sorted(novel)).count)
    assert {mask.density_by_tensor()[name] for name in novel} == {1.0}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    for (name, before), after in zip(base.named_parameters(), model.parameters(), strict=True):
        if name not in novel:  # whose initial values are another draw here
            assert torch.equal(before[~mask.bits(name)], after[~mask.bits(name)]), name
            assert mask.indices(name).numel() == 0 or not torch.equal(before, after), name
    assert (tmp_path / "out" / "mask.txt").read_text() == mask.table() + "\n"
    assert results(tmp_path)["trained_weights"] == mask.count
    assert f"\ntrained weights: {mask.count:,} of {mask.total:,} (" in capsys.readouterr().out


def test_compared_runs_train_the_same_weights(options, tmp_path):
    adamw, sam = trained(options, "--trainable", "fish", "--save_delta", "--sam_type", "none", "sam")
    assert (adamw.name, sam.name) == ("AdamW", "SAM")
    assert adamw.losses[0] == sam.losses[0]
    assert adamw.losses[1:] != sam.losses[1:]
    out = tmp_path / "out"
    shared = {"mask.txt", "mask.safetensors", "all_results.json", "training_curves.png"}
    assert {path.name for path in out.iterdir()} == {"none", "sam", *shared}
    for folder in ("none", "sam"):
        assert {path.name for path in (out / folder).iterdir()} == {"fsam_delta.safetensors", "fsam_delta_config.json"}


@pytest.mark.parametrize(("more", "sizes"), [([], [16, 16, 4]), (["--num_fisher_samples", "20"], [16, 4])])
@pytest.mark.filterwarnings("error:estimate_fisher")
def test_fisher_information_is_of_so_many_training_texts_or_of_all(options, monkeypatch, more, sizes):
    seen = []
    estimate = training.estimate_fisher

    def noted(model, batches, *arguments):
        batches = list(batches)
        seen.extend(len(batch["labels"]) for batch in batches)
        assert {label for batch in batches for label in batch["labels"].tolist()} == {0, 1}
        return estimate(model, batches, *arguments)

    monkeypatch.setattr(training, "estimate_fisher", noted)
    trained(options, "--sam_type", "none", "--trainable", "fish", "--max_steps", "1", *more)
    assert seen == sizes


def run_with_torchrun(options, *more):
    """Run the command line in two processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "fsam_triton.finetune", *options, *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_two_workers_merge_what_they_train_and_the_first_reports(options, tmp_path):
    mask = ["--trainable", "random", "--keep_ratio", "0.3", "--sam_type", "sam", "--rho", "0.01"]
    lengths = ["--max_steps", "-1", "--num_train_epochs", "10", "--per_device_train_batch_size", "8"]
    page = ["--report", str(tmp_path)]
    done = run_with_torchrun(options, *mask, *lengths, *page, "--local_steps", "3", "--save_delta")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training and") == done.stdout.count("written to") == done.stdout.count("report: ") == 1
    assert (tmp_path / "report.html").exists()
    (run,) = results(tmp_path)["runs"]
    # 5 batches of 8: two for each worker in an epoch, one for nobody.
    assert len(run["losses"]) == 20
    assert len(run["evaluations"]) == 10
    assert run["eval_accuracy"] == 1.0
    model = from_pretrained(None, tmp_path / "out").eval()
    assert isinstance(model, transformers.PreTrainedModel)


def test_local_steps_without_a_mask_are_refused(options, capsys):
    assert finetune.main([*options, "--local_steps", "3"]) == 2
    assert "--local_steps needs --trainable fish, random or bitfit" in capsys.readouterr().err
