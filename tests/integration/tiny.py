"""A tiny model of transformers, data for it, and how its weights are compared."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def bert(seed: int = 0, **config) -> nn.Module:
    """A tiny BERT classifier, with dropout."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        **config,
    )
    return transformers.BertForSequenceClassification(config)


def samples(n: int, seed: int) -> list[dict[str, Tensor]]:
    """Eight tokens and a label each."""
    tokens = torch.randint(32, (n, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row[0] % 2} for row in tokens]


def batch_of(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def saved_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(weights: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name
