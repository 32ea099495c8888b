"""What tests of estimate_fisher share: models, batches, and a loop over samples to compare with."""

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from fsam_triton.fisher import estimate_fisher

STATISTICS = ["square", "abs"]
KINDS = ["label", "expect"]


# -- models ------------------------------------------------------------------------------------------------------------


def tokens(batch: int, length: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    ids = torch.randint(1, 40, (batch, length), generator=generator)
    labels = torch.randint(0, 3, (batch,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40,
        n_embd=24,
        n_layer=2,
        n_head=2,
        n_positions=16,
        num_labels=3,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2ForSequenceClassification(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        num_labels=3,
        pad_token_id=0,
    )
    return transformers.LlamaForSequenceClassification(config)


class Cnn(nn.Module):
    """Strides, dilations, groups, "same" padding, other padding modes, changes in place of the first layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, groups=4, padding="same", dilation=2),
            nn.BatchNorm2d(8, affine=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 6, (3, 2), padding=(1, 0), bias=False, padding_mode="reflect"),
            nn.GroupNorm(2, 6),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
            nn.BatchNorm1d(3),
        )
        with torch.no_grad():
            for seed in range(3):
                self(images(5, 9, seed)[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def images(batch: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (batch,), generator=generator)
    return torch.randn(batch, 3, size, size, generator=generator), labels


class Shared(nn.Module):
    """A layer used three times, by F.linear too; an embedding tied to the output; raw parameters of all sorts."""

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6, padding_idx=0, sparse=True)
        self.positions = nn.Embedding(12, 6)
        self.first = nn.Parameter(torch.randn(1, 1, 6))
        self.norm = nn.RMSNorm(6)
        self.linear = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6))
        self.matrix = nn.Parameter(torch.randn(6, 6)) if raw else None
        self.output = nn.Linear(6, 20, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.cat([self.first.expand(len(ids), -1, -1), self.embedding(ids)], 1)
        h = h + self.positions(torch.arange(h.shape[1]))
        for _ in range(3):
            h = torch.tanh(self.linear(self.norm(h))) * self.scale
        h = h + F.linear(h, self.linear.weight)
        if self.matrix is not None:
            h = h + h @ self.matrix
        return self.output(h.mean(1))


def ids(batch: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 20, shape, generator=generator) for shape in ((batch, length), (batch,)))


def inputs(batch: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *shape, generator=generator), torch.randint(0, 3, (batch,), generator=generator)


# As many samples as positions, once: what is a position must not be taken for a sample.
MODELS = {
    "bert": (bert, [tokens(4, 7, 1), tokens(5, 5, 2), tokens(3, 9, 3)]),
    "gpt2": (gpt2, [tokens(4, 7, 1), tokens(5, 5, 2), tokens(3, 9, 3)]),
    "llama": (llama, [tokens(4, 7, 1), tokens(5, 5, 2)]),
    "cnn": (Cnn, [images(4, 9, 11), images(5, 8, 12)]),
    "shared": (Shared, [ids(4, 5, 1), ids(5, 4, 2), ids(3, 7, 3)]),
    "raw": (lambda: Shared(raw=True), [ids(4, 5, 1), ids(3, 7, 3)]),
}


def made(make, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make().to(dtype).eval()


def cast(batch, dtype: torch.dtype):
    """The batch with its floating point tensors in another type."""
    if isinstance(batch, dict):
        return batch
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in batch)


# -- the oracle --------------------------------------------------------------------------------------------------------


def by_loop(model, batches, kind="label", statistic="square", loss_fn=None) -> dict[str, Tensor]:
    """A backward pass for each sample alone, and with "expect" for each of its classes."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in params.items()}
    count = 0

    def add(loss: Tensor, weight: float = 1.0) -> None:
        grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True, allow_unused=True)
        for name, g in zip(params, grads, strict=True):
            if g is not None:
                g = g.to_dense().double()
                total[name] += weight * (g.square() if statistic == "square" else g.abs())

    for batch in batches:
        rows = batch["labels"] if isinstance(batch, dict) else batch[1]
        for i in range(len(rows)):
            label = rows[i : i + 1]
            if isinstance(batch, dict):
                logits = model(**{key: value[i : i + 1] for key, value in batch.items()}).logits
            else:
                logits = model(batch[0][i : i + 1])
            if kind == "label":
                add((loss_fn or F.cross_entropy)(logits, label).sum())
            else:
                for log_p in logits.log_softmax(-1)[0]:
                    add(log_p, float(log_p.detach().exp()))
            count += 1
    return {name: value / count for name, value in total.items()}


def size(fisher: Tensor, statistic: str) -> Tensor:
    """The size of a gradient, of which rounding errors are a part: the root of a square."""
    return fisher.double().sqrt() if statistic == "square" else fisher.double()


def assert_equal_but_for_rounding(actual, expected, statistic="square", rtol=1e-5, noise=None) -> None:
    """Within rtol of each element, except for what gradients are off by: `noise` by name, or some roundings of the
    largest gradient in fp64. (Gradients of key biases are zero except for that.)"""
    assert actual.keys() == expected.keys()
    largest = max(float(size(value, statistic).max()) for value in expected.values())
    for name, value in expected.items():
        exact, off = size(value, statistic), 1e-13 * largest if noise is None else noise[name]
        error = (size(actual[name], statistic) - exact).abs()
        # Half of rtol: the square's relative error is twice the root's.
        worst = float((error - rtol / 2 * exact).max())
        assert worst <= off, f"{name}: {worst} > {off}"


def count(batches) -> int:
    return sum(len(batch["labels"] if isinstance(batch, dict) else batch[1]) for batch in batches)


def estimate(model, batches, **options) -> dict[str, Tensor]:
    return estimate_fisher(model, batches, count(batches), progress=False, **options)
