"""What tests of a FishMask share: scores with many ties, and the masks that they define."""

import torch
from torch import Tensor, nn

from fsam_triton import FishMask


def sets(mask: FishMask) -> dict[str, set[int]]:
    return {name: set(mask.indices(name).tolist()) for name in mask.shapes}


def by_definition(scores: dict[str, Tensor], k: int) -> dict[str, set[int]]:
    """The k largest by Python's stable sort, of equal ones the first in row-major order."""
    entries = [(float(x), name, i) for name, score in scores.items() for i, x in enumerate(score.flatten())]
    chosen = sorted(entries, key=lambda entry: -entry[0])[:k]
    return {name: {i for _, n, i in chosen if n == name} for name in scores}


def odd_scores(seed: int = 0, levels: int = 6) -> dict[str, Tensor]:
    """Scores of odd shapes, strides and types with many ties; small integers are exact in all types."""
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randint(0, levels, shape, generator=generator).to(dtype)

    return {
        "a.weight": made(13, 7),
        "b.weight": made(9, 40).t(),
        "half": made(6, 3, 4, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last),
        "empty": made(0, 3),
        "scalar": made(),
        "double": made(33, dtype=torch.float64),
        "half16": made(64, dtype=torch.float16),
        "classifier.weight": made(2, 13),
        "classifier.bias": made(2),
    }


def sizes(scores: dict[str, Tensor]) -> int:
    return sum(score.numel() for score in scores.values())


def small_model() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"encoder": nn.Linear(12, 20), "norm": nn.LayerNorm(20), "classifier": nn.Linear(20, 3)})
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model
