"""What a step of FSAM allocates, and what it keeps."""

import functools
import gc
import types
import weakref

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, AdamWL2SP, FisherMask
from tests.training import largest_allocation

pytestmark = pytest.mark.usefixtures("one_thread")


def allocated_by_two_steps(n: int, dtype: torch.dtype, **kwargs) -> int:
    """The largest allocation of the third and fourth step on one tensor of n weights."""
    weight = nn.Parameter(torch.randn(n // 512, 512).to(dtype))
    optimizer = FSAM([weight], **kwargs)
    gradient = torch.randn_like(weight)

    def take_two_steps():
        for finish in (optimizer.perturb, optimizer.step) * 2:
            weight.grad = gradient
            finish()

    take_two_steps()
    return largest_allocation(take_two_steps)


@pytest.mark.parametrize(
    ("dtype", "kwargs"),
    [
        (torch.float32, {}),
        (torch.float32, {"adaptive": True}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"master_weights": True}),
    ],
    ids=["sam", "asam", "bf16", "bf16_master"],
)
def test_step_allocates_nothing_of_the_parameters_size(dtype, kwargs):
    assert allocated_by_two_steps(2**18, dtype, **kwargs) < 2**18 // 8


@pytest.mark.parametrize("master_weights", [False, True], ids=["rounded", "master"])
def test_what_a_refresh_of_the_mask_allocates_does_not_grow_with_the_parameters(master_weights):
    """Selection goes through blocks of a fixed size; anything of the parameters' size would double."""
    small, large = (
        allocated_by_two_steps(n, torch.bfloat16, master_weights=master_weights, mask=FisherMask(0.1))
        for n in (2**21, 2**22)
    )
    assert small == large


def persistent_bytes(optimizer) -> int:
    """The bytes of every storage that can be reached from the optimizer, counted once."""
    skipped = (type, types.ModuleType, types.FrameType, types.BuiltinFunctionType)
    seen, storages, queue = set(), {}, [optimizer]
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, skipped):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
            queue.append(item.grad if item.is_leaf else None)
        elif isinstance(item, types.FunctionType):
            queue.extend((item.__closure__, item.__defaults__, item.__kwdefaults__))
        else:
            queue.extend(gc.get_referents(item))
    return sum(storages.values())


@pytest.mark.parametrize("mask", [None, FisherMask(0.1)], ids=["sam", "masked"])
def test_sam_needs_a_backup_in_the_weights_type_and_a_bit_of_a_mask_more_than_adamw(mask):
    n, sizes = 1024 * 1024, []
    for factory in (AdamWL2SP, functools.partial(FSAM, mask=mask)):
        weight = nn.Parameter(torch.randn(1024, 1024, dtype=torch.bfloat16))
        optimizer = factory([weight], master_weights=True)
        optimizer.step(lambda weight=weight: weight.sum().backward())
        sizes.append(persistent_bytes(optimizer))
    # Tables, scalars, and a histogram to find the k-th largest score with, do not grow with the parameters.
    # Weight, gradient, what its rounding loses, two moments.
    assert 0 <= sizes[0] - n * (2 + 2 + 2 + 4 + 4) <= 16384
    assert 0 <= sizes[1] - sizes[0] - (2 * n + (n // 8 if mask else 0)) <= 16384


def test_no_gradient_is_kept_between_steps_and_none_of_the_first_pass_in_the_second():
    weight = nn.Parameter(torch.randn(64, 64))
    optimizer, gradients = FSAM([weight]), []
    for _ in range(2):
        for finish in (optimizer.perturb, optimizer.step):
            weight.sin().sum().backward()
            gradients.append(weakref.ref(weight.grad))
            finish()
            optimizer.zero_grad()
            assert gradients[-1]() is None
