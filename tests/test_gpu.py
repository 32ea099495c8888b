"""The same numbers on a GPU as on the CPU: `pytest -m gpu`, skipped where there is none."""

import copy

import pytest
import torch

from fsam_triton import FSAM, FisherMask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]
VARIANTS = {
    "sam": {},
    "asam": {"adaptive": True},
    "fisher-sam": {"mask": FisherMask(0.3, interval=2)},
    "anchored and clipped": {"l2_sp": 0.1, "max_grad_norm": 0.5},
    "master weights": {"master_weights": True},
}


def make(device, dtype, **arguments):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 100), torch.nn.Tanh(), torch.nn.Linear(100, 8))
    model = copy.deepcopy(model).to(device, dtype)
    return model, FSAM(model.named_parameters(), lr=1e-2, **arguments)


def train(model, optimizer, gradients):
    """Steps with given gradients, so that only the optimizer differs between devices."""
    for ascent, descent in gradients:
        for grads, act in ((ascent, optimizer.perturb), (descent, optimizer.step)):
            for p, grad in zip(model.parameters(), grads, strict=True):
                p.grad = grad.to(p.device, p.dtype)
            act()


def make_gradients(steps):
    generator = torch.Generator().manual_seed(1)
    shapes = [(100, 32), (100,), (8, 100), (8,)]
    return [[[torch.randn(s, generator=generator) for s in shapes] for _ in range(2)] for _ in range(steps)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", VARIANTS)
def test_ten_steps_on_the_gpu_equal_ten_on_the_cpu(name, dtype):
    gradients = make_gradients(10)
    weights = []
    for device in ("cpu", "cuda"):
        model, optimizer = make(device, dtype, **VARIANTS[name])
        train(model, optimizer, gradients)
        weights.append(torch.cat([p.detach().double().cpu().flatten() for p in model.parameters()]))
    # A step moves a weight by about lr; its square root and division differ by a few ulp. A 16-bit weight may land on
    # the neighbouring value where that tips the rounding.
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(weights[1], weights[0], rtol=2 * ulp, atol=10 * 1e-2 * max(4 * ulp, 1e-12))


def test_step_on_the_gpu_does_not_wait_for_the_device():
    model, optimizer = make("cuda", torch.bfloat16, mask=FisherMask(0.3), max_grad_norm=1.0)
    gradients = [[[g.cuda().bfloat16() for g in grads] for grads in pair] for pair in make_gradients(3)]
    train(model, optimizer, gradients)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(model, optimizer, gradients)
    finally:
        torch.cuda.set_sync_debug_mode("default")
