"""A training run: what it learns from, at which weights, in which order."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from fsam_triton import FishMask  # noqa: E402
from fsam_triton.finetune import command, models, training  # noqa: E402
from fsam_triton.finetune.optimizers import build_optimizer  # noqa: E402
from fsam_triton.finetune.options import SAM_TYPES, Arguments  # noqa: E402
from fsam_triton.finetune.parser import parse  # noqa: E402
from fsam_triton.finetune.texts import read_texts  # noqa: E402
from tests.finetune.running import trained  # noqa: E402


@pytest.mark.parametrize("sam_type", SAM_TYPES)
def test_every_sam_type_learns_a_task_that_one_word_decides(options, sam_type):
    # So small a radius, because ESAM's choice of samples is close to a choice of one label for so small a network.
    radius = [] if sam_type == "none" else ["--rho", "0.01"]
    (run,) = trained(options, "--sam_type", sam_type, "--max_steps", "40", *radius)
    _, accuracy, loss = run.evaluations[-1]
    assert accuracy == 1.0
    assert loss < 0.5  # by chance: log 2, that is 0.69


@pytest.mark.parametrize("sam_type", ["esam", "fisher-esam", "gsam", "momentum-sam"])
def test_every_kind_of_step_works_under_autocast(options, sam_type):
    (single,) = trained(options, "--sam_type", sam_type)
    (half,) = trained(options, "--sam_type", sam_type, "--bf16")
    assert half.losses != single.losses
    # bfloat16 rounds to 2**-9; two layers and four steps add up to a few times that.
    assert half.losses == pytest.approx(single.losses, rel=0.05)


SMALL = ("--dtype", "bfloat16", "--state_format", "8bit", "--master_weights", "24bit")


@pytest.mark.parametrize(
    "words",
    [
        ("--sam_type", "sam", "--backup_format", "8bit"),
        ("--sam_type", "momentum-sam", "--rho", "0.01", "--release_gradients", "--max_grad_norm", "0"),
        ("--sam_type", "none", "--release_gradients", "--max_grad_norm", "0"),
    ],
    ids=["sam", "momentum-sam", "none"],
)
def test_memory_is_saved_at_the_same_losses(options, words):
    plain = [word for word in words if word not in ("--backup_format", "8bit", "--release_gradients")]
    (single,), (small,) = trained(options, *plain), trained(options, *words, *SMALL)
    assert small.losses != single.losses
    # bfloat16 rounds to 2**-9; two layers and four steps add up to a few times that.
    assert small.losses == pytest.approx(single.losses, rel=0.05)


def test_second_gradient_of_esam_is_of_the_part_of_the_batch_that_gamma_says(options, monkeypatch):
    sizes = []
    forward = training.Trainer.forward

    def counted(self, batch):
        if self.model.training:
            sizes.append(len(batch["input_ids"]))
        return forward(self, batch)

    monkeypatch.setattr(training.Trainer, "forward", counted)
    trained(options, "--sam_type", "esam", "--gamma", "0.25", "--max_steps", "1")
    assert sizes == [16, 16, 4]


def test_sharpness_aware_steps_keep_to_the_end_of_the_run_that_sam_last_says(options):
    late, adamw = trained(options, "--sam_type", "sam", "none", "--sam_last", "0.5", "--rho", "0.5")
    assert late.losses[:3] == adamw.losses[:3]
    assert late.losses[3] != adamw.losses[3]


def test_compared_runs_start_from_the_same_head_and_batch(options):
    adamw, fsam = trained(options, "--sam_type", "none", "fisher-sam")
    assert adamw.losses[0] == fsam.losses[0]
    assert adamw.losses[1:] != fsam.losses[1:]


def test_without_perturbation_fsam_sees_the_same_batches_as_adamw(options):
    adamw, momentum, fsam = trained(options, "--rho", "0")
    assert adamw.losses == momentum.losses
    assert adamw.losses == fsam.losses


def test_momentum_sam_is_evaluated_at_the_clean_weights(options, tiny_bert):
    arguments = parse(options)
    tokenizer = models.load_tokenizer(tiny_bert)
    features = models.encode(tokenizer, command.read_data(arguments)[0], 32, ["neg", "pos"])
    trainer = training.Trainer(arguments, "momentum-sam", tiny_bert, ["neg", "pos"], tokenizer, total_steps=4)
    trainer.train(features, features)
    weight = trainer.model.classifier.weight
    clean = weight.detach().clone()
    logits = trainer.logits(features)
    trainer.model.train()
    trainer.forward(trainer.collate(features))
    assert not torch.equal(weight, clean)
    assert torch.equal(trainer.logits(features), logits)


def test_training_is_reproducible_from_the_seed(options):
    first, again, other = (trained(options, "--seed", seed, "--sam_type", "fisher-sam")[0] for seed in "778")
    assert first.losses == again.losses
    assert first.evaluations == again.evaluations
    assert first.losses != other.losses


def test_epochs_may_be_fractions_and_evaluation_follows_each_and_the_end(options):
    (run,) = trained(options, "--sam_type", "none", "--max_steps", "-1", "--num_train_epochs", "1.5")
    assert len(run.losses) == 5
    assert [step for step, _, _ in run.evaluations] == [3, 5]


def test_bf16_computes_in_bfloat16_and_keeps_fp32_weights(options, tmp_path):
    (single,) = trained(options, "--sam_type", "fisher-sam")
    (half,) = trained(options, "--sam_type", "fisher-sam", "--bf16")
    assert half.losses != single.losses
    assert half.losses == pytest.approx(single.losses, rel=0.05)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def decay_step(tiny_bert, some=None, **keywords):
    """Move every parameter by 1, make a step with zero gradients, and return (before the move, after the step).

    Args:
        some: makes a mask of the model; what it selects is trained alone.
    """
    arguments = Arguments(learning_rate=0.1, **keywords)
    model, novel = models.load_model(tiny_bert, ["a", "b"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(arguments, "none", model, novel, 1, some and some(model))
    for p in model.parameters():
        with torch.no_grad():
            p.add_(1.0)
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return before, {name: p.detach() for name, p in model.named_parameters()}


def test_l2_sp_pulls_the_body_to_its_pretrained_values_and_weight_decay_the_head_to_zero(tiny_bert):
    before, after = decay_step(tiny_bert, l2_sp=0.5, weight_decay=0.2)
    for name in ("bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.0.output.dense.bias"):
        torch.testing.assert_close(after[name], before[name] + 0.95)
    torch.testing.assert_close(after["classifier.weight"], (before["classifier.weight"] + 1) * 0.98)


def test_l2_sp_pulls_only_weights_that_are_trained(tiny_bert):
    before, after = decay_step(tiny_bert, FishMask.bias_only, l2_sp=0.5)
    name = "bert.encoder.layer.0.output.dense."
    torch.testing.assert_close(after[name + "bias"], before[name + "bias"] + 0.95)
    assert torch.equal(after[name + "weight"], before[name + "weight"] + 1)


def test_biases_and_norm_layers_do_not_decay(tiny_bert):
    before, after = decay_step(tiny_bert, weight_decay=0.2)
    for name in ("classifier.bias", "bert.encoder.layer.0.output.LayerNorm.weight"):
        torch.testing.assert_close(after[name], before[name] + 1)
    torch.testing.assert_close(after["classifier.weight"], (before["classifier.weight"] + 1) * 0.98)


@pytest.mark.parametrize("sam_type", ["none", "momentum-sam"])
def test_average_of_the_weights_is_what_is_evaluated_and_saved(options, tiny_bert, reviews, tmp_path, sam_type):
    options = [*options, "--sam_type", sam_type]
    (plain,) = trained(options)
    (averaged,) = trained(options, "--ema_decay", "0.9")
    assert averaged.losses == plain.losses
    assert averaged.evaluations != plain.evaluations
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    texts = read_texts(reviews)
    rows = models.encode(models.load_tokenizer(tiny_bert), texts, 32, ["neg", "pos"])
    batch = transformers.DataCollatorWithPadding(models.load_tokenizer(tiny_bert))(rows)
    with torch.no_grad():
        loss = float(saved(**batch).loss)
    # The mean of 36 losses in fp32, of batches of other sizes.
    assert loss == pytest.approx(averaged.evaluations[-1][2], rel=1e-5)
    assert loss != pytest.approx(plain.evaluations[-1][2], rel=1e-3)


@pytest.mark.parametrize("where", ["pooled", "embeddings"])
def test_both_passes_of_a_step_mix_alike_from_the_start_on(options, where):
    """SAM without a perturbation takes its second gradient from the same mixed rows as AdamW its only one."""
    options = [*options, "--sam_type", "none", "sam", "--rho", "0"]
    plain, _ = trained(options)
    adamw, sam = trained(options, "--mixup_alpha", "1", "--mixup_where", where)
    assert adamw.losses == sam.losses
    assert adamw.losses[:2] == plain.losses[:2]
    assert adamw.losses[2] != plain.losses[2]


@pytest.mark.parametrize("sam_type", ["none", "esam"])
def test_loss_is_linear_in_the_share_of_the_label_that_is_smoothed(options, sam_type):
    options = [*options, "--sam_type", sam_type, "--max_steps", "1", "--label_smoothing_factor"]
    none, tenth, fifth = (trained(options, share)[0].losses[0] for share in ("0", "0.1", "0.2"))
    assert tenth != pytest.approx(none, rel=1e-3)
    assert fifth - none == pytest.approx(2 * (tenth - none), rel=1e-3)


@pytest.mark.parametrize("sam_type", ["none", "sam", "gsam", "fisher-sam", "momentum-sam"])
def test_accumulated_batches_are_one_batch(options, sam_type):
    """36 texts in steps of 15: the third has a batch of one text beside one of five."""
    options = [*options, "--sam_type", sam_type, "--rho", "0.01"][: -2 if sam_type == "none" else None]
    (whole,) = trained(options, "--per_device_train_batch_size", "15")
    (parts,) = trained(options, "--per_device_train_batch_size", "5", "--gradient_accumulation_steps", "3")
    # Sums in another order; four steps of Adam, which divides by small numbers, amplify the rounding of fp32.
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)
    assert [step for step, *_ in parts.evaluations] == [step for step, *_ in whole.evaluations] == [3, 4]


def test_accumulated_batches_are_mixed_alike_in_both_passes(options):
    """As without accumulation: SAM without a perturbation is AdamW."""
    options = [*options, "--per_device_train_batch_size", "5", "--gradient_accumulation_steps", "3"]
    adamw, sam = trained(
        [*options, "--sam_type", "none", "sam", "--rho", "0", "--mixup_alpha", "1", "--mixup_start", "0"]
    )
    assert adamw.losses == sam.losses


def test_progress_says_what_is_being_waited_for(options, capsys):
    trained(options, "--sam_type", "none")
    shown = capsys.readouterr().err
    assert "first step: compiling" in shown
    assert "AdamW: evaluating: " in shown.partition("4/4")[2]
    assert "accuracy=" in shown.rpartition("AdamW: evaluating: ")[2]
    assert "AdamW: evaluating with 4-bit weights: " in shown.rpartition("accuracy=")[2]


def test_label_noise_makes_a_share_of_the_training_labels_wrong_and_says_so(options):
    clean, noisy = (command.prepare(parse([*options, "--label_noise", noise])) for noise in ("0", "0.25"))
    labels, wrong = ([feature["labels"] for feature in task.train] for task in (clean, noisy))
    assert sum(a != b for a, b in zip(labels, wrong, strict=True)) == 0.25 * len(labels)
    assert noisy.validation == clean.validation
    assert noisy.description == f"{clean.description}; 0.25 of the training labels are wrong (--label_noise)"
