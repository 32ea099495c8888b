"""What tests of the sharpness tools share: models, losses, batches and the tools themselves."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from fsam_triton.analysis import (
    Landscape,
    find_rho,
    hessian_eigenvalues,
    loss_landscape,
    m_sharpness,
    worst_case_sharpness,
)

EPS = 2.0**-52
MEASURES = {
    "m_sharpness": m_sharpness,
    "worst_case_sharpness": lambda *args: worst_case_sharpness(*args, steps=3),
    "hessian_eigenvalues": hessian_eigenvalues,
    "loss_landscape": lambda *args: loss_landscape(*args, points=2),
    "find_rho": lambda *args: find_rho(*args, rhos=[0.1, 0.2]),
}
measures = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())
FLAT = Landscape(torch.tensor([-1.0, 0.0, 1.0]), torch.ones(3, 3))
BOWL = Landscape(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([[2.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 2.0]]))
LINE = Landscape(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0]))


class Point(nn.Module):
    """Weights in two tensors, with nothing around them."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(w[:6].reshape(2, 3).clone())
        self.rest = nn.Parameter(w[6:].clone())

    def forward(self) -> Tensor:
        return torch.cat([self.matrix.flatten(), self.rest])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(eigenvalues: list[float]) -> Tensor:
    n = len(eigenvalues)
    basis = torch.linalg.qr(normal(n, n, seed=1))[0]
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


def quadratic(hessian: Tensor):
    """1/2 w'Hw + c'w, with c the mean of the batch's rows."""

    def loss(model: Point, batch: Tensor) -> Tensor:
        w = model()
        return 0.5 * w @ hessian @ w + batch.mean(0) @ w

    return loss


def half_square(model: Point, batch: Tensor) -> Tensor:
    """The mean over rows x of 1/2 (x'w)^2."""
    return 0.5 * (batch @ model()).square().mean()


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return normal(n, 4, seed=seed), torch.randint(3, (n,), generator=generator)


UNEQUAL = [rows(5, 1), rows(2, 2)]


def language_model(attention: str) -> nn.Module:
    """A decoder whose embedding is its output layer too."""
    config = transformers.GPT2Config(
        vocab_size=7,
        n_embd=4,
        n_layer=1,
        n_head=2,
        n_inner=5,
        n_positions=6,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).double().eval()


def next_token(model: nn.Module, batch: transformers.BatchEncoding) -> Tensor:
    """Not the model's own loss, which is in fp32."""
    return F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def token_batch(n: int, seed: int) -> transformers.BatchEncoding:
    ids = torch.randint(7, (n, 6), generator=torch.Generator().manual_seed(seed))
    return transformers.BatchEncoding({"input_ids": ids})


class TiedHead(torch.nn.Module):
    """An embedding, whose weights the last layer shares, and a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(6, 64)
        self.linear = torch.nn.Linear(64, 64)
        self.head = torch.nn.Linear(64, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, numbers):
        return self.head(torch.tanh(self.linear(self.embedding(numbers))))
