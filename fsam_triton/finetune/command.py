"""What ``fsam-finetune`` does, from the words of the command line to the files that it writes."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import FishMask, WorkerError, from_pretrained, save_pretrained
from ..analysis import RhoSearch
from ..sparse_training.delta import ADAPTER_CONFIG, ADAPTER_DELTA
from . import html, language_models, probe
from .checks import check_arguments, check_mask, check_mixup
from .errors import InputError, one_line, writing
from .models import Feature, draw_batches, encode, load_empty_model, load_tokenizer, model_path, save, text_length
from .optional import transformers
from .options import Arguments
from .parser import parse
from .report import Run
from .results import Output, make_folder, run_folder, write_text
from .texts import Texts, hold_out, label_names, read_bbc_news, read_glue, read_texts, with_wrong_labels
from .training import Trainer, choose_mask, join_workers, search_rho

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from . import sft

# Packaged articles of each subject.
ARTICLES = {"train_per_label": 40, "validation_per_label": 60}


def read_data(arguments: Arguments) -> tuple[Texts, Texts]:
    """Return the (training, validation) texts that the arguments ask for."""
    if arguments.task_name:
        train, validation = read_glue(arguments.task_name)
    elif not arguments.train_file:
        train, validation = read_bbc_news(**ARTICLES)
    else:
        train = read_texts(arguments.train_file, arguments.text_columns, arguments.label_column_name)
        if arguments.validation_file:
            validation = read_texts(arguments.validation_file, train.columns, arguments.label_column_name)
        else:
            train, validation = hold_out(train)
    return train.sample(arguments.max_train_samples), validation.sample(arguments.max_eval_samples)


@dataclass
class Task:
    """The model and the encoded texts that all runs of a classifier have in common.

    `language_models.Task` has the same methods.

    Args:
        path: folder or hub name of the pretrained model.
        names: the labels.
        tokenizer: of the model.
        train, validation: texts with labels.
        test: texts without, or None.
        description: the data in words.
        length: tokens that texts are cut to.
        sizes: weights of each of the model's parameters, by name.
    """

    path: str
    names: list[str]
    tokenizer: PreTrainedTokenizerBase
    train: list[Feature]
    validation: list[Feature]
    test: list[Feature] | None
    description: str
    length: int
    sizes: dict[str, int]

    def notes(self, arguments: Arguments) -> list[str]:
        """Return what the user did not ask for and is told, as lines."""
        few = self.length < arguments.max_seq_length
        return [f"texts are cut to {self.length} tokens: model and tokenizer take no more"] if few else []

    def total_steps(self, arguments: Arguments, workers: int) -> int:
        """Return the steps of each worker in a run."""
        return arguments.total_steps(len(self.train), workers)

    def choose_mask(self, arguments: Arguments) -> FishMask | None:
        """Return the FishMask of the weights to train; None for all weights."""
        return choose_mask(arguments, self.path, self.names, self.tokenizer, self.train)

    def search_rho(self, arguments: Arguments, sam_type: str) -> RhoSearch | None:
        """Return the `RhoSearch` of ``--rho auto``; None if rho is given or unused."""
        return search_rho(arguments, sam_type, self.path, self.names, self.tokenizer, self.train)

    def trainer(
        self, arguments: Arguments, sam_type: str, steps: int | None, mask: FishMask | None, worker: tuple[int, int]
    ) -> Trainer:
        """Return what makes a run of so many steps."""
        assert steps is not None
        return Trainer(arguments, sam_type, self.path, self.names, self.tokenizer, steps, mask, worker)

    def draw_batches(self, count: int, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """Yield batches of training texts drawn at random."""
        return draw_batches(self.tokenizer, self.train, count, size, seed)

    def saved_model(self, arguments: Arguments, folder: Path) -> nn.Module:
        """Return the model that a run has saved."""
        if arguments.save_delta:
            return from_pretrained(None, folder)
        return transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)

    def facts(self, arguments: Arguments) -> dict[str, str]:
        """Return, in words by name, what a report says of model and data."""
        model = arguments.model_name_or_path or "all-MiniLM-L6-v2 (packaged)"
        return {"model": model, "labels": ", ".join(self.names)}


AnyTask = Task | language_models.Task


def prepare(arguments: Arguments) -> AnyTask:
    """Return the `Task` of the arguments, or that of language models.

    Raises:
        InputError: something the user gave cannot be used.
    """
    check_arguments(arguments)
    if arguments.task == "causal-lm":
        return language_models.prepare(arguments)
    train, validation = read_data(arguments)
    names = label_names(train)
    path = model_path(arguments)
    tokenizer, empty = load_tokenizer(path), load_empty_model(path, names)
    length = text_length(arguments.max_seq_length, tokenizer, empty, pairs=len(train.columns) == 2)
    test = None
    if arguments.test_file:
        texts = read_texts(arguments.test_file, train.columns, arguments.label_column_name, labelled=False)
        test = encode(tokenizer, texts, length)
    description = f"{train.source}: {len(train)} training and {len(validation)} validation texts, {len(names)} labels"
    train, validation = (encode(tokenizer, texts, length, names) for texts in (train, validation))
    if arguments.label_noise:
        labels = [feature["labels"] for feature in train]
        wrong = with_wrong_labels(labels, len(names), arguments.label_noise, arguments.seed)
        for feature, label in zip(train, wrong, strict=True):
            feature["labels"] = label
        description += f"; {arguments.label_noise:.3g} of the training labels are wrong (--label_noise)"
    check_mask(arguments, empty)
    check_mixup(arguments, empty)
    sizes = {name: p.numel() for name, p in empty.named_parameters()}
    return Task(path, names, tokenizer, train, validation, test, description, length, sizes)


def finetune(arguments: Arguments, argv: Sequence[str] = ()) -> list[Run]:
    """Do what the command line asks for; return the list of runs.

    Args:
        arguments: its options.
        argv: the words that gave them, for the HTML report.

    Raises:
        InputError: something the user gave cannot be used; nothing has been trained then.
        OutputError: a file cannot be written.
    """
    task = prepare(arguments)
    reports = html.is_possible(arguments)
    output = Output(arguments, task.description)
    if reports and arguments.report_folder is not None:
        make_folder("report", arguments.report_folder)
    rank, workers = join_workers(arguments)
    steps = task.total_steps(arguments, workers)

    if rank == 0:
        print(task.description, flush=True)
        for note in task.notes(arguments):
            print(note, flush=True)
    mask = output.load_mask() or task.choose_mask(arguments)
    if mask and arguments.save_steps:
        output.save_mask(mask)
    try:
        train_all(arguments, task, steps, output, mask, (rank, workers))
        if rank == 0:
            output.write(mask)
            output.remove_checkpoint()
            if reports:
                report(arguments, argv, task, output, mask)
                output.write_results(mask)
    except BaseException:
        if output.all_runs:
            output.show(mask)
            with contextlib.suppress(OSError):
                output.write(mask)
                output.show_places()
        raise
    if rank == 0:
        output.show(mask)
        output.show_places()
    if workers > 1:
        # A thread of gloo's that lets go of the last operation's tensors while Python shuts down aborts the process.
        dist.barrier()
        dist.destroy_process_group()
    return output.runs


def report(arguments: Arguments, argv: Sequence[str], task: AnyTask, output: Output, mask: FishMask | None) -> None:
    """Measure how sharp the saved models are, and write the HTML page."""
    sharpness = probe.measure_sharpness(arguments, task)
    for run, found in zip(output.runs, sharpness, strict=True):
        run.m_sharpness = found.m_sharpness if math.isfinite(found.m_sharpness) else None
    with writing(arguments.report_folder):
        output.page = html.write_report(arguments, argv, task, output.runs, mask, sharpness)


def train_all(
    arguments: Arguments,
    task: AnyTask,
    steps: int | None,
    output: Output,
    mask: FishMask | None,
    worker: tuple[int, int],
) -> None:
    """Make the runs that ``output`` lacks, and save each model as soon as it is trained."""
    for sam_type in arguments.sam_type[len(output.runs) :]:
        search = task.search_rho(arguments, sam_type)
        own = dataclasses.replace(arguments, rho=search.rho) if search else arguments
        # Any, because each kind of trainer takes the texts of its own kind of task, which a union cannot say.
        trainer: Any = task.trainer(own, sam_type, steps, mask, worker)
        trainer.run.rho_search = search and dataclasses.asdict(search)
        if output.unfinished:
            trainer.load_state_dict(output.unfinished)
            output.unfinished = None
        try:
            trainer.train(task.train, task.validation, output.save_checkpoint)
        except BaseException:
            output.stopped = trainer.run if trainer.run.evaluations else None
            raise
        if worker[0] == 0:
            output.runs.append(trainer.run)
            save_run(arguments, task, output, mask, trainer, run_folder(arguments, sam_type))
            trainer.evaluate_rounded(task.validation)
            if arguments.save_steps:
                output.save_checkpoint()
        # The next run's memory is to be its own: a model and its optimizer refer to each other.
        del trainer
        gc.collect()


def save_run(
    arguments: Arguments,
    task: AnyTask,
    output: Output,
    mask: FishMask | None,
    trainer: Trainer | sft.Trainer,
    folder: Path,
) -> None:
    """Save a trained model, and what it predicts for the test texts."""
    with trainer.final_weights():
        if arguments.save_delta:
            assert mask is not None
            with writing(folder):
                save_pretrained(trainer.model, mask, folder)
            output.wrote(folder / ADAPTER_DELTA, folder / ADAPTER_CONFIG)
        else:
            output.wrote(*save(trainer.model, task.tokenizer, folder))
        if isinstance(task, Task) and isinstance(trainer, Trainer) and task.test:
            predictions = (task.names[i] for i in trainer.logits(task.test).argmax(-1).tolist())
            lines = ["index\tprediction", *(f"{i}\t{prediction}" for i, prediction in enumerate(predictions))]
            output.wrote(write_text(folder / "predict_results.tsv", "\n".join(lines) + "\n"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0; after one line on stderr 2 for what the user gave that cannot be used, 1 for a file that
        cannot be written, 130 for Ctrl-C.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        arguments = parse(words)
        if transformers is None:
            raise InputError("transformers and accelerate are needed: pip install 'fsam-triton[transformers]'")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        finetune(arguments, words)
    except (InputError, WorkerError) as error:
        print(f"fsam-finetune: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fsam-finetune: error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fsam-finetune: interrupted", file=sys.stderr)
        return 130
    return 0
