"""A learning rate that is a tensor, and a step that is called by compiled code."""

import pytest
import torch
from torch import Tensor

from fsam_triton import FSAM, SAM, AdamWL2SP, FisherMask, FishMask, MomentumSAM, Schedule
from tests.problem import small_model
from tests.training import assert_same_bits, closure_of, train

pytestmark = pytest.mark.usefixtures("one_thread")


def sparse(named, lr) -> FSAM:
    named = list(named)
    scores = {name: p.detach().abs() for name, p in named}
    return FSAM(named, lr, trainable=FishMask.from_scores(scores, keep_ratio=0.3))


CASES = {
    "adamw": AdamWL2SP,
    "l2-sp, clipped, amsgrad": lambda named, lr: AdamWL2SP(named, lr, l2_sp=0.1, max_grad_norm=1.0, amsgrad=True),
    "sam": FSAM,
    "sgd": lambda named, lr: FSAM(named, lr, rule="sgd", momentum=0.9),
    "lion": lambda named, lr: FSAM(named, lr, rule="lion"),
    "fisher-sam": lambda named, lr: FSAM(named, lr, mask=FisherMask(0.3)),
    "gsam": lambda named, lr: FSAM(named, lr, alpha=0.4, max_grad_norm=1.0),
    "looksam": lambda named, lr: FSAM(named, lr, schedule=Schedule(every=2, reuse=0.7)),
    "rho follows lr": lambda named, lr: FSAM(named, lr, schedule=Schedule(rho_follows="lr")),
    "momentum-sam": MomentumSAM,
    "fish mask": sparse,
}
AROUND = {"around torch's": lambda named, lr: SAM(torch.optim.AdamW(named, lr))}


def make(name: str, lr: float | Tensor):
    model = small_model()
    return model, (CASES | AROUND)[name](model.named_parameters(), lr=lr)


@pytest.mark.parametrize("name", CASES)
def test_learning_rate_may_be_a_tensor_that_changes(name):
    model, optimizer = make(name, torch.tensor(0.02))
    other, same = make(name, float(torch.tensor(0.02)))
    for step, lr in enumerate((0.01, 0.02, 0.005)):
        optimizer.param_groups[0]["lr"].fill_(lr)
        same.param_groups[0]["lr"] = float(torch.tensor(lr))
        train(model, optimizer, 1, start=step)
        train(other, same, 1, start=step)
    assert_same_bits(model, other)


@pytest.mark.parametrize("name", ["adamw", "fisher-sam", "momentum-sam", "fish mask", "around torch's"])
def test_compiled_step_gives_the_same_bits(name):
    model, optimizer = make(name, 0.01)
    other, same = make(name, 0.01)
    compiled = torch.compile(optimizer.step)
    for step in range(3):
        compiled(closure_of(model, optimizer, step))
    train(other, same, 3)
    assert_same_bits(model, other)
