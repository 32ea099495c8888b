"""Two-pass sharpness-aware steps under transformers' Trainer, against loops written by hand and Trainer's own steps."""

import functools
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, AdamWL2SP, FisherMask, MomentumSAM, Schedule
from fsam_triton import SAM as SAM_AROUND
from tests.integration.tiny import assert_equal, batch_of, bert, copied, samples, saved_in

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("fsam_triton.integrations.transformers")
SAMTrainer, create_optimizer = integration.SAMTrainer, integration.create_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
TRAINING = samples(40, 1)
# A gradient that is zero in exact arithmetic (of a key's bias, say) is some 1e-9 of rounding, and Adam would step
# by lr for it. With this epsilon a difference of 1e-7 between two gradients moves a weight by lr * 1e-7 / 1e-2 = 1e-7.
STEADY = {"learning_rate": 1e-2, "adam_epsilon": 1e-2, "lr_scheduler_type": "constant"}
SAM = {"rho": 0.5}


class SAMSeq2SeqTrainer(integration.SharpnessAwareMixin, transformers.Seq2SeqTrainer):
    pass


def arguments_for(folder: Path, cls=transformers.TrainingArguments, **arguments):
    arguments = {
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 0,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        **STEADY,
        **arguments,
    }
    return cls(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **arguments)


def sam_trainer(folder: Path, model: nn.Module, *, cls=SAMTrainer, data=TRAINING, given=(), **arguments):
    given = {"optimizer_kwargs": SAM, **dict(given)}
    return cls(model, arguments_for(folder, **arguments), train_dataset=data, **given)


def plain_trainer(folder: Path, model: nn.Module, *, data=TRAINING, given=(), **arguments):
    return transformers.Trainer(model, arguments_for(folder, **arguments), train_dataset=data, **dict(given))


def trained(trainer):
    trainer.train()
    return trainer


def classifier(seed: int = 0) -> nn.Module:
    """BERT without dropout. Its loss is the mean of a micro-batch: of the number of all labels it makes no use."""
    model = bert(seed, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.accepts_loss_kwargs = False
    return model


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, max_position_embeddings=8, **config))


def padded_samples() -> list[dict[str, Tensor]]:
    """Sentences of 2 to 8 tokens, the short ones in the same micro-batches."""
    rows = []
    for i, row in enumerate(samples(40, 1)):
        tokens, length = row["input_ids"], 2 + i // 4 % 4 * 2
        mask = (torch.arange(8) < length).long()
        rows.append({"input_ids": tokens, "attention_mask": mask, "labels": tokens.where(mask == 1, -100)})
    return rows


def whole_sentences() -> list[dict[str, Tensor]]:
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"].flip(0)} for row in TRAINING]


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.accepts_loss_kwargs = False
    return model


def batches(data: list[dict[str, Tensor]], steps: int) -> list[dict[str, Tensor]]:
    """The data in batches of 16, the last one of an epoch being smaller, epoch after epoch."""
    starts = range(0, len(data), 16)
    return [batch_of(data[starts[step % len(starts)] :][:16]) for step in range(steps)]


def trained_by_closure(model: nn.Module, args, data, *, loss_of=lambda model, batch: model(**batch).loss, **kwargs):
    """Losses and weights of each step of a loop over whole batches, with FSAM.step(closure)."""
    optimizer = create_optimizer(model, args, **kwargs)
    losses, weights = [], []
    for batch in batches(data, args.max_steps):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
        weights.append(copied(model))
    return losses, weights


