"""A small model with everything a `state_dict` may have, its training, and what its state must show."""

import torch
from torch import Tensor, nn

from fsam_triton import MomentumSAM

TOKENS = torch.arange(8)[:, None]


class Tagger(nn.Module):
    """Nested, with tied weights, a parameter of its own, a buffer, and a module that is never called itself."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 16)
        self.block = nn.ModuleDict(
            {"attention": nn.MultiheadAttention(16, 2), "norms": nn.ModuleList([nn.LayerNorm(16)])}
        )
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(1))
        self.head = nn.Linear(16, 8)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen += 1
        x = self.embed(tokens)
        x = x + self.block["attention"](x, x, x, need_weights=False)[0]
        return self.head(self.block["norms"][0](x)) * self.scale


def tagger(dtype=torch.float32, seed: int = 0) -> Tagger:
    torch.manual_seed(seed)
    return Tagger().to(dtype)


def pair(dtype=torch.float32, **kwargs) -> tuple[Tagger, MomentumSAM]:
    model = tagger(dtype)
    return model, MomentumSAM(model.parameters(), lr=0.01, rho=4.0, **kwargs)


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(TOKENS)[:, 0].float(), TOKENS[:, 0])


def train(model: nn.Module, optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def held_by(model: nn.Module) -> dict[str, Tensor]:
    """The parameters, whatever a state dict shows."""
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


def assert_equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name]), name


def assert_shows_clean(model: nn.Module, optimizer: MomentumSAM) -> None:
    """What state_dict() shows of perturbed parameters is what they hold afterwards, and not what they hold now."""
    assert optimizer.perturbed
    shown = copied(model.state_dict())
    for name, parameter in model.named_parameters():
        # The perturbation of a single weight may be below its last digit.
        assert parameter.numel() == 1 or not torch.equal(shown[name], parameter), f"{name} is not perturbed"
    optimizer.restore()
    assert all(torch.equal(shown[name], parameter) for name, parameter in held_by(model).items())
    assert_equal(model.state_dict(), shown)
