"""What tests of deltas share: models with parameters of all sorts, as if trained, and comparisons of bytes."""

import copy
import pathlib

import torch
from torch import Tensor, nn

from fsam_triton import FishMask, save_delta

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Odd(nn.Module):
    """Tied, 0-dim, empty, transposed, channels-last and frozen parameters, and buffers of all sorts."""

    def __init__(self, seed: int = 0, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 6)
        self.norm = nn.BatchNorm1d(6)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.zeros(()))
        self.empty = nn.Parameter(torch.zeros(0, 5))
        self.transposed = nn.Parameter(torch.zeros(7, 11).t())
        self.frozen = nn.Parameter(torch.zeros(9), requires_grad=False)
        self.head = nn.Linear(6, 40)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("not_saved", torch.zeros(3), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in [*self.parameters(), *self.buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))


def trained(base: nn.Module, mask: FishMask, seed: int = 1) -> nn.Module:
    """A copy with other numbers in the selected weights, strange ones among them, and in the buffers."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    strange = torch.tensor([torch.nan, -0.0, torch.inf, 0.0, -torch.inf, 1e-45, -1e-7])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in mask.shapes:
                new = torch.randn(p.numel(), generator=generator)
                new[: len(strange)] = strange[: p.numel()]
                p.copy_(torch.where(mask.bits(name), new.view(p.shape).to(p.dtype), p))
        for name, buffer in model.named_buffers():
            if name in model.state_dict():
                buffer.add_(seed)
    return model


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Everything a model has, as bytes."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: bits_of(tensor).clone() for name, tensor in named}


def assert_same(model: nn.Module, other: dict[str, Tensor]) -> None:
    mine = snapshot(model)
    assert mine.keys() == other.keys()
    for name in mine:
        assert torch.equal(mine[name], other[name]), name


def odd_mask(model: nn.Module, seed: int = 0) -> FishMask:
    return FishMask.random(model, 0.4, seed, always_trainable=["conv", "scale"])


def small_delta(path: pathlib.Path) -> nn.Module:
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    mask = FishMask.random(base, 0.5)
    save_delta(trained(base, mask), mask, path)
    return base


def half_a_write(path: pathlib.Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError("no space left on device")


def no_replace(*paths: str) -> None:
    raise KeyboardInterrupt