def assert_close(weights: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """To 1e-5: two sums in another order differ by some 1e-7, see STEADY."""
    for name, weight in weights.items():
        torch.testing.assert_close(
            weight, others[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def logged(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


MODELS = {
    "classifier": (classifier, TRAINING, SAMTrainer, transformers.TrainingArguments),
    "language model": (llama, padded_samples(), SAMTrainer, transformers.TrainingArguments),
    "encoder-decoder": (t5, whole_sentences(), SAMSeq2SeqTrainer, transformers.Seq2SeqTrainingArguments),
}


# -- the step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 4])
@pytest.mark.parametrize("kind", MODELS)
def test_steps_are_those_of_a_closure_over_the_whole_batch(kind, size, tmp_path):
    """Of 16 samples at once, and of four micro-batches; the third batch of an epoch is half as large."""
    make, data, cls, arguments_cls = MODELS[kind]
    args = arguments_for(
        tmp_path, arguments_cls, per_device_train_batch_size=size, gradient_accumulation_steps=16 // size
    )
    losses, weights = trained_by_closure(make(), args, data, **SAM)
    trainer = cls(make(), args, train_dataset=data, optimizer_kwargs=SAM)
    trainer.train()
    assert_close(copied(trainer.model), weights[-1])
    assert logged(trainer, "loss") == pytest.approx(losses, abs=1e-5)


VARIANTS = {
    "esam": {"beta": 0.5, "beta_per": "tensor"},
    "gsam": {"alpha": 0.4},
    "looksam": {"schedule": Schedule(every=2, reuse=0.7)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_take_the_same_steps_of_micro_batches(variant, tmp_path):
    kwargs = {**SAM, **VARIANTS[variant]}
    trainer = trained(sam_trainer(tmp_path, classifier(), given={"optimizer_kwargs": kwargs}))
    _, weights = trained_by_closure(classifier(), trainer.args, TRAINING, **kwargs)
    assert_close(copied(trainer.model), weights[-1])


def test_steps_differ_from_adamws(tmp_path):
    """The distance that the tests of equality could miss: a hundred times their tolerance."""
    sam = trained(sam_trainer(tmp_path, classifier()))
    adamw = trained(sam_trainer(tmp_path, classifier(), given={"optimizer_kwargs": {"rho": 0.0}}))
    ended = copied(adamw.model)
    assert max((weight - ended[name]).abs().max() for name, weight in copied(sam.model).items()) > 1e-3


def test_label_smoothing_and_clipping_go_into_both_passes_and_the_descent(tmp_path):
    trainer = sam_trainer(tmp_path, classifier(), label_smoothing_factor=0.2, max_grad_norm=0.05)
    trainer.train()

    model = classifier()
    optimizer = create_optimizer(model, trainer.args, **SAM)
    norms = []
    for batch in batches(TRAINING, 5):
        for is_second in (False, True):
            logits = model(batch["input_ids"]).logits
            nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.2).backward()
            if not is_second:
                optimizer.perturb()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        optimizer.step()
        optimizer.zero_grad()
    assert_close(copied(trainer.model), copied(model))
    assert min(norms) > 0.1
    assert logged(trainer, "grad_norm") == pytest.approx(norms, abs=1e-5)


def test_autocast_goes_into_both_passes(tmp_path):
    """Whole batches: the same program, so the same bits."""
    trainer = sam_trainer(
        tmp_path, classifier(), bf16=True, per_device_train_batch_size=16, gradient_accumulation_steps=1
    )
    trainer.train()

    def loss_of(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss

    _, weights = trained_by_closure(classifier(), trainer.args, TRAINING, loss_of=loss_of, **SAM)
    assert_equal(copied(trainer.model), weights[-1])


class Scaled(SAMTrainer):
    """Unscales before it clips, as accelerate does with mixed_precision="fp16", which it refuses on CPU."""

    def _clip_grad_norm(self, model):
        self.accelerator.scaler.unscale_(self._sam)
        return super()._clip_grad_norm(model)


def test_scaled_losses_give_the_same_steps(tmp_path):
    """By a power of 2; GSAM combines gradients of both passes, of which only the second one's are unscaled."""
    arguments = {"given": {"optimizer_kwargs": {**SAM, "alpha": 0.4}}, "max_grad_norm": 0.1}
    trainer = trained(sam_trainer(tmp_path, classifier(), **arguments))
    scaled = sam_trainer(tmp_path, classifier(), cls=Scaled, **arguments)
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled.train()
    assert scaled.accelerator.scaler.get_scale() == 2.0**10
    assert_close(copied(scaled.model), copied(trainer.model))


def test_compiled_model_takes_the_same_steps(tmp_path):
    trainer, compiled = (
        trained(sam_trainer(tmp_path, classifier(), data=TRAINING[:32], **arguments))
        for arguments in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"})
    )
    assert_close(copied(compiled.model), copied(trainer.model))


def test_activation_checkpointing_changes_no_bit(tmp_path):
    trainers = [
        trained(sam_trainer(tmp_path, bert(), given={"same_dropout": True}, activation_checkpointing=is_on))
        for is_on in (False, True)
    ]
    assert_equal(*(copied(trainer.model) for trainer in trainers))


class Counting(SAMTrainer):
    """Notes each pass: the step it belongs to and whether the weights are perturbed. Runs `meanwhile` in it."""

    meanwhile = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.passes = [*getattr(self, "passes", []), (self.state.global_step, self._sam.perturbed)]
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss if self.meanwhile is None else self.meanwhile(self.passes[-1], loss)


def test_schedule_decides_which_steps_have_a_second_pass(tmp_path):
    kwargs = {"optimizer_kwargs": {**SAM, "schedule": Schedule(every=2)}}
    trainer = sam_trainer(tmp_path, bert(), cls=Counting, given=kwargs, max_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    clean, perturbed = [False, False], [True, True]
    assert [is_perturbed for _, is_perturbed in trainer.passes] == [*clean, *perturbed, *clean, *clean, *perturbed]


def test_training_stopped_within_a_step_begins_the_next_one_anew(tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = sam_trainer(
        tmp_path, bert(), cls=Counting, given={"callbacks": [Stop()]}, max_steps=1, gradient_accumulation_steps=2
    )
    trainer.train()
    trainer.remove_callback(Stop)
    trainer.train()
    assert [is_perturbed for _, is_perturbed in trainer.passes] == [False, False, False, True, True]


def test_step_with_nan_in_the_first_pass_is_adamws(tmp_path):
    """In one micro-batch; the second passes are at the weights then, as those of a radius of 0 are."""
    trainer = sam_trainer(tmp_path, bert(), cls=Counting, max_steps=1)
    trainer.meanwhile = lambda at, loss: loss * float("nan") if len(trainer.passes) == 2 else loss
    trainer.train()
    adamw = trained(sam_trainer(tmp_path, bert(), given={"optimizer_kwargs": {"rho": 0.0}}, max_steps=1))
    assert_equal(copied(trainer.model), copied(adamw.model))


@pytest.mark.parametrize("max_grad_norm", [0, 1.0])
def test_nan_in_the_second_pass_changes_no_weight_and_training_goes_on(max_grad_norm, tmp_path):
    trainer = sam_trainer(tmp_path, bert(), cls=Counting, max_steps=3, max_grad_norm=max_grad_norm)
    held = KeepWeights()
    trainer.add_callback(held)
    trainer.meanwhile = lambda at, loss: loss * float("nan") if at == (1, True) else loss
    trainer.train()
    assert_equal(held.at[2], held.at[1])
    assert not torch.equal(held.at[3]["classifier.weight"], held.at[2]["classifier.weight"])


class KeepWeights(transformers.TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.at: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.at[state.global_step] = copied(model)


# -- what the second pass must not leave behind ------------------------------------------------------------------------


class Normalised(nn.Module):
    """A classifier with dropout that keeps its masks, and a layer with running statistics."""

    def __init__(self, norm: nn.Module | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(32, 16), nn.Linear(16, 2)
        self.norm = nn.Identity() if norm is None else norm
        self.masks: list[Tensor] = []

    def forward(self, input_ids, labels):
        hidden = self.norm(self.embedding(input_ids).transpose(1, 2)).mean(-1)
        self.masks.append(torch.rand(hidden.shape) < 0.5)
        logits = self.head(hidden * self.masks[-1])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


NORMS = {
    "batch": functools.partial(nn.BatchNorm1d, 16),
    "cumulative batch": functools.partial(nn.BatchNorm1d, 16, momentum=None),
    "instance": functools.partial(nn.InstanceNorm1d, 16, track_running_stats=True),
}


@pytest.mark.parametrize("norm", NORMS)
def test_running_statistics_are_those_of_the_first_passes(norm, tmp_path):
    """With a learning rate of 0 the plain Trainer sees the same weights in its passes, step after step."""
    sam = trained(sam_trainer(tmp_path, Normalised(NORMS[norm]()), learning_rate=0.0))
    plain = trained(plain_trainer(tmp_path, Normalised(NORMS[norm]()), learning_rate=0.0))
    assert_equal(dict(sam.model.named_buffers()), dict(plain.model.named_buffers()))
    assert sam.model.norm.num_batches_tracked > 0 or norm == "instance"


def test_same_dropout_gives_both_passes_the_same_masks(tmp_path):
    trainer = sam_trainer(tmp_path, Normalised(), given={"same_dropout": True}, max_steps=1)
    trainer.train()
    first, second = trainer.model.masks[:4], trainer.model.masks[4:]
    assert len(second) == 4
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], first[1])


def test_passes_have_masks_of_their_own_by_default(tmp_path):
    trainer = sam_trainer(tmp_path, Normalised(), max_steps=1)
    trainer.train()
    assert not any(map(torch.equal, trainer.model.masks[:4], trainer.model.masks[4:]))


def test_same_dropout_leaves_the_random_numbers_as_one_pass_does(tmp_path):
    sam = sam_trainer(tmp_path, Normalised(), given={"same_dropout": True})
    sam.train()
    after = torch.get_rng_state()
    plain_trainer(tmp_path, Normalised()).train()
    assert torch.equal(torch.get_rng_state(), after)


class Failing(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["second pass", "before the step"])
def test_interruption_leaves_the_clean_weights(where, tmp_path):
    def fail(at, loss):
        if at == (1, True):
            raise KeyboardInterrupt
        return loss

    held = KeepWeights()
    trainer = sam_trainer(tmp_path, bert(), cls=Counting, given={"callbacks": [held]})
    if where == "second pass":
        trainer.meanwhile = fail
    else:
        trainer.add_callback(Failing)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (1, True) in trainer.passes
    assert_equal(copied(trainer.model), held.at[1])


def test_second_pass_that_runs_out_of_memory_is_made_anew_with_smaller_batches(tmp_path):
    """Trainer begins again, at the clean weights, and without the micro-batches that were too large."""
    before = copied(bert())
    trainer = sam_trainer(
        tmp_path, bert(), cls=Counting, auto_find_batch_size=True, gradient_accumulation_steps=2, max_steps=1
    )

    def fail(at, loss):
        if not at[1]:
            assert_equal(copied(trainer.model), before)
        elif trainer._train_batch_size == 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return loss

    trainer.meanwhile = fail
    trainer.train()
    assert [is_perturbed for _, is_perturbed in trainer.passes] == [False, False, True, False, False, True, True]


# -- checkpoints -------------------------------------------------------------------------------------------------------


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
    code = f"from tests.integration.test_transformers import train_until_killed; {call}"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == -9, run.stderr

    uninterrupted = resumable(tmp_path / "whole", same_dropout)
    uninterrupted.train()
    resumed = resumable(tmp_path / "killed", same_dropout, seed=1)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(copied(resumed.model), copied(uninterrupted.model))


# -- optimizers --------------------------------------------------------------------------------------------------------


def test_optimizer_has_trainers_groups_and_the_arguments_values(tmp_path):
    args = arguments_for(tmp_path, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.9, seed=5)
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    optimizer = create_optimizer(model, args, rho=0.3)
    plain = plain_trainer(tmp_path, model).create_optimizer()
    assert [group["params"] for group in optimizer.param_groups] == [group["params"] for group in plain.param_groups]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    names = {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[p] for p in group["params"]]
        assert (group["lr"], group["betas"], group["eps"], group["rho"]) == (1e-2, (0.8, 0.9), 1e-2, 0.3)
    assert optimizer.seed == 5


def test_arguments_given_by_hand_go_before_the_training_arguments(tmp_path):
    optimizer = create_optimizer(bert(), arguments_for(tmp_path), AdamWL2SP, lr=0.5, weight_decay=0.4)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.4), (0.5, 0.0)]


def test_novel_parameters_decay_to_zero_and_the_others_to_their_first_values(tmp_path):
    model = bert()
    before = copied(model)
    args = arguments_for(tmp_path, learning_rate=0.5, weight_decay=0.5)
    optimizer = create_optimizer(model, args, AdamWL2SP, l2_sp=0.5, novel=["classifier.weight", "classifier.bias"])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = copied(model)
    torch.testing.assert_close(after.pop("classifier.weight"), before.pop("classifier.weight") * 0.75)
    assert_equal(after, before)


def test_adamw_of_the_factory_steps_like_trainers_own(tmp_path):
    model = bert()
    args = {"max_grad_norm": 1.0}
    given = {"optimizers": (create_optimizer(model, arguments_for(tmp_path, **args), AdamWL2SP), None)}
    ours = trained(plain_trainer(tmp_path, model, given=given, **args))
    theirs = trained(plain_trainer(tmp_path, bert(), **args))
    assert_close(copied(ours.model), copied(theirs.model))


def test_momentum_sam_of_the_factory_steps_like_one_that_trainer_makes(tmp_path):
    model, kwargs = bert(), {"rho": 0.5, "lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1}
    ours = {"optimizers": (create_optimizer(model, arguments_for(tmp_path), MomentumSAM, rho=0.5), None)}
    theirs = {"optimizer_cls_and_kwargs": (MomentumSAM, kwargs)}
    trainers = [trained(plain_trainer(tmp_path, m, given=given)) for m, given in ((model, ours), (bert(), theirs))]
    for trainer in trainers:
        trainer.optimizer.eval()
    assert_equal(*(copied(trainer.model) for trainer in trainers))


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
def test_fsam_that_is_given_steps_like_the_one_that_is_made(how, tmp_path):
    model, kwargs = bert(), {**SAM, "lr": 1e-2, "eps": 1e-2}
    own = (create_optimizer(model, arguments_for(tmp_path), **SAM), None) if how == "optimizers" else (FSAM, kwargs)
    given = trained(sam_trainer(tmp_path, model, given={"optimizer_kwargs": None, how: own}))
    made = trained(sam_trainer(tmp_path, bert()))
    assert_equal(copied(given.model), copied(made.model))


def test_choice_of_decaying_parameters_can_be_overridden(tmp_path):
    class Decaying(SAMTrainer):
        def get_decay_parameter_names(self, model):
            return ["classifier.bias"]

    optimizer = sam_trainer(tmp_path, bert(), cls=Decaying).create_optimizer()
    assert optimizer.param_groups[0]["param_names"] == ["classifier.bias"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer_cls_and_kwargs": (torch.optim.AdamW, {})}, "Invalid optimizer: 'AdamW'"),
        ({"optimizer_cls_and_kwargs": (FSAM, {"gamma": 0.5})}, "Invalid gamma: 0.5"),
        ({"optimizer_kwargs": SAM, "optimizer_cls_and_kwargs": (FSAM, {})}, "Invalid optimizer_kwargs"),
        ({"optimizer_kwargs": {"novel": ["a"], "anchors": {}}}, "Invalid novel"),
    ],
)
def test_trainer_refuses_what_it_cannot_do(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sam_trainer(tmp_path, bert(), given={"optimizer_kwargs": None, **given}).train()


def test_library_itself_does_not_import_transformers():
    code = "import sys, fsam_triton; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_another_optimizer_in_the_arguments_is_not_left_unread(tmp_path):
    with pytest.raises(ValueError, match="optim"):
        sam_trainer(tmp_path, bert(), optim="adafactor")


def test_steps_of_a_sam_around_adamw_are_those_of_an_fsam(tmp_path):
    model, other = bert(hidden_dropout_prob=0.0), bert(hidden_dropout_prob=0.0)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2, weight_decay=0.0)
    fused = FSAM(other.parameters(), lr=1e-2, eps=1e-2, weight_decay=0.0, rho=0.5)
    for own, optimizer in ((model, SAM_AROUND(base, rho=0.5)), (other, fused)):
        trained(sam_trainer(tmp_path, own, given={"optimizer_kwargs": None, "optimizers": (optimizer, None)}))
    assert_close(copied(model), copied(other))
