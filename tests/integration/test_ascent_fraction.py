"""The first pass on a part of each micro-batch, in transformers' Trainer, TRL and Lightning."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, ArgumentError, MomentumSAM
from tests.integration.tiny import assert_equal, batch_of, bert, copied, samples
from tests.training import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = {"rho": 0.5, "ascent_fraction": 0.5}
# Sums over micro-batches in another order are off by some 1e-7 of a gradient, which moves a weight by lr * 1e-7 over
# Adam's eps, 1e-7, in each of two steps; moments and the perturbation carry the first step's error into the second.
CLOSE = 2e-6
ROWS = samples(16, 1)
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}

# -- transformers ------------------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("fsam_triton.integrations.transformers")


def trainer_of(folder: Path, model: nn.Module, data, cls=integration.SAMTrainer, kwargs=HALF, **arguments):
    arguments = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-2,
        "lr_scheduler_type": "constant",
        **arguments,
    }
    args = transformers.TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **arguments)
    return cls(model, args, train_dataset=data, optimizer_kwargs=kwargs)


def classifier() -> nn.Module:
    model = bert(0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.accepts_loss_kwargs = False
    return model


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, max_position_embeddings=8, **SMALL))


def sentences() -> list[dict[str, Tensor]]:
    """Of 2 to 8 tokens, so that halves of a micro-batch have not half its tokens."""
    rows = []
    for i, row in enumerate(ROWS):
        mask = (torch.arange(8) < 2 + i % 4 * 2).long()
        tokens = row["input_ids"]
        rows.append({"input_ids": tokens, "attention_mask": mask, "labels": tokens.where(mask == 1, -100)})
    return rows


def by_hand(model: nn.Module, rows: list[dict[str, Tensor]]) -> list[float]:
    """Two steps of two micro-batches of four; the losses at the weights, of the first halves."""
    optimizer = FSAM(model.named_parameters(), lr=1e-2, eps=1e-2, rho=0.5, weight_decay=0.0)
    model.train()
    losses = []
    for step in range(2):
        micro = [rows[8 * step + 4 * i : 8 * step + 4 * i + 4] for i in range(2)]
        optimizer.zero_grad()
        first = sum(model(**batch_of(m[:2])).loss for m in micro) / 2
        first.backward()
        optimizer.perturb()
        (sum(model(**batch_of(m)).loss for m in micro) / 2).backward()
        optimizer.step()
        losses.append(first.item())
    return losses


def count(rows: list[dict[str, Tensor]]) -> int:
    """Of the tokens that are predicted."""
    return sum(int((row["labels"][1:] != -100).sum()) for row in rows)


def logged(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_passes_the_first_samples_of_each_micro_batch(tmp_path):
    model, twin = classifier(), classifier()
    trainer = trainer_of(tmp_path, model, ROWS)
    trainer.train()
    losses = by_hand(twin, ROWS)
    assert logged(trainer) == pytest.approx(losses, rel=1e-5)
    for name, weight in copied(model).items():
        torch.testing.assert_close(weight, copied(twin)[name], rtol=0, atol=CLOSE)


def test_losses_over_all_tokens_of_a_step_are_over_those_of_the_part(tmp_path):
    """Llama sums over tokens and divides by their number in the step, which Trainer counts without the first ones."""
    model, twin, rows = llama(), llama(), sentences()
    trainer = trainer_of(tmp_path, model, rows)
    trainer.train()
    losses = logged(trainer)
    optimizer = FSAM(twin.named_parameters(), lr=1e-2, eps=1e-2, rho=0.5, weight_decay=0.0)
    for step in range(2):
        micro = [rows[8 * step + 4 * i : 8 * step + 4 * i + 4] for i in range(2)]
        items = sum(map(count, micro))
        optimizer.zero_grad()
        total = 0.0
        for m in micro:
            loss = twin(**batch_of(m[:2]), num_items_in_batch=items * count(m[:2]) / count(m)).loss
            loss.backward()
            total += loss.item()
        assert losses[step] == pytest.approx(total, rel=1e-5)
        optimizer.perturb()
        for m in micro:
            twin(**batch_of(m), num_items_in_batch=items).loss.backward()
        optimizer.step()
    for name, weight in copied(model).items():
        torch.testing.assert_close(weight, copied(twin)[name], rtol=0, atol=CLOSE)


def test_single_samples_stay_whole(tmp_path):
    models = [classifier(), classifier()]
    for model, kwargs in zip(models, (HALF, {"rho": 0.5}), strict=True):
        trainer_of(tmp_path, model, ROWS, kwargs=kwargs, per_device_train_batch_size=1).train()
    assert_same_bits(*models)


def test_trainer_may_choose_the_part_itself(tmp_path):
    class Last(integration.SAMTrainer):
        def ascent_inputs(self, inputs):
            return {name: value[2:] for name, value in inputs.items()}

    model, twin = classifier(), classifier()
    trainer_of(tmp_path, model, ROWS, cls=Last).train()
    turned = [ROWS[4 * i + j] for i in range(4) for j in (2, 3, 0, 1)]
    by_hand(twin, turned)
    for name, weight in copied(model).items():
        torch.testing.assert_close(weight, copied(twin)[name], rtol=0, atol=CLOSE)


def test_inputs_without_labels_are_refused_and_leave_the_weights(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    class Trainer(integration.SharpnessAwareMixin, trl.RewardTrainer):
        pass

    torch.manual_seed(0)
    judge = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(vocab_size=32, num_labels=1, pad_token_id=0, max_position_embeddings=8, **SMALL)
    )
    before = copied(judge)
    pairs = {"chosen_ids": [[1, 2, 3]] * 8, "rejected_ids": [[4, 5]] * 8}
    args = trl.RewardConfig(
        str(tmp_path), use_cpu=True, report_to=[], max_steps=1, per_device_train_batch_size=4, bf16=False
    )
    tokenizer = word_tokenizer()
    trainer = Trainer(
        judge,
        args,
        train_dataset=datasets.Dataset.from_dict(pairs),
        processing_class=tokenizer,
        optimizer_kwargs=HALF,
    )
    with pytest.raises(ArgumentError, match="ascent_inputs"):
        trainer.train()
    assert_equal(copied(judge), before)


@functools.cache
def word_tokenizer():
    from tokenizers import Tokenizer, models

    words = {str(i): i for i in range(32)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", eos_token="1")


# -- Lightning ---------------------------------------------------------------------------------------------------------

L = pytest.importorskip("pytorch_lightning")
from pytorch_lightning.plugins import MixedPrecision  # noqa: E402

from fsam_triton.integrations.lightning import SharpnessAware  # noqa: E402


class Module(L.LightningModule):
    """`passes`: (rows, whether perturbed) of each call of training_step."""

    def __init__(self, optimizer_cls=FSAM, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Linear(8, 2)
        self.make = functools.partial(optimizer_cls, **kwargs)
        self.passes: list[tuple[int, bool]] = []

    def training_step(self, batch, batch_idx):
        self.passes.append((len(batch[0]), self.optimizers().perturbed))
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.make(self.network.parameters(), lr=0.01)


def fit(module, *callbacks, **arguments):
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **arguments,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    return trainer


ignore = pytest.mark.filterwarnings("ignore:.*(num_workers|LeafSpec|log_every_n_steps)")


@ignore
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_lightning_passes_the_first_samples_of_each_micro_batch(accumulate, scaled):
    module = Module(**HALF)
    arguments = {"accumulate_grad_batches": accumulate}
    if scaled:
        arguments["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    trainer = fit(module, SharpnessAware(), **arguments)
    assert module.passes.count((2, False)) == 4
    assert module.passes.count((4, True)) == 4
    assert len(module.passes) == 8
    # Nothing is left in Lightning's objects.
    assert "training_step" not in vars(trainer.strategy)
    assert not trainer.optimizers[0].splits_batches


@ignore
def test_lightning_without_the_callback_is_told_what_it_lacks():
    with pytest.raises(ArgumentError, match="ascent_fraction"):
        fit(Module(**HALF))


@ignore
def test_optimizers_that_split_nothing_leave_lightning_alone():
    module = Module(MomentumSAM)
    fit(module, SharpnessAware())
    assert {rows for rows, _ in module.passes} == {4}
