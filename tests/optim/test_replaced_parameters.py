"""Wrappers that put other tensors into the groups: a perturbation that the model does not see is refused."""

import pytest
import torch
from torch import nn

from fsam_triton import FSAM, SAM, AdamWL2SP, MomentumSAM
from fsam_triton.optim.optimizer import FusedOptimizer
from tests.problem import Problem

SHARP = {
    "fsam": lambda params: FSAM(params, lr=0.01),
    "sam": lambda params: SAM(torch.optim.AdamW(params, lr=0.01)),
    "momentum": lambda params: MomentumSAM(params, lr=0.01),
}
every_sharp = pytest.mark.parametrize("make", SHARP.values(), ids=SHARP.keys())
REFUSAL = r"no module has .*DeepSpeed.*DistributedDataParallel or FSDP2"


def square() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def replaced(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """One flat copy of the parameters, as ZeRO's optimizers make it, with a gradient, in their place."""
    (group,) = optimizer.param_groups
    flat = torch.cat([p.detach().flatten() for p in group["params"]]).requires_grad_()
    flat.grad = torch.ones_like(flat)
    group["params"] = [flat]
    return flat


@every_sharp
def test_step_on_tensors_that_no_module_has_is_refused_and_changes_nothing(make):
    model = square()
    optimizer = make(model.parameters())
    flat = replaced(optimizer)
    before = flat.detach().clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=REFUSAL):
            optimizer.step()
    assert torch.equal(flat, before)


@pytest.mark.parametrize("make", [SHARP["fsam"], SHARP["sam"]], ids=["fsam", "sam"])
@pytest.mark.parametrize("has_gradients", [False, True])
def test_perturbation_of_tensors_that_no_module_has_is_refused(make, has_gradients):
    model = square()
    optimizer = make(model.parameters())
    flat = replaced(optimizer)
    if not has_gradients:
        flat.grad = None
    with pytest.raises(RuntimeError, match=REFUSAL):
        optimizer.perturb()


@pytest.mark.parametrize("make", [SHARP["fsam"], SHARP["sam"]], ids=["fsam", "sam"])
def test_perturbation_without_parameters_is_refused(make):
    """ZeRO 3 takes all out of the groups until its step."""
    model = square()
    optimizer = make(model.parameters())
    optimizer.param_groups[0]["params"] = []
    with pytest.raises(RuntimeError, match=REFUSAL):
        optimizer.perturb()


@every_sharp
def test_refusal_comes_in_the_middle_of_training_too(make):
    model = square()
    optimizer = make(model.parameters())
    Problem().loss(model.parameters(), 0).backward()
    optimizer.step()
    replaced(optimizer)
    with pytest.raises(RuntimeError, match=REFUSAL):
        optimizer.step()


@every_sharp
def test_other_modules_parameters_are_followed(make):
    optimizer, model = make(square().parameters()), square()
    optimizer.param_groups[0]["params"] = list(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(1, 4)).square().sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, model.parameters(), before))


@every_sharp
def test_tensors_that_never_were_a_modules_are_trained(make):
    first, second = (torch.ones(3, requires_grad=True) for _ in range(2))
    optimizer = make([first])
    optimizer.param_groups[0]["params"] = [second]
    second.square().sum().backward()
    optimizer.step()
    assert (second < 1).all()


@pytest.mark.parametrize("make", [SHARP["fsam"], SHARP["momentum"]], ids=["fsam", "momentum"])
def test_without_a_radius_the_update_of_replaced_parameters_is_adamws(make):
    ours, theirs = square(), square()
    optimizer, adamw = make(ours.parameters()), AdamWL2SP(theirs.parameters(), lr=0.01)
    optimizer.param_groups[0]["rho"] = 0.0
    flat, expected = replaced(optimizer), replaced(adamw)
    optimizer.step()
    adamw.step()
    assert torch.equal(flat, expected)


@pytest.mark.parametrize("kind", [FSAM, AdamWL2SP])
def test_clipping_of_replaced_parameters_which_may_be_a_part_of_them_is_refused(kind):
    model = square()
    optimizer = kind(model.parameters(), max_grad_norm=1.0, **({"rho": 0.0} if kind is FSAM else {}))
    flat = replaced(optimizer)
    before = flat.detach().clone()
    with pytest.raises(RuntimeError, match=r"max_grad_norm: .*gradient_clipping"):
        optimizer.step()
    assert torch.equal(flat, before)


def test_tensors_that_never_were_parameters_are_clipped():
    p = torch.ones(3, requires_grad=True)
    optimizer = FusedOptimizer([p], "sgd", lr=1.0, weight_decay=0.0, max_grad_norm=1.0)
    p.grad = torch.tensor([0.0, 3.0, 4.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([1.0, 0.4, 0.2]), rtol=0, atol=1e-6)
