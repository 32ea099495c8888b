"""Trains a classifier: which weights, by which optimizer, in which order of texts."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from .. import FSAM, FishMask, Mixup, MixupDraw, SparseMerger, estimate_fisher
from ..analysis import RhoSearch, find_rho, mask_density, rounded_weights
from ..analysis.rho import RHOS
from ..errors import ArgumentError
from ..optim.optimizer import FusedOptimizer
from .errors import InputError
from .models import Feature, draw_batches, load_model
from .optimizers import build_mixup, build_optimizer, naming_options
from .optional import transformers
from .options import AUTO, DTYPES, SAM_TYPES, Arguments
from .progress import Progress, waiting
from .report import ROUNDED_BITS, PeakMemory, Run

if TYPE_CHECKING:
    from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

# What `search_rho` looks at: ten forward passes for each batch.
RHO_BATCHES = 2


def choose_mask(
    arguments: Arguments, path: str, names: list[str], tokenizer: PreTrainedTokenizerBase, train: list[Feature]
) -> FishMask | None:
    """Return the FishMask of the weights to train, in the model that every run starts from; None for all weights.

    Raises:
        InputError: so small a share does not hold the new head.
    """
    if arguments.trains_all:
        return None
    transformers.set_seed(arguments.seed)
    model, novel = load_model(path, names)
    with naming_options():
        if arguments.trainable == "bitfit":
            return FishMask.bias_only(model, sorted(novel))
        # For fish too, because it refuses too small a share before the Fisher information has been estimated.
        mask = FishMask.random(model, arguments.keep_ratio, arguments.seed, sorted(novel))
        if arguments.trainable == "random":
            return mask
        scores = fisher_information(arguments, model.to(arguments.device), tokenizer, train)
        return FishMask.from_scores(scores, arguments.keep_ratio, sorted(novel))


def fisher_information(
    arguments: Arguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: list[Feature]
) -> dict[str, Tensor]:
    """Estimate it from ``--num_fisher_samples`` of the encoded texts, drawn at random, or from all if these are few."""
    count, size = min(arguments.num_fisher_samples, len(train)), arguments.per_device_train_batch_size
    batches = draw_batches(tokenizer, train, count, size, arguments.seed)
    with torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):
        return estimate_fisher(model, batches, count)


def search_rho(
    arguments: Arguments,
    sam_type: str,
    path: str,
    names: list[str],
    tokenizer: PreTrainedTokenizerBase,
    train: list[Feature],
) -> RhoSearch | None:
    """Return the `RhoSearch` of ``--rho auto``, in the model that the run starts from; None if rho is given or unused.

    Raises:
        InputError: there is no rho to suggest.
    """
    if sam_type == "none" or arguments.rho_of(sam_type) != AUTO:
        return None
    transformers.set_seed(arguments.seed)
    model, _ = load_model(path, names)
    model.to(arguments.device)

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        inputs = {key: value.to(model.device) for key, value in batch.items()}
        labels = inputs.pop("labels")
        with torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):
            logits = model(**inputs).logits.float()
        passed()
        return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=arguments.label_smoothing_factor)

    size = arguments.per_device_train_batch_size
    batches = draw_batches(tokenizer, train, RHO_BATCHES * size, size, arguments.seed)
    try:
        with waiting(f"{SAM_TYPES[sam_type]}: looking for rho", RHO_BATCHES * (1 + len(RHOS)), "pass") as passed:
            search = find_rho(model, loss, batches, num_batches=RHO_BATCHES)
    except (ArgumentError, FloatingPointError) as error:
        raise InputError(f"--rho auto: {error}") from error
    text = f"{SAM_TYPES[sam_type]}: rho {search.rho:.3g} raises the loss of a batch by {search.rise:.3g} of it"
    print(text, flush=True)
    return search


def join_workers(arguments: Arguments) -> tuple[int, int]:
    """Join the workers that torchrun has started, if it has; return this one's rank and how many there are."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return 0, 1
    if not arguments.local_steps:
        raise InputError("torchrun needs --local_steps: workers merge what they train after so many steps")
    on_gpu = arguments.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    return dist.get_rank(), dist.get_world_size()


