"""A small net in two parts, which tests of forward passes train with MomentumSAM."""

import torch
from torch import Tensor, nn

from fsam_triton import MomentumSAM

X = torch.linspace(-1, 1, 20).view(5, 4)


class Net(nn.Module):
    """Two parts; `through` says how a part is evaluated."""

    def __init__(self, through=lambda part, x: part(x), dtype=torch.float32):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        self.through = through
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator).to(dtype) / 2

    def forward(self, x: Tensor) -> Tensor:
        return self.through(self.head, self.through(self.body, x))


def optimizer_of(model: nn.Module, **kwargs) -> MomentumSAM:
    return MomentumSAM(model.parameters(), **{"lr": 0.05, "rho": 1.0, **kwargs})


def loss_of(model, x: Tensor = X) -> Tensor:
    return model(x).float().square().mean()


def train(model, optimizer, steps: int = 4) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def trained(steps: int = 4, **kwargs) -> tuple[Net, MomentumSAM]:
    model = Net()
    optimizer = optimizer_of(model, **kwargs)
    train(model, optimizer, steps)
    return model, optimizer


def clean_copy(model: nn.Module, like=Net) -> nn.Module:
    out = like()
    out.load_state_dict(model.state_dict())
    return out
