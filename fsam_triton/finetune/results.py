"""Writes what the runs of a command line have given: figures, curves, masks and checkpoints."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import FishMask
from ..files import written_whole
from . import evidence
from .errors import InputError, writing
from .options import Arguments
from .report import PeakMemory, Run, aligned, format_table, plot_curves

if TYPE_CHECKING:
    from . import sft, training

RESULTS = "all_results.json"
CHECKPOINT = "checkpoint.pt"
# The folder of those that transformers' Trainer writes, to which the file refers.
TRAINER_CHECKPOINTS = "trainer_checkpoints"
MASK = "mask.safetensors"
# Options that a run may be continued with, whatever they were before.
_FREE = {"output_dir", "overwrite_output_dir", "report", "save_steps", "resume_from_checkpoint"}


def run_folder(arguments: Arguments, sam_type: str) -> Path:
    """Return the folder that a run's model is saved to."""
    output = Path(arguments.output_dir)
    return output / sam_type if len(arguments.sam_type) > 1 else output


def make_folder(option: str, path: str) -> Path:
    """Return ``path``, the value of an option, as a folder that exists and can be written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder, prefix=".").close()
    except OSError as error:
        raise InputError(f"--{option} {path}: {error.strerror}") from error
    return folder


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 file, whole or not at all; return its path."""
    with writing(path), written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