class Trainer:
    """One training run: a freshly loaded model, its optimizer and schedule, and the batches in their seeded order.

    Two runs with the same seed start from the same weights of the new head, see the same batches in the same order,
    and start dropout from the same state. Of several workers, each takes its share of the batches, and the first
    evaluates what they have merged.
    """

    def __init__(
        self,
        arguments: Arguments,
        sam_type: str,
        path: str,
        names: list[str],
        tokenizer: PreTrainedTokenizerBase,
        total_steps: int,
        trainable: FishMask | None = None,
        worker: tuple[int, int] = (0, 1),
    ) -> None:
        transformers.set_seed(arguments.seed)
        model, novel = load_model(path, names)
        self.arguments = arguments
        self.model: PreTrainedModel = model.to(arguments.device, DTYPES[arguments.dtype])
        self.total_steps = total_steps
        self.optimizer: FusedOptimizer = build_optimizer(arguments, sam_type, self.model, novel, total_steps, trainable)
        self.scheduler: LRScheduler = transformers.get_scheduler(
            arguments.lr_scheduler_type,
            self.optimizer,
            math.ceil(total_steps * arguments.warmup_ratio),
            total_steps,
            arguments.scheduler_kwargs(total_steps),
        )
        self.collator: DataCollatorWithPadding = transformers.DataCollatorWithPadding(tokenizer)
        self.run: Run = Run(SAM_TYPES[sam_type], total_steps)
        self.rank: int = worker[0]
        self.workers: int = worker[1]
        self.mixup: Mixup | None = build_mixup(arguments, total_steps, self.rank)
        self.random_state: list[Tensor] = []
        self.progress: Progress = Progress(self.run.name, total_steps, shown=False)
        self.merger: SparseMerger | None = None
        if arguments.local_steps and trainable is not None:
            self.merger = SparseMerger(self.model, self.optimizer, lambda: trainable, local_steps=arguments.local_steps)

    def collate(self, features: list[Feature]) -> dict[str, Tensor]:
        """Return a list of encoded texts as one batch on the device."""
        return {key: value.to(self.arguments.device) for key, value in self.collator(features).items()}

    def forward(self, batch: dict[str, Tensor]) -> Any:
        """Return the model's output for a batch."""
        with torch.autocast(self.arguments.device.type, torch.bfloat16, enabled=self.arguments.bf16):
            return self.model(**batch)

    def final_weights(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the model has the weights to evaluate and to save: clean ones, or their average."""
        self.model.eval()
        return self.optimizer.ema_weights() if self.optimizer.ema_decay is not None else contextlib.nullcontext()

    def logits(self, features: list[Feature], passed: Callable[[], object] = lambda: None) -> Tensor:
        """Return the logits of all ``features``, in fp32 on the CPU; call this inside `final_weights`.

        Args:
            features: encoded texts, without labels.
            passed: called after each batch.
        """
        size, found = self.arguments.per_device_eval_batch_size, []
        self.model.eval()
        with torch.no_grad():
            for i in range(0, len(features), size):
                found.append(self.forward(self.collate(features[i : i + size])).logits)
                passed()
        return torch.cat(found).float().cpu()

    def score(self, features: list[Feature], doing: str) -> tuple[float, float]:
        """Return accuracy and loss on ``features``, inside `final_weights`, and say meanwhile what is being done."""
        unlabelled = [{key: value for key, value in feature.items() if key != "labels"} for feature in features]
        labels = torch.tensor([feature["labels"] for feature in features])
        batches = math.ceil(len(features) / self.arguments.per_device_eval_batch_size)
        with self.progress.waiting(doing, batches) as passed:
            logits = self.logits(unlabelled, passed)
        accuracy = (logits.argmax(-1) == labels).double().mean().item()
        return accuracy, torch.nn.functional.cross_entropy(logits, labels).item()

    def evaluate(self, features: list[Feature]) -> None:
        """Note accuracy and loss on ``features``."""
        with self.final_weights():
            self.run.evaluations.append((len(self.run.losses), *self.score(features, "evaluating")))
        self.progress.note(f"accuracy={self.run.evaluations[-1][1]:.3f}")

    def evaluate_rounded(self, features: list[Feature]) -> None:
        """Note accuracy and loss on ``features`` with the linear layers rounded to `ROUNDED_BITS`."""
        with self.final_weights(), rounded_weights(self.model, ROUNDED_BITS):
            self.run.rounded = self.score(features, f"evaluating with {ROUNDED_BITS}-bit weights")

    def step(self, features: list[Feature]) -> float:
        """Make one optimizer step on texts, of one batch or of several whose gradients add up; note loss and time."""
        arguments, size = self.arguments, self.arguments.per_device_train_batch_size
        smoothing = arguments.label_smoothing_factor

        def closure() -> Tensor | float:
            self.optimizer.zero_grad()
            total = 0.0
            for batch, draw in zip(batches, draws, strict=True):
                with draw.applied(self.model):
                    logits = self.forward(batch).logits.float()
                # The mean over all texts of the step, whatever the size of its last batch.
                share = len(logits) / len(features)
                loss = draw.loss(logits, batch["labels"], smoothing) * share
                loss.backward()
                total = total + loss.detach()
            return total

        def losses(part: dict[str, Tensor]) -> Tensor:
            logits = self.forward(part).logits.float()
            return torch.nn.functional.cross_entropy(
                logits, part["labels"], reduction="none", label_smoothing=smoothing
            )

        self.model.train()
        start = time.perf_counter()
        batches = [self.collate(features[i : i + size]) for i in range(0, len(features), size)]
        if isinstance(self.optimizer, FSAM) and min(self.optimizer.gamma, self.optimizer.ascent_fraction) < 1:
            (batch,) = batches
            loss = self.optimizer.step(losses, batch).mean().item()
        else:
            number = len(self.run.losses)
            draws = [self.mixup.draw(len(b["labels"]), number) if self.mixup else MixupDraw() for b in batches]
            loss = self.optimizer.step(closure).item()
        self.scheduler.step()
        if self.merger:
            self.merger.step()
        self.run.step_seconds.append(time.perf_counter() - start)
        self.run.losses.append(loss)
        return loss

    def epochs(self, count: int) -> Iterator[list[list[int]]]:
        """Yield for each pass over ``count`` texts what this worker takes of them in its steps, as lists of indices."""
        generator = torch.Generator().manual_seed(self.arguments.seed)
        size, left = self.arguments.texts_per_step, self.total_steps
        while left > 0:
            order = torch.randperm(count, generator=generator).tolist()
            steps = [order[i : i + size] for i in range(0, count, size)]
            # Equally many for each worker.
            steps = steps[: len(steps) // self.workers * self.workers][self.rank :: self.workers][:left]
            left -= len(steps)
            yield steps

    def train(
        self, train: list[Feature], validation: list[Feature], checkpoint: Callable[[Trainer], object] | None = None
    ) -> None:
        """Train on ``train``; evaluate on ``validation`` after each pass over it and at the end.

        Args:
            train: encoded texts with labels.
            validation: the same.
            checkpoint: called with this trainer after every ``--save_steps`` steps.
        """
        transformers.set_seed(self.arguments.seed + self.rank)
        if self.random_state:
            self._set_random_state()
        # The epochs of a resumed run begin at its first step, too.
        done, number = len(self.run.losses), 0
        self.progress = Progress(self.run.name, self.total_steps, done, shown=self.rank == 0)
        peak = PeakMemory(self.arguments.device)
        try:
            with peak, contextlib.closing(self.progress):
                for epoch in self.epochs(len(train)):
                    for indices in epoch:
                        number += 1
                        if number > done:
                            loss = self.step([train[i] for i in indices])
                            self.progress.step(number, loss)
                            if checkpoint and self.arguments.save_steps and number % self.arguments.save_steps == 0:
                                checkpoint(self)
                    if self.merger:
                        self.merger.finish()
                    if self.rank == 0 and number not in [step for step, *_ in self.run.evaluations]:
                        self.evaluate(validation)
        finally:
            self.run.peak_memory_bytes = max(self.run.peak_memory_bytes, peak.bytes)
        if isinstance(self.optimizer, FSAM) and self.optimizer.mask:
            self.run.mask_density = mask_density(self.optimizer, self.model)

    def state_dict(self) -> dict[str, Any]:
        """Return what the rest of the run depends on; which texts come next follows from the number of steps."""
        random = [torch.get_rng_state()]
        if self.arguments.device.type == "cuda":
            random.append(torch.cuda.get_rng_state(self.arguments.device))
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "run": dataclasses.asdict(self.run),
            "random": random,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, in `train`, after the step at which the state was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.run = Run(**state["run"])
        self.random_state = state["random"]

    def _set_random_state(self) -> None:
        torch.set_rng_state(self.random_state[0])
        if self.arguments.device.type == "cuda" and len(self.random_state) > 1:
            torch.cuda.set_rng_state(self.random_state[1], self.arguments.device)
