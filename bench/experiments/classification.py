"""Fine-tunes a pretrained encoder, all weights or adapters, to classify texts, some of whose labels are wrong."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from bench.generalisation import stratified
from bench.records import Record
from fsam_triton.analysis import rounded_weights
from fsam_triton.finetune.models import encode, load_model, load_tokenizer
from fsam_triton.finetune.texts import Texts, label_names, read_bbc_news, read_texts, with_wrong_labels

from .choices import BITS, CLASSIFICATION, LORA, Block, Setting
from .methods import METHODS
from .training import epochs, train

BBC = "BBC news"
BATCH, TOKENS = 16, 32
# At most; of a small file at most these shares.
TEST, VALIDATION, TRAINING = (800, 0.3), (500, 0.2), (256, 0.5)
EPOCHS = 3
RANK = 8


def load_texts(source: str) -> tuple[str, Texts]:
    """The name and the texts of `"bbc"`, the packaged BBC news, or of a file of texts and labels; each text once."""
    if source == "bbc":
        name, texts = BBC, read_bbc_news(train_per_label=1000, validation_per_label=0)[0]
    else:
        name, texts = Path(source).stem.replace("_", " "), read_texts(source)
    return name, texts.select(list({row: i for i, row in enumerate(texts.rows)}.values()))


def with_adapters(model: transformers.PreTrainedModel, novel: Collection[str]) -> peft.PeftModel:
    """The model with LoRA adapters on all linear layers except the new head, which is trained as well.

    Args:
        model: with a new head.
        novel: names of its parameters that are not pretrained.
    """
    head = sorted({name.rpartition(".")[0] for name in novel}) or None
    options = {"target_modules": "all-linear", "exclude_modules": head, "modules_to_save": head}
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, **options))


class Task:
    """A data set, split and encoded for a model.

    Args:
        name: of the data.
        texts: with labels; each once.
        model: folder of the pretrained model.
        tokens: texts are cut to so many.
    """

    def __init__(self, name: str, texts: Texts, model: str, tokens: int = TOKENS) -> None:
        self.name, self.path, self.names, self.tokens = name, model, label_names(texts), tokens
        self.tokenizer = load_tokenizer(model)
        self.collate = transformers.DataCollatorWithPadding(self.tokenizer)
        test, validation, self.training = (
            min(most, int(share * len(texts))) for most, share in (TEST, VALIDATION, TRAINING)
        )
        test, rest = stratified(texts, test, seed=0)
        validation, self.pool = stratified(rest, validation, seed=0)
        self.judges = {"test": self.encode(test), "validation": self.encode(validation)}

    def encode(self, texts: Texts) -> list[dict[str, Any]]:
        return encode(self.tokenizer, texts, self.tokens, self.names)

    def block(self, noise: float = 0.0, experiment: str = CLASSIFICATION) -> Block:
        """The runs at a share of wrong labels, of all weights or of adapters."""
        folder = Path(self.path)
        # The packaged model's folder has the package's name around it.
        model = folder.parent.name if folder.name == "model" else folder.name
        return Block(experiment, model, self.name, noise, self.training, EPOCHS)

    def training_texts(self, setting: Setting) -> list[dict[str, Any]]:
        """What a run is trained on: of one seed the same texts, and the same labels are wrong."""
        train = self.encode(stratified(self.pool, setting.texts, setting.seed)[0])
        labels = [one["labels"] for one in train]
        labels = with_wrong_labels(labels, len(self.names), setting.noise, setting.seed)
        return [one | {"labels": label} for one, label in zip(train, labels, strict=True)]

    def run(self, setting: Setting) -> Record:
        """Train and judge; with right labels and on test texts with rounded weights, too. Adapters are merged first."""
        transformers.set_seed(setting.seed)
        model, novel = load_model(self.path, self.names)
        if setting.experiment == LORA:
            model = with_adapters(model, novel)
        texts = self.training_texts(setting)
        batches = [
            dict(self.collate([texts[i] for i in batch]))
            for batch in epochs(len(texts), BATCH, setting.epochs, setting.seed)
        ]

        def loss(batch: dict[str, Any]) -> torch.Tensor:
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
            return torch.nn.functional.cross_entropy(logits, batch["labels"])

        choice = (setting.learning_rate, setting.strength)
        cost = train(model, METHODS[setting.method], batches, loss, *choice, setting.seed, novel)
        if setting.experiment == LORA:
            model = model.merge_and_unload()
        accuracy, value = self.judge(model, setting.judged_on)
        result: Record = {"accuracy": accuracy, "loss": value}
        for bits in BITS if setting.judged_on == "test" and not setting.noise else ():
            with rounded_weights(model, bits):
                result[f"accuracy_{bits}"], result[f"loss_{bits}"] = self.judge(model, setting.judged_on)
        return result | vars(cost) | {"torch": torch.__version__}

    @torch.no_grad()
    def judge(self, model: torch.nn.Module, part: str) -> tuple[float, float]:
        """Accuracy and loss, without dropout."""
        # By length, so that little is padded.
        features = sorted(self.judges[part], key=lambda one: len(one["input_ids"]))
        logits = []
        for i in range(0, len(features), 50):
            batch = self.collate([{k: v for k, v in one.items() if k != "labels"} for one in features[i : i + 50]])
            logits.append(model(**batch).logits)
        logits, labels = torch.cat(logits), torch.tensor([one["labels"] for one in features])
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return (logits.argmax(-1) == labels).double().mean().item(), loss.item()
