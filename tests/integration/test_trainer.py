"""MomentumSAM under transformers' Trainer and accelerate, both unmodified: they save, measure, resume clean weights."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import MomentumSAM
from tests.integration.tiny import assert_equal, batch_of, bert, copied, samples, saved_in

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

MOMENTUM_SAM = (MomentumSAM, {"lr": 0.01, "rho": 1.0})
pytestmark = pytest.mark.usefixtures("one_thread")

TRAINING, EVALUATION = samples(40, 1), samples(16, 2)


class CleanWeights(transformers.TrainerCallback):
    """What eval() shows at every save."""

    def __init__(self):
        self.at: dict[int, dict[str, Tensor]] = {}

    def on_save(self, args, state, control, model, optimizer, **kwargs):
        inner = optimizer.optimizer
        was_perturbed = inner.perturbed
        held = copy.deepcopy(dict(model.named_parameters()))
        optimizer.eval()
        self.at[state.global_step] = copied(model)
        if was_perturbed:
            optimizer.train()
        assert all(torch.equal(p, held[name]) for name, p in model.named_parameters())


def trainer_for(folder: Path, model: nn.Module, callbacks=(), optimizers=None, **arguments):
    arguments = {
        "max_steps": 7,
        "save_steps": 2,
        "eval_steps": 3,
        "eval_strategy": "steps",
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": len(EVALUATION),
        "weight_decay": 0.1,
        **arguments,
    }
    args = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, **arguments
    )
    given = {"optimizer_cls_and_kwargs": MOMENTUM_SAM} if optimizers is None else {"optimizers": optimizers}
    return transformers.Trainer(
        model, args, train_dataset=TRAINING, eval_dataset=EVALUATION, callbacks=[*callbacks], **given
    )


def finish(trainer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights that a next step would begin with, perturbed, and the clean ones, at the end of a training."""
    optimizer = trainer.optimizer.optimizer
    clean = copied(trainer.model)
    optimizer.train()
    optimizer.perturb()
    perturbed = copied(trainer.model)
    optimizer.restore()
    assert_equal(copied(trainer.model), clean)
    return perturbed, clean


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of seven steps: its folder, what eval() showed at its saves, its history and last weights."""
    folder, clean = tmp_path_factory.mktemp("run"), CleanWeights()
    trainer = trainer_for(folder, bert(), [clean])
    trainer.train()
    trainer.save_model(folder / "last")
    return folder, clean.at, trainer.state.log_history, *finish(trainer)


def loss_of(weights: dict[str, Tensor]) -> float:
    model = bert().eval()
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        return float(model(**batch_of(EVALUATION)).loss)


def test_every_checkpoint_holds_clean_weights(uninterrupted):
    folder, clean, _, perturbed, last = uninterrupted
    assert list(clean) == [2, 4, 6, 7]
    for step, weights in clean.items():
        assert_equal(saved_in(folder / f"checkpoint-{step}"), weights)
    assert_equal(saved_in(folder / "last"), last)
    assert not any(torch.equal(perturbed[name], weight) for name, weight in last.items())


def test_metrics_in_the_middle_are_those_of_the_clean_weights(uninterrupted):
    """Step 6 is evaluated and saved; the loss is the mean of 16 samples' in one batch, computed by the same program."""
    _, clean, history, perturbed, _ = uninterrupted
    (measured,) = (entry["eval_loss"] for entry in history if entry["step"] == 6 and "eval_loss" in entry)
    eps = torch.finfo(torch.float32).eps
    assert abs(measured - loss_of(clean[6])) <= 16 * eps
    assert abs(measured - loss_of(perturbed)) > 1000 * eps


@pytest.mark.parametrize("step", [2, 6])
def test_training_resumed_from_a_checkpoint_ends_with_the_same_bits(uninterrupted, step, tmp_path):
    folder, _, _, perturbed, clean = uninterrupted
    trainer = trainer_for(tmp_path, bert(seed=1))
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    ended, ended_clean = finish(trainer)
    assert_equal(ended_clean, clean)
    assert_equal(ended, perturbed)


def test_training_resumed_after_its_last_step_saves_clean_weights(uninterrupted, tmp_path):
    folder, _, _, _, clean = uninterrupted
    trainer = trainer_for(tmp_path, bert(seed=1))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-7"))
    trainer.save_model(tmp_path / "last")
    assert_equal(saved_in(tmp_path / "last"), clean)


