"""Trains a small language model on old texts, then on new ones, and measures what it has forgotten."""

from __future__ import annotations

import copy
import functools
import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

from bench.records import Record
from fsam_triton.analysis import rounded_weights
from fsam_triton.files import written_whole

from .choices import BITS, PRETRAINING, START, Block, Setting
from .methods import ADAMW, METHODS, Method
from .training import epochs, train

WINDOW, VOCABULARY = 64, 4096
BATCH = {"old": 16, "new": 8}
HIDDEN, LAYERS, HEADS = 128, 2, 4
# Steps at a constant learning rate that all runs share, of the end of the pretraining, and of the fine-tuning.
SHARED, END, TUNING = 2000, 100, 100
SHARED_RATE = 2e-3
# Of the new texts, where the method is that of the pretraining.
TUNING_RATE = 1e-3
# Windows that judge, at most.
JUDGES = 200
CONSTANT = Method(METHODS[ADAMW].optimizer, decay="none")


def split(texts: Sequence[str]) -> dict[str, list[str]]:
    """A tenth of the texts for tests, a tenth for validation, the rest for training; always the same."""
    order = random.Random(0).sample(list(texts), len(texts))
    tenth = len(order) // 10
    return {"test": order[:tenth], "validation": order[tenth : 2 * tenth], "training": order[2 * tenth :]}


class Corpora:
    """The old and the new texts as windows of tokens.

    Tokens that are not among the most frequent ones of the training texts are one unknown token, and a text ends with
    another.

    Args:
        tokenizer: a transformers tokenizer.
        old, new: the texts.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, old: Sequence[str], new: Sequence[str]) -> None:
        parts = {"old": split(old), "new": split(new)}
        ids = {
            (name, part): tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            for name, of in parts.items()
            for part, texts in of.items()
        }
        counts = Counter(i for name in parts for text in ids[name, "training"] for i in text)
        number = {token: n for n, (token, _) in enumerate(counts.most_common(VOCABULARY - 2), start=2)}
        self.windows = {key: self._windows(texts, number) for key, texts in ids.items()}
        for name in parts:
            for part in ("test", "validation"):
                self.windows[name, part] = self.windows[name, part][:JUDGES]

    @staticmethod
    def _windows(texts: list[list[int]], number: dict[int, int]) -> Tensor:
        """[windows, WINDOW], of texts one after the other."""
        tokens = [n for text in texts for n in [*(number.get(token, 1) for token in text), 0]]
        count = len(tokens) // WINDOW
        return torch.tensor(tokens[: count * WINDOW]).view(count, WINDOW)


def new_model() -> torch.nn.Module:
    """The language model before training."""
    transformers.set_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": WINDOW}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **sizes, **heads)
    return transformers.LlamaForCausalLM(config)


def loss_of(model: torch.nn.Module, windows: Tensor) -> Tensor:
    """The mean loss of a token."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=windows).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten())


class Forgetting:
    """Runs of one pair of corpora.

    A method has either the end of the pretraining, followed by fine-tuning with AdamW, or the fine-tuning, after a
    pretraining that ends with AdamW. The beginning of the pretraining is the same for all.

    Args:
        name: of the pair.
        corpora: its windows.
        cache: folder for the pretrained models.
    """

    def __init__(self, name: str, corpora: Corpora, cache: Path) -> None:
        self.name, self.corpora, self.cache = name, corpora, cache
        self.shared = functools.cache(self.shared)
        self.pretrained = functools.cache(self.pretrained)

    def block(self, experiment: str) -> Block:
        """The runs of one experiment; `texts` is the number of batches of the part that has the method."""
        steps = END if experiment == PRETRAINING else TUNING
        return Block(experiment, f"Llama, {LAYERS} x {HIDDEN}", self.name, 0.0, steps, 1)

    def train(
        self, model: torch.nn.Module, part: str, method: Method, count: int, rate: float, strength: float, seed: int
    ) -> dict[str, float]:
        """Train on `count` batches of windows of one corpus, drawn by the seed."""
        pool = self.corpora.windows[part, "training"]
        generator = torch.Generator().manual_seed(seed)
        batch = BATCH[part]
        size = min(count * batch, len(pool))
        drawn = pool[torch.randperm(len(pool), generator=generator)[:size]]
        times = -(-count * batch // size) * method.epochs
        batches = [drawn[i] for i in epochs(size, batch, times, seed)][: count * method.epochs]
        cost = train(model, method, batches, lambda batch: loss_of(model, batch), rate, strength, seed)
        return vars(cost)

    def shared(self) -> torch.nn.Module:
        """The model after the shared part of the pretraining; from the cache if that is of this corpus and setting."""
        model, pool = new_model(), self.corpora.windows["old", "training"]
        what = (
            f"{torch.__version__} {model.config} {SHARED} {SHARED_RATE} {BATCH['old']}".encode()
            + pool.numpy().tobytes()
        )
        path = self.cache / f"pretrained_{hashlib.sha256(what).hexdigest()[:16]}.pt"
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model.eval()
        # Before the decay of the learning rate: that is the part which a method may have.
        self.train(model, "old", CONSTANT, SHARED, SHARED_RATE, 0.0, seed=0)
        self.cache.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            torch.save(model.state_dict(), temporary)
        return model

    def pretrained(self) -> torch.nn.Module:
        """The model after a pretraining that ends with AdamW, too."""
        model = copy.deepcopy(self.shared())
        self.train(model, "old", METHODS[ADAMW], END, START[PRETRAINING], 0.0, seed=0)
        return model

    def run(self, setting: Setting) -> Record:
        """Train and measure the losses on both corpora after the fine-tuning.

        On test texts before it, too, and with rounded weights: before it only if the pretraining had the method.
        """
        method, choice = METHODS[setting.method], (setting.learning_rate, setting.strength, setting.seed)
        if setting.experiment == PRETRAINING:
            model = copy.deepcopy(self.shared())
            cost = self.train(model, "old", method, setting.texts, *choice)
        else:
            model = copy.deepcopy(self.pretrained())
        result = {}
        if setting.judged_on == "test":
            result = self.losses(model, "test", "_before", setting.experiment == PRETRAINING)
        if setting.experiment == PRETRAINING:
            self.train(model, "new", METHODS[ADAMW], TUNING, TUNING_RATE, 0.0, setting.seed)
        else:
            cost = self.train(model, "new", method, setting.texts, *choice)
        return result | self.losses(model, setting.judged_on) | cost | {"torch": torch.__version__}

    def losses(self, model: torch.nn.Module, part: str, suffix: str = "", rounding: bool = True) -> Record:
        """The mean loss of a token of both corpora, and the same with rounded weights in tests."""
        found = {f"{name}_loss{suffix}": self.loss(model, name, part) for name in ("old", "new")}
        for bits in BITS if rounding and part == "test" else ():
            with rounded_weights(model, bits):
                found |= {f"{name}_loss{suffix}_{bits}": self.loss(model, name, part) for name in ("old", "new")}
        return found

    @torch.no_grad()
    def loss(self, model: torch.nn.Module, name: str, part: str) -> float:
        """The mean loss of a token of one part of a corpus."""
        windows = self.corpora.windows[name, part].split(50)
        losses = [loss_of(model, some).item() * len(some) for some in windows]
        return sum(losses) / sum(len(some) for some in windows)
