"""Gathering from several tensors and scattering into them: kernel in the interpreter, C++ and reference, to the bit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import cpu, reference
from tests.kernels.cases import FLOATS, assert_same_bits, with_specials

sparse = pytest.importorskip("fsam_triton.kernels.sparse")
# Elements of each tensor and how many of them are chosen: none, fewer than a block, whole blocks, more.
SIZES = [(50, 7), (10, 0), (1, 1), (5000, 2048), (9000, 3001)]


@pytest.fixture(params=["kernel", "cpu", "reference"])
def passes(request, interpret):
    """`gather_` and `scatter_`, as the kernel, the C++ and the reference do it."""
    if request.param == "kernel":
        return tuple(lambda *args, f=f: interpret(f, *args) for f in (sparse.gather_, sparse.scatter_))
    module = cpu if request.param == "cpu" else reference
    return module.gather_, module.scatter_


@dataclass
class Problem:
    """Tensors, chosen places in each, and a compact buffer with gaps between their parts."""

    tensors: list[Tensor]
    places: list[Tensor]
    index: Tensor
    compact: Tensor
    offsets: list[int]
    counts: list[int]

    @classmethod
    def make(cls, dtype: torch.dtype, index_dtype: torch.dtype) -> Problem:
        generator = torch.Generator().manual_seed(0)
        places = [torch.randperm(n, generator=generator)[:k].sort().values for n, k in SIZES]
        counts = [k for _, k in SIZES]
        offsets = [sum(counts[:i]) + 3 * i for i in range(len(counts))]
        index = torch.full((offsets[-1] + counts[-1] + 5,), 2**20, dtype=index_dtype)
        for own, offset, count in zip(places, offsets, counts, strict=True):
            index[offset : offset + count] = own
        tensors = [with_specials(n, dtype, seed=n) for n, _ in SIZES]
        return cls(tensors, places, index, with_specials(len(index), dtype, seed=1), offsets, counts)

    def parts(self) -> list[Tensor]:
        """The compact buffer's part for each tensor."""
        pairs = zip(self.offsets, self.counts, strict=True)
        return [self.compact[offset : offset + count] for offset, count in pairs]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", FLOATS)
def test_gather_takes_the_chosen_elements_of_each_tensor_and_writes_nothing_else(passes, dtype, index_dtype):
    problem, expected = (Problem.make(FLOATS[dtype], index_dtype) for _ in range(2))
    for part, tensor, places in zip(expected.parts(), expected.tensors, expected.places, strict=True):
        part.copy_(tensor[places])
    passes[0](problem.compact, problem.tensors, problem.index, problem.offsets, problem.counts)
    assert_same_bits(problem.compact, expected.compact)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", FLOATS)
def test_scatter_writes_the_chosen_elements_of_each_tensor_and_nothing_else(passes, dtype, index_dtype):
    problem, expected = (Problem.make(FLOATS[dtype], index_dtype) for _ in range(2))
    for part, tensor, places in zip(expected.parts(), expected.tensors, expected.places, strict=True):
        tensor[places] = part
    passes[1](problem.tensors, problem.index, problem.compact, problem.offsets, problem.counts)
    for actual, tensor in zip(problem.tensors, expected.tensors, strict=True):
        assert_same_bits(actual, tensor)


def test_gather_of_one_tensor_leaves_the_others_parts_alone(passes):
    out, index = torch.zeros(6), torch.tensor([0, 2, 1, 3, 0, 1], dtype=torch.int32)
    passes[0](out, [torch.tensor([1.0, 2.0, 3.0, 4.0])], index, [2], [2])
    assert out.tolist() == [0, 0, 2, 4, 0, 0]


def test_nothing_chosen_is_nothing_written(passes):
    target, none = torch.ones(3), torch.zeros(0, dtype=torch.int32)
    passes[1]([target], none, torch.zeros(0), [0], [0])
    passes[0](target, [torch.zeros(4)], none, [0], [0])
    assert target.tolist() == [1, 1, 1]
