"""A step calls each pass as often for few tensors as for many, whatever the groups, in place or flat."""

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, AdamWL2SP, FisherMask, FishMask, MomentumSAM, Schedule, ops
from fsam_triton.optim.optimizer import FusedOptimizer

pytestmark = pytest.mark.usefixtures("one_thread")

PASSES = ("norm_sq", "gap", "perturb_", "descend_", "gather_", "scatter_")


class Model(nn.Module):
    """Parameters of several shapes, with a loss of all of them."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        shapes = [(5, 7), (3,), (2, 3, 4), (130,), ()]
        self.params = nn.ParameterList([nn.Parameter(torch.ones(shapes[i % 5])) for i in range(tensors)])

    def forward(self) -> Tensor:
        return sum(p.square().sum() for p in self.params)


def groups_of(model: nn.Module, groups: int) -> list[dict]:
    """Groups that differ in numbers."""
    named = list(model.named_parameters())
    numbers = [{"lr": 0.01 / (1 + i), "weight_decay": 0.1 * i} for i in range(groups)]
    return [{"params": named[i::groups], **numbers[i]} for i in range(groups)]


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How often each pass was called."""
    counts = dict.fromkeys(PASSES, 0)

    def counting(name: str):
        run = getattr(ops, name)

        def call(*args):
            counts[name] += 1
            return run(*args)

        return call

    for name in PASSES:
        monkeypatch.setattr(ops, name, counting(name))
    return counts


def calls_of_a_step(optimizer, model: nn.Module, calls: dict[str, int], skip: bool = False) -> dict[str, int]:
    """Those of a step after two others, in which a parameter may have no gradient."""
    for step in range(3):
        if step == 2:
            calls.update(dict.fromkeys(calls, 0))

        def closure(step=step):
            optimizer.zero_grad()
            loss = model()
            loss.backward()
            if skip and step > 0:
                # So that counts of updates differ.
                next(model.parameters()).grad = None
            return loss

        optimizer.step(closure)
    return {name: count for name, count in calls.items() if count}


VARIANTS = {
    "adamw": (AdamWL2SP, {}, {"descend_": 1}),
    "adamw_clipped": (AdamWL2SP, {"max_grad_norm": 1.0}, {"norm_sq": 1, "descend_": 1}),
    "amsgrad_l2_sp": (AdamWL2SP, {"amsgrad": True, "l2_sp": 0.1}, {"descend_": 1}),
    "sgd": (lambda groups, **options: FusedOptimizer(groups, "sgd", 0.1, **options), {}, {"descend_": 1}),
    "lion": (lambda groups, **options: FusedOptimizer(groups, "lion", 0.1, **options), {}, {"descend_": 1}),
    "sam": (FSAM, {}, {"norm_sq": 1, "perturb_": 1, "descend_": 1}),
    "asam": (FSAM, {"adaptive": True}, {"norm_sq": 1, "perturb_": 1, "descend_": 1}),
    "sam_clipped": (FSAM, {"max_grad_norm": 1.0}, {"norm_sq": 2, "perturb_": 1, "descend_": 1}),
    "esam": (FSAM, {"beta": 0.5}, {"norm_sq": 1, "perturb_": 1, "descend_": 1}),
    "gsam": (FSAM, {"alpha": 0.3}, {"norm_sq": 1, "perturb_": 1, "gap": 1, "descend_": 1}),
    "looksam": (FSAM, {"schedule": Schedule(every=3, reuse=0.5)}, {"gap": 1, "descend_": 1}),
    "fisher_sam": (FSAM, {"mask": FisherMask(0.5, interval=5)}, {"norm_sq": 1, "perturb_": 1, "descend_": 1}),
    "momentum_sam": (MomentumSAM, {}, {"norm_sq": 1, "perturb_": 1, "descend_": 1}),
}
# Tensors, groups, flat, and whether one of the tensors has no gradient.
SIZES = [(2, 1, False, False), (200, 1, False, False), (200, 6, False, True), (200, 6, True, False)]


@pytest.mark.parametrize(("tensors", "groups", "flatten", "skip"), SIZES, ids=str)
@pytest.mark.parametrize(("kind", "options", "expected"), VARIANTS.values(), ids=VARIANTS.keys())
def test_passes_of_a_step_do_not_depend_on_tensors_groups_and_places(
    kind, options, expected, tensors, groups, flatten, skip, calls
):
    model = Model(tensors)
    optimizer = kind(groups_of(model, groups), flatten=flatten, **options)
    assert calls_of_a_step(optimizer, model, calls, skip) == expected


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM])
@pytest.mark.parametrize("types", [(torch.float32,), (torch.float32, torch.bfloat16), (torch.float64, torch.float16)])
def test_each_type_has_a_call_of_its_own(kind, types, calls):
    model = Model(20)
    for i, p in enumerate(model.parameters()):
        p.data = p.data.to(types[i % len(types)])
    assert calls_of_a_step(kind(groups_of(model, 2)), model, calls)["descend_"] == len(types)


@pytest.mark.parametrize("tensors", [6, 200])
@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM])
def test_a_part_of_the_weights_is_gathered_and_scattered_at_once(kind, tensors, calls):
    model = Model(tensors)
    optimizer = kind(groups_of(model, 2), trainable=FishMask.random(model, 0.5, 0))
    counts = calls_of_a_step(optimizer, model, calls)
    # Gradients and weights, in each half of a step.
    halves = 1 if kind is AdamWL2SP else 2
    assert counts["descend_"] == 1
    assert (counts["gather_"], counts["scatter_"]) == (2 * halves, halves)
