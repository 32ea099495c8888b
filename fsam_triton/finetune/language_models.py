"""What ``--task causal-lm`` trains: texts, tokenizer and model, pretrained or a small GPT from scratch."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .. import FishMask
from .corpus import Corpus, read_corpus, read_packaged_news
from .errors import InputError, one_line
from .models import loading, position_limit
from .optional import transformers
from .options import Arguments

if TYPE_CHECKING:
    import datasets
    import peft
    from transformers import PreTrainedTokenizerBase

    from .sft import Trainer

# The model of runs without --model_name_or_path, the tokens of its tokenizer, and articles per topic where there are
# no texts either.
LAYERS, HEADS, WIDTH, POSITIONS = 4, 4, 128, 128
VOCABULARY = 2048
ARTICLES = {"train_per_label": 160, "validation_per_label": 40}


@dataclass
class Task:
    """The texts, the tokenizer and the way to the model that all runs of a language model have in common.

    `command.Task` has the same methods.

    Args:
        path: folder or hub name of the pretrained model; None for a new one.
        tokenizer: of the model.
        train, validation: texts as `datasets.Dataset`; in tokens once the first `sft.Trainer` has been made.
        description: the data in words.
        length: tokens that texts are cut to.
        sizes: weights of each of the model's trained parameters, by name.
        weights: how many weights the model has, those of an adapter left out.
        empty: how many texts without a character were left out.
        collator: makes a batch of a list of texts in tokens; None until the first `sft.Trainer` has been made.
    """

    path: str | None
    tokenizer: PreTrainedTokenizerBase
    train: datasets.Dataset
    validation: datasets.Dataset
    description: str
    length: int
    sizes: dict[str, int]
    weights: int
    empty: int
    collator: Any = None
    test: None = None

    def notes(self, arguments: Arguments) -> list[str]:
        """Return what the user did not ask for and is told, as lines."""
        lines = []
        if self.path is None:
            lines.append(
                f"no --model_name_or_path: a GPT of {self.weights / 1e6:.1f} million weights is trained from scratch"
            )
        if self.length < arguments.max_seq_length:
            lines.append(f"texts are cut to {self.length} tokens: model and tokenizer take no more")
        if self.empty:
            lines.append(f"empty texts that are left out: {self.empty}")
        return lines

    def total_steps(self, arguments: Arguments, workers: int) -> None:
        """Return None: the Trainer counts the steps, because packing changes how many rows there are."""

    def choose_mask(self, arguments: Arguments) -> None:
        """Return None: all weights are trained, or those of an adapter."""

    def search_rho(self, arguments: Arguments, sam_type: str) -> None:
        """Return None: ``--rho auto`` is for classifiers."""

    def trainer(
        self, arguments: Arguments, sam_type: str, steps: int | None, mask: FishMask | None, worker: tuple[int, int]
    ) -> Trainer:
        """Return what makes a run."""
        from .sft import Trainer

        return Trainer(arguments, sam_type, self)

    def load_model(self, dtype: torch.dtype = torch.float32) -> tuple[Any, set[str]]:
        """Return the model that the runs start from, and the names of the parameters that are not pretrained."""
        if self.path is None:
            model = new_model(self.tokenizer).to(dtype)
            return model, {name for name, _ in model.named_parameters()}
        with loading(self.path):
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                self.path, dtype=dtype, output_loading_info=True
            )
        model, info = loaded
        check_causal(model, self.path)
        return model, set(info["missing_keys"]) | {name for name, *_ in info["mismatched_keys"]}

    def saved_model(self, arguments: Arguments, folder: Path) -> Any:
        """Return the model that a run has saved, in fp32; an adapter is merged into it."""
        if not arguments.lora:
            return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        import peft

        with quiet():
            model = peft.PeftModel.from_pretrained(self.load_model()[0], folder)
        return model.merge_and_unload().requires_grad_(True)

    def draw_batches(self, count: int, size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches of training texts drawn at random."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        for i in range(0, len(order), size):
            batch = self.collator([self.train[j] for j in order[i : i + size]])
            names = ("input_ids", "attention_mask", "position_ids", "labels")
            yield {name: batch[name] for name in names if name in batch}

    def facts(self, arguments: Arguments) -> dict[str, str]:
        """Return, in words by name, what a report says of model and data."""
        if self.path is None:
            return {"model": f"GPT-2, {self.weights:,} weights, from scratch"}
        if not arguments.lora:
            return {"model": self.path}
        trained = sum(self.sizes.values())
        return {"model": self.path, "trained weights": f"LoRA adapter of {trained:,} for a model of {self.weights:,}"}


def prepare(arguments: Arguments) -> Task:
    """Return the `Task` of the arguments.

    Raises:
        InputError: something the user gave cannot be used, or a package is missing.
    """
    check_installed(arguments)
    if dist.is_available() and dist.is_torchelastic_launched():
        raise InputError("--task causal-lm trains in one process: start it without torchrun")
    if arguments.device.type == "cuda" and torch.cuda.device_count() > 1:
        raise InputError("--task causal-lm trains on one GPU: let CUDA_VISIBLE_DEVICES name it")
    train, validation = read_data(arguments)
    path = arguments.model_name_or_path
    if path:
        tokenizer, empty = load_tokenizer(path), load_empty_model(path)
    elif train.has_messages:
        raise InputError(f"{train.source}: messages need --model_name_or_path: a tokenizer with a chat template")
    else:
        tokenizer = train_tokenizer(train)
        with torch.device("meta"):
            empty = new_model(tokenizer)
    for corpus in (train, validation):
        check_messages(tokenizer, corpus, path)
    length = int(min(arguments.max_seq_length, tokenizer.model_max_length, position_limit(empty)))
    if length < 2:
        raise InputError(f"Invalid --max_seq_length: {length}; must be > 1, or there is nothing to predict")
    weights = sum(p.numel() for p in empty.parameters())
    if arguments.lora:
        empty = with_adapter(arguments, empty)
    sizes = {name: p.numel() for name, p in empty.named_parameters() if p.requires_grad}
    description = f"{train.source}: {len(train)} training and {len(validation)} validation texts"
    left_out = train.empty + validation.empty if validation.source != train.source else train.empty
    return Task(path, tokenizer, dataset(train), dataset(validation), description, length, sizes, weights, left_out)


def check_installed(arguments: Arguments) -> None:
    """Raise InputError if a package is missing."""
    needed = ("trl", "datasets", "peft") if arguments.lora else ("trl", "datasets")
    missing = [name for name in needed if not importlib.util.find_spec(name)]
    if missing:
        raise InputError(f"--task causal-lm needs {' and '.join(missing)}: pip install 'fsam-triton[lm]'")


def read_data(arguments: Arguments) -> tuple[Corpus, Corpus]:
    """Return the (training, validation) texts that the arguments ask for."""
    column = None
    if arguments.text_columns:
        column, *more = arguments.text_columns
        if more:
            raise InputError(f"Invalid --text_column_names: {arguments.text_column_names}; must be one column")
    if not arguments.train_file:
        train, validation = read_packaged_news(**ARTICLES)
    else:
        train = read_corpus(arguments.train_file, column)
        if arguments.validation_file:
            validation = read_corpus(arguments.validation_file, column)
            if validation.kind != train.kind:
                raise InputError(f"{validation.source}: {validation.kind}, but {train.source} has {train.kind}")
        else:
            train, validation = train.hold_out()
    return train.sample(arguments.max_train_samples), validation.sample(arguments.max_eval_samples)


def dataset(corpus: Corpus) -> datasets.Dataset:
    """Return the rows as a `datasets.Dataset`."""
    import datasets

    return datasets.Dataset.from_list(corpus.rows)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the pretrained model."""
    with loading(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token is None:
        raise InputError(f"--model_name_or_path {path}: its tokenizer has no token for the end of a text")
    return tokenizer


def load_empty_model(path: str) -> Any:
    """Return the model without its weights: on the meta device."""
    if Path(path, "adapter_config.json").exists():
        raise InputError(f"--model_name_or_path {path}: an adapter of PEFT's; merge it into its model first")
    with loading(path):
        config = transformers.AutoConfig.from_pretrained(path)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"--model_name_or_path {path}: '{config.model_type}' has no causal language model")
    with loading(path), torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def train_tokenizer(corpus: Corpus) -> PreTrainedTokenizerBase:
    """Return a tokenizer of `VOCABULARY` byte pairs that is made for the texts."""
    import tokenizers

    end = "<|endoftext|>"
    model = tokenizers.ByteLevelBPETokenizer()
    texts = (text for row in corpus.rows for text in row.values())
    model.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[end], show_progress=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model._tokenizer, eos_token=end, pad_token=end, model_max_length=POSITIONS
    )


