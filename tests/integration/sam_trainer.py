"""`SAMTrainer` on a tiny BERT, and the same steps as loops over whole batches."""

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from fsam_triton.integrations.transformers import SAMTrainer, create_optimizer
from tests.integration.tiny import batch_of, bert, copied, samples

TRAINING = samples(40, 1)
# A gradient that is zero in exact arithmetic (of a key's bias, say) is some 1e-9 of rounding, and Adam would step
# by lr for it. With this epsilon a difference of 1e-7 between two gradients moves a weight by lr * 1e-7 / 1e-2 = 1e-7.
STEADY = {"learning_rate": 1e-2, "adam_epsilon": 1e-2, "lr_scheduler_type": "constant"}
SAM = {"rho": 0.5}


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


class Counting(SAMTrainer):
    """Notes each pass: the step it belongs to and whether the weights are perturbed. Runs `meanwhile` in it."""

    meanwhile = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.passes = [*getattr(self, "passes", []), (self.state.global_step, self._sam.perturbed)]
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss if self.meanwhile is None else self.meanwhile(self.passes[-1], loss)


class KeepWeights(transformers.TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.at: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.at[state.global_step] = copied(model)