def test_optimizer_made_beforehand_trains_the_same(uninterrupted, tmp_path):
    *_, clean = uninterrupted
    model = bert()
    decayed = [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    named = list(model.named_parameters())
    plain = [n.endswith("bias") or n.rpartition(".")[0] in decayed for n, _ in named]
    groups = [
        {"params": [p for (_, p), is_plain in zip(named, plain, strict=True) if not is_plain], "weight_decay": 0.1},
        {"params": [p for (_, p), is_plain in zip(named, plain, strict=True) if is_plain], "weight_decay": 0.0},
    ]
    trainer = trainer_for(tmp_path, model, optimizers=(MomentumSAM(groups, **MOMENTUM_SAM[1]), None), save_steps=100)
    trainer.train()
    assert_equal(finish(trainer)[1], clean)


class Stop(transformers.TrainerCallback):
    """Ends training at step 5, as a limit of time would."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 5


def test_best_model_loaded_at_the_end_is_the_one_that_is_saved_and_evaluated(tmp_path):
    """The last step was not evaluated, so the optimizer is in train mode when the best weights are loaded into it."""
    best_by_loss = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = trainer_for(tmp_path, bert(), [Stop()], eval_steps=2, save_steps=2, **best_by_loss)
    trainer.train()
    assert not trainer.optimizer.optimizer.perturbed
    best = saved_in(Path(trainer.state.best_model_checkpoint))
    trainer.save_model(tmp_path / "best")
    assert_equal(saved_in(tmp_path / "best"), best)
    measured = trainer.evaluate()["eval_loss"]
    assert_equal(copied(trainer.model), best)
    assert abs(measured - trainer.state.best_metric) <= 16 * torch.finfo(torch.float32).eps


def test_evaluation_in_half_precision_after_training_casts_the_clean_weights(tmp_path):
    trainer = trainer_for(tmp_path, bert(), bf16_full_eval=True, save_steps=7, max_steps=3, eval_strategy="no")
    trainer.train()
    trainer.evaluate()
    clean = saved_in(tmp_path / "checkpoint-3")
    assert_equal(copied(trainer.model), {name: weight.bfloat16() for name, weight in clean.items()})


# -- accelerate --------------------------------------------------------------------------------------------------------


class Loop:
    """A loop of accelerate's documentation, with gradient accumulation and clipping."""

    def __init__(self, seed: int, **kwargs):
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = bert(seed)
        optimizer = MomentumSAM(model.parameters(), **MOMENTUM_SAM[1], **kwargs)
        loader = torch.utils.data.DataLoader([*TRAINING], batch_size=4, collate_fn=batch_of)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)

    def train(self, batches: slice) -> None:
        torch.manual_seed(batches.start)
        self.model.train()
        self.optimizer.train()
        for batch in list(self.loader)[batches]:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(**batch).loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()

    def clean(self) -> dict[str, Tensor]:
        self.optimizer.eval()
        weights = copied(self.accelerator.unwrap_model(self.model))
        self.optimizer.train()
        return weights


@pytest.mark.parametrize("kwargs", [{}, {"flatten": True}], ids=["in place", "flat"])
def test_accelerates_saved_state_resumes_to_the_same_bits(kwargs, tmp_path):
    loop, other = Loop(0, **kwargs), Loop(1, **kwargs)
    loop.train(slice(0, 4))
    loop.accelerator.save_state(tmp_path)
    assert_equal(saved_in(tmp_path), loop.clean())
    loop.train(slice(4, 8))
    other.accelerator.load_state(tmp_path)
    other.train(slice(4, 8))
    assert_equal(copied(other.model), copied(loop.model))
    assert_equal(other.clean(), loop.clean())


def test_accelerate_saves_the_unwrapped_model_clean(tmp_path):
    loop = Loop(0)
    loop.train(slice(0, 4))
    clean = loop.clean()
    loop.accelerator.unwrap_model(loop.model).save_pretrained(tmp_path / "pretrained")
    assert_equal(saved_in(tmp_path / "pretrained"), clean)
    loop.accelerator.save_model(loop.model, tmp_path / "model")
    assert_equal(saved_in(tmp_path / "model"), clean)
    assert_equal(dict(loop.accelerator.get_state_dict(loop.model)), clean)
