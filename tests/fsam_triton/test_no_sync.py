"""No step waits for the device: nothing in it asks for a tensor's value."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fsam_triton import FSAM, AdamWL2SP, FisherMask, FishMask, MomentumSAM, Schedule
from tests.reference import small_model
from tests.training import assert_same_bits, closure_of, train

pytestmark = pytest.mark.usefixtures("one_thread")

# What waits on a GPU: a value comes to the host, or the shape of a result depends on values.
WAITS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
}


class NoSync(TorchDispatchMode):
    """Raises where a GPU would be waited for; our own operators are kernel launches there, and run as they are."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indexed = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
        by_bits = indexed and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        waits = func in WAITS or by_bits
        assert not waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


CASES = {
    "adamw": (AdamWL2SP, {}),
    "l2-sp, clipped, amsgrad": (AdamWL2SP, {"l2_sp": 0.1, "max_grad_norm": 1.0, "amsgrad": True}),
    "master weights": (FSAM, {"master_weights": True}),
    "static gradients": (FSAM, {"static_grads": True}),
    "sam": (FSAM, {"max_grad_norm": 1.0}),
    "asam": (FSAM, {"adaptive": True}),
    "fisher-sam": (FSAM, {"mask": FisherMask(0.3)}),
    "fisher-sam, several samples": (FSAM, {"mask": FisherMask(0.3, interval=2, samples=2)}),
    "random mask": (FSAM, {"mask": FisherMask(0.3, scores="random")}),
    "esam": (FSAM, {"beta": 0.5}),
    "gsam": (FSAM, {"alpha": 0.4, "max_grad_norm": 1.0}),
    "looksam": (FSAM, {"schedule": Schedule(every=2, reuse=0.7)}),
    "rho follows lr": (FSAM, {"schedule": Schedule(rho_follows="lr")}),
    "momentum-sam": (MomentumSAM, {"max_grad_norm": 1.0}),
    "fish mask": (FSAM, {"trainable": 0.3}),
}


def make(name: str, lr: float | Tensor, dtype: torch.dtype):
    kind, arguments = CASES[name]
    model = small_model(dtype)
    if "trainable" in arguments:
        arguments = {"trainable": FishMask.random(model, arguments["trainable"])}
    return model, kind(model.named_parameters(), lr=lr, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_no_value_comes_to_the_host_in_a_step(name, dtype):
    model, optimizer = make(name, torch.tensor(0.01), dtype)
    train(model, optimizer, 4)
    with NoSync():
        train(model, optimizer, 4, start=4)


def test_the_detector_sees_values_that_come_to_the_host():
    x = torch.ones(3)
    for wait in (x[0].item, lambda: bool(x[0]), x.nonzero, lambda: x[x > 0], lambda: torch.equal(x, x)):
        with pytest.raises(AssertionError, match="waits for the device"), NoSync():
            wait()


@pytest.mark.parametrize("name", CASES)
def test_learning_rate_may_be_a_tensor_that_changes(name):
    model, optimizer = make(name, torch.tensor(0.01), torch.float32)
    other, same = make(name, 0.01, torch.float32)
    for step, lr in enumerate((0.01, 0.02, 0.005)):
        optimizer.param_groups[0]["lr"].fill_(lr)
        same.param_groups[0]["lr"] = float(torch.tensor(lr))
        train(model, optimizer, 1, start=step)
        train(other, same, 1, start=step)
    assert_same_bits(model, other)


@pytest.mark.parametrize("name", ["adamw", "fisher-sam", "momentum-sam", "fish mask"])
def test_compiled_step_gives_the_same_bits(name):
    model, optimizer = make(name, 0.01, torch.float32)
    other, same = make(name, 0.01, torch.float32)
    compiled = torch.compile(optimizer.step)
    for step in range(3):
        compiled(closure_of(model, optimizer, step))
    train(other, same, 3)
    assert_same_bits(model, other)