def new_model(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return a small GPT with random weights."""
    end: Any = tokenizer.eos_token_id
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=end,
        eos_token_id=end,
    )
    return transformers.GPT2LMHeadModel(config)


def check_messages(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, path: str | None) -> None:
    """Raise InputError for messages of which the chat template makes no text."""
    if not corpus.has_messages:
        return
    if tokenizer.chat_template is None:
        raise InputError(
            f"--model_name_or_path {path}: its tokenizer has no chat template, which {corpus.source} needs"
        )
    for row, place in zip(corpus.rows, corpus.places, strict=True):
        try:
            tokenizer.apply_chat_template([message for part in row.values() for message in part], tokenize=False)
        except Exception as error:  # a template can raise anything
            raise InputError(f"{place}: refused by the model's chat template ({one_line(error)})") from error


@torch.no_grad()
def check_causal(model: Any, path: str) -> None:
    """Raise InputError if a token changes what is predicted before it, as in BERT."""
    model.eval()
    seen = torch.ones(1, 4, dtype=torch.long)
    one, other = (
        model(input_ids=torch.tensor([[3, 2, 1, last]]), attention_mask=seen).logits[:, :3].float() for last in (1, 2)
    )
    if not torch.allclose(one, other, rtol=0.01, atol=0.01 * one.abs().max().item()):
        raise InputError(
            f"--model_name_or_path {path}: '{model.config.model_type}' sees the tokens that it is to predict; "
            "it is no causal language model"
        )


def with_adapter(arguments: Arguments, model: Any) -> Any:
    """Return the model with the LoRA adapter that the options ask for.

    Raises:
        InputError: there is nothing for it to be put into.
    """
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        with quiet():
            model = peft.get_peft_model(model, adapter_config(arguments))
    except ValueError as error:
        raise InputError(f"--lora_target_modules: {one_line(error)}") from error
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise InputError("--lora_target_modules: TRL trains no adapter of the output layer")
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what the libraries warn each other of: GPT-2's transposed weights, names that will change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def adapter_config(arguments: Arguments) -> peft.LoraConfig:
    """Return PEFT's configuration of the adapter."""
    import peft

    modules = arguments.lora_target_modules
    keywords: dict[str, Any] = {
        "r": arguments.lora_r,
        "lora_alpha": arguments.lora_alpha,
        "lora_dropout": arguments.lora_dropout,
        "target_modules": "all-linear" if modules == ["all-linear"] else modules,
    }
    return peft.LoraConfig(**keywords, task_type="CAUSAL_LM")
