"""Steps of `SAMTrainer` are those of loops that are written by hand, of whole batches and of micro-batches."""

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import Schedule
from tests.integration.tiny import assert_equal, bert, copied, samples

pytest.importorskip("transformers")
import transformers

from fsam_triton.integrations.transformers import SAMTrainer, SharpnessAwareMixin, create_optimizer
from tests.integration.sam_trainer import (
    SAM,
    TRAINING,
    Counting,
    arguments_for,
    assert_close,
    batches,
    classifier,
    logged,
    sam_trainer,
    trained,
    trained_by_closure,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class SAMSeq2SeqTrainer(SharpnessAwareMixin, transformers.Seq2SeqTrainer):
    pass


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


MODELS = {
    "classifier": (classifier, TRAINING, SAMTrainer, transformers.TrainingArguments),
    "language model": (llama, padded_samples(), SAMTrainer, transformers.TrainingArguments),
    "encoder-decoder": (t5, whole_sentences(), SAMSeq2SeqTrainer, transformers.Seq2SeqTrainingArguments),
}


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


def test_schedule_decides_which_steps_have_a_second_pass(tmp_path):
    kwargs = {"optimizer_kwargs": {**SAM, "schedule": Schedule(every=2)}}
    trainer = sam_trainer(tmp_path, bert(), cls=Counting, given=kwargs, max_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    clean, perturbed = [False, False], [True, True]
    assert [is_perturbed for _, is_perturbed in trainer.passes] == [*clean, *perturbed, *clean, *clean, *perturbed]
