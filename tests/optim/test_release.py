"""Gradient release: updates in the backward pass equal those of step, and no gradient is left."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fsam_triton import FSAM, AdamWL2SP, FishMask, MomentumSAM
from fsam_triton.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {
    "adamw": (AdamWL2SP, {"l2_sp": 0.1, "amsgrad": True, "ema_decay": 0.9}, torch.float32),
    "adamw, small": (AdamWL2SP, {"state_format": "8bit", "master_weights": "24bit"}, torch.bfloat16),
    "momentum-sam": (MomentumSAM, {"rho": 0.3}, torch.float32),
    "momentum-sam, bf16": (MomentumSAM, {"rho": 0.3}, torch.bfloat16),
    "momentum-sam, small": (
        MomentumSAM,
        {"rho": 0.3, "state_format": "8bit", "master_weights": "24bit", "backup_format": "8bit"},
        torch.bfloat16,
    ),
}


class Model(nn.Module):
    """With a weight that is used twice, one that is used sometimes, and one that is never."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.sometimes = nn.Embedding(20, 32), nn.Linear(32, 64), nn.Linear(64, 64)
        self.second, self.never = nn.Linear(64, 32), nn.Linear(2, 2)

    def forward(self, tokens: Tensor, step: int) -> Tensor:
        hidden = self.first(self.embed(tokens)).tanh()
        if step % 2:
            hidden = self.sometimes(hidden)
        return self.second(hidden) @ self.embed.weight.T


def train(name: str, releases: bool, steps: int = 5) -> tuple[nn.Module, torch.optim.Optimizer]:
    kind, arguments, dtype = KINDS[name]
    torch.manual_seed(0)
    model = Model().to(dtype)
    optimizer = kind(model.named_parameters(), lr=1e-2, **arguments)
    if releases:
        optimizer.release_gradients()
    for step in range(steps):
        tokens = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(tokens, step).float().flatten(0, 1), tokens.roll(1).flatten()).backward()
        if releases:
            assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("name", KINDS)
def test_training_equals_that_with_steps_to_the_bit(name):
    (model, optimizer), (other, stepped) = train(name, True), train(name, False)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == stepped.state[q].keys()
        assert all(torch.equal(value, stepped.state[q][key]) for key, value in optimizer.state[p].items())
    if isinstance(optimizer, MomentumSAM):
        assert not optimizer.perturbed


def test_gradients_are_freed_one_after_the_other():
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(8)])
    seen: list[weakref.ref] = []
    most = 0

    def count(p: Tensor) -> None:
        nonlocal most
        seen.append(weakref.ref(p.grad))
        most = max(most, sum(grad() is not None for grad in seen))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count)
    optimizer = AdamWL2SP(model.parameters(), lr=1e-3)
    optimizer.release_gradients()
    gc.collect()
    model(torch.ones(1, 64)).sum().backward()
    assert len(seen) == 8
    assert most == 1


def test_recomputed_activations():
    runs = []
    for releases in (True, False):
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))
        optimizer = AdamWL2SP(layers.parameters(), lr=1e-2)
        if releases:
            optimizer.release_gradients()
        for _ in range(3):
            x = torch.ones(2, 16)
            for layer in layers:
                x = checkpoint(layer, x, use_reentrant=False)
            x.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append([p.detach().clone() for p in layers.parameters()])
    assert all(map(torch.equal, *runs))


def test_removed_hooks_leave_gradients_to_step():
    model = nn.Linear(4, 4)
    optimizer = AdamWL2SP(model.parameters())
    handle = optimizer.release_gradients()
    handle.remove()
    model(torch.ones(1, 4)).sum().backward()
    assert model.weight.grad is not None
    assert not optimizer.state
    optimizer.step()
    assert optimizer.state


def test_schedulers_and_edited_state_are_followed():
    model = nn.Linear(4, 4)
    optimizer = AdamWL2SP(model.parameters(), lr=1.0, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    optimizer.release_gradients()
    for _ in range(2):
        before = model.weight.detach().clone()
        model(torch.ones(1, 4)).sum().backward()
        moved = not torch.equal(before, model.weight)
        optimizer.step()
        scheduler.step()
    assert not moved
    del optimizer.state[model.weight]
    model(torch.ones(1, 4)).sum().backward()
    assert int(optimizer.state[model.weight]["step"]) == 1


def test_accumulation_is_refused():
    model = nn.Linear(4, 4)
    optimizer = AdamWL2SP(model.parameters())
    optimizer.release_gradients()
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="accumulated"):
        model(torch.ones(1, 4)).sum().backward()


def test_what_needs_all_gradients_is_refused():
    model = nn.Linear(4, 4)
    with pytest.raises(ArgumentError, match="max_grad_norm"):
        AdamWL2SP(model.parameters(), max_grad_norm=1.0).release_gradients()
    with pytest.raises(RuntimeError, match="two passes"):
        FSAM(model.parameters()).release_gradients()
    mask = FishMask.random(model, 0.5)
    with pytest.raises(ArgumentError, match="trainable"):
        AdamWL2SP(model.named_parameters(), trainable=mask).release_gradients()
    # None of them has left a hook.
    model(torch.ones(1, 4)).sum().backward()
    assert model.weight.grad is not None


def test_an_optimizer_that_is_dropped_updates_no_more():
    model = nn.Linear(4, 4)
    optimizer = AdamWL2SP(model.parameters())
    optimizer.release_gradients()
    del optimizer
    gc.collect()
    before = model.weight.detach().clone()
    model(torch.ones(1, 4)).sum().backward()
    assert torch.equal(model.weight, before)