class Output:
    """The folder of ``--output_dir``, the runs whose figures it is to have, and the files that were written to it.

    Args:
        arguments: the options.
        description: the data in words; a checkpoint is of the same.

    Attributes:
        folder: its path.
        runs: those that are finished.
        files: paths of this command's files, relative to the folder.
        stopped: the run that an error or Ctrl-C has ended, if it was evaluated before.
        page: path of the HTML report, once it is written.
        unfinished: state of the `Trainer` of the run to continue.

    Raises:
        InputError: the folder cannot be used, or has no checkpoint of these options.
    """

    def __init__(self, arguments: Arguments, description: str) -> None:
        self.arguments = arguments
        self.description = description
        self.folder: Path = make_folder("output_dir", arguments.output_dir)
        self.runs: list[Run] = []
        self.files: set[str] = set()
        self.stopped: Run | None = None
        self.unfinished: dict[str, Any] | None = None
        self.page: Path | None = None
        if arguments.resume_from_checkpoint:
            self._load_checkpoint()
        elif not arguments.overwrite_output_dir and not all(e.name.startswith(".") for e in self.folder.iterdir()):
            raise InputError(
                f"--output_dir {self.folder}: not empty; --overwrite_output_dir replaces the files of an earlier run"
            )
        elif arguments.save_steps:
            # The Trainer would take those of an earlier run for its own.
            self._remove_trainer_checkpoints()
        for sam_type in arguments.sam_type:
            foreign = run_folder(arguments, sam_type) / "adapter_config.json"
            ours = foreign.relative_to(self.folder).as_posix() in self._earlier_files()
            if foreign.exists() and not ours and not arguments.lora:
                raise InputError(f"--output_dir: {foreign} is PEFT's, and would be loaded in place of the model")

    def wrote(self, *paths: Path) -> None:
        """Note that files in the folder are this command's."""
        self.files.update(path.relative_to(self.folder).as_posix() for path in paths)

    @property
    def all_runs(self) -> list[Run]:
        """The finished runs, and the one that an error has ended."""
        return [*self.runs, self.stopped] if self.stopped else self.runs

    def write(self, mask: FishMask | None) -> None:
        """Write figures, curves and the mask, if there is one; remove the files of an earlier run."""
        curves, table = self.folder / "training_curves.png", self.folder / "mask.txt"
        earlier = self._earlier_files()
        plots = importlib.util.find_spec("matplotlib")
        self.wrote(*([table, self.folder / MASK] if mask else []), *([curves] if plots else []))
        self.write_results(mask)
        if mask:
            write_text(table, mask.table() + "\n")
            self.save_mask(mask)
        if plots:
            with writing(curves):
                plot_curves(self.all_runs, curves)
        for name in earlier - self.files:
            self._remove(name)

    def write_results(self, mask: FishMask | None) -> None:
        """Write the figures alone, and which files are this command's."""
        results = self.folder / RESULTS
        self.wrote(results)
        if self.page and self.page.resolve().parent == self.folder.resolve():
            self.wrote(self.folder / self.page.name)
        content = {
            "arguments": dataclasses.asdict(self.arguments),
            "trained_weights": mask and mask.count,
            "runs": [{**run.summary(), **dataclasses.asdict(run)} for run in self.all_runs],
            "files": sorted(self.files),
        }
        write_text(results, json.dumps(content, indent=1) + "\n")

    def show(self, mask: FishMask | None) -> None:
        """Print the table, and how it compares with other seeds if that is known."""
        print(format_table(self.all_runs, PeakMemory(self.arguments.device).meaning))
        if compared := evidence.other_seeds(self.arguments, self.all_runs):
            print("", *aligned(compared), sep="\n")
        if mask:
            print(f"trained weights: {mask.count:,} of {mask.total:,} ({mask.density:.3%})")
        if not importlib.util.find_spec("matplotlib"):
            print("no training_curves.png: matplotlib is not installed", file=sys.stderr)

    def show_places(self) -> None:
        """Print where everything is."""
        print(f"written to {self.folder}")
        if self.page:
            print(f"report: {self.page}")
        sys.stdout.flush()

    def _earlier_files(self) -> set[str]:
        """Return the files that the results in the folder name as theirs."""
        try:
            files = json.loads((self.folder / RESULTS).read_text(encoding="utf-8"))["files"]
            return {name for name in files if isinstance(name, str)}
        except (OSError, ValueError, KeyError, TypeError):
            return set()

    def _remove(self, name: str) -> None:
        path = self.folder / name
        if path.resolve().is_relative_to(self.folder.resolve()):
            path.unlink(missing_ok=True)
            if path.parent != self.folder and not any(path.parent.iterdir()):
                path.parent.rmdir()

    # -- the checkpoint ------------------------------------------------------------------------------------------------

    def save_mask(self, mask: FishMask) -> None:
        """Write which weights are trained."""
        with writing(self.folder / MASK):
            mask.save(self.folder / MASK)

    def load_mask(self) -> FishMask | None:
        """Return the mask of the runs that are continued; None where nothing is, or all weights are trained."""
        if not self.arguments.resume_from_checkpoint or self.arguments.trains_all:
            return None
        try:
            return FishMask.load(self.folder / MASK)
        except (OSError, ValueError) as error:
            raise InputError(f"--resume_from_checkpoint: {self.folder / MASK} is missing or damaged") from error

    def save_checkpoint(self, trainer: training.Trainer | sft.Trainer | None = None) -> None:
        """Write what `write` and the run under way, if there is one, need to be continued."""
        path = self.folder / CHECKPOINT
        content = {
            "options": self._options(),
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "files": sorted(self.files),
            "trainer": trainer and trainer.state_dict(),
        }
        with writing(path), written_whole(path) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)
        if trainer is None:
            self._remove_trainer_checkpoints()

    def remove_checkpoint(self) -> None:
        """Remove it: all runs are finished."""
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        self._remove_trainer_checkpoints()

    def _remove_trainer_checkpoints(self) -> None:
        if self.arguments.task == "causal-lm":
            shutil.rmtree(self.folder / TRAINER_CHECKPOINTS, ignore_errors=True)

    def _load_checkpoint(self) -> None:
        path = self.folder / CHECKPOINT
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            options, self.unfinished = content["options"], content["trainer"]
            self.runs, self.files = [Run(**run) for run in content["runs"]], set(content["files"])
        except FileNotFoundError as error:
            raise InputError(f"--resume_from_checkpoint: {path} does not exist") from error
        except Exception as error:  # torch and pickle raise all kinds for a damaged file
            raise InputError(
                f"--resume_from_checkpoint: {path} is damaged, or no checkpoint of this command"
            ) from error
        for name, value in self._options().items():
            if options.get(name) != value:
                raise InputError(
                    f"--resume_from_checkpoint: {name} is {value!r}; in {path} it is {options.get(name)!r}"
                )

    def _options(self) -> dict[str, Any]:
        """Return what a checkpoint and the command that continues it must have in common."""
        options = {name: value for name, value in dataclasses.asdict(self.arguments).items() if name not in _FREE}
        return {**options, "data": self.description}
