"""What tests of a FisherMask share: gradients, and the masks that they make."""

import torch
from torch import Tensor, nn

from fsam_triton import FSAM, FisherMask
from tests.fp64_optimizers import top_k_mask

SHAPES = ((24, 16), (8, 16), (7, 3))


def parameters_like(gradients: list[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones_like(gradient)) for gradient in gradients]


def perturb(optimizer: FSAM, parameters: list[nn.Parameter], gradients: list[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    optimizer.perturb()
    optimizer.restore()


def selected(gradients: list[Tensor], mask: FisherMask, **kwargs) -> list[Tensor]:
    """The masks of parameters that get `gradients` as their first ascent gradients."""
    parameters = parameters_like(gradients)
    optimizer = FSAM(parameters, mask=mask, **kwargs)
    perturb(optimizer, parameters, gradients)
    return [optimizer.mask_of(parameter) for parameter in parameters]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def expected_mask(gradients: list[Tensor], keep_ratio: float) -> Tensor:
    scores = flat([gradient.double() for gradient in gradients]).abs()
    return top_k_mask(scores, int(keep_ratio * scores.numel()))


def distinct(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Gradients of random signs whose magnitudes are 1, 2, ..., n in random order: no two are equal."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    values = (torch.randperm(sum(sizes), generator=generator) + 1).float()
    values *= torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
    return [part.view(shape) for part, shape in zip(values.split(sizes), shapes, strict=True)]
