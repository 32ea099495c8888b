"""The same numbers on a GPU as on the CPU: `pytest -m gpu`, skipped where there is none."""

import copy

import pytest
import torch

from fsam_triton import FSAM, FisherMask, FishMask, MomentumSAM, Schedule

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
    "esam": {"beta": 0.5},
    "fisher-esam": {"beta": 0.5, "mask": FisherMask(0.3, interval=2)},
    "gsam": {"alpha": 0.3, "max_grad_norm": 0.5},
    "gsam, master weights": {"alpha": 0.3, "master_weights": True},
    "looksam": {"schedule": Schedule(every=3, reuse=0.5)},
}
MOMENTUM = {
    "plain": {},
    "anchored and clipped": {"l2_sp": 0.1, "max_grad_norm": 0.5},
    "master weights": {"master_weights": True},
}


def make(device, dtype, optimizer=FSAM, **arguments):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 100), torch.nn.Tanh(), torch.nn.Linear(100, 8))
    model = copy.deepcopy(model).to(device, dtype)
    return model, optimizer(model.named_parameters(), lr=1e-2, **arguments)


def train(model, optimizer, gradients):
    """Steps with given gradients, so that only the optimizer differs between devices."""
    for ascent, descent in gradients:
        halves = [(descent, optimizer.step)]
        if isinstance(optimizer, FSAM) and optimizer.is_sharp:
            halves.insert(0, (ascent, optimizer.perturb))
        for grads, act in halves:
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
        weights.append(weights_of(model))
    assert_close_after_ten_steps(*weights, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ten_steps_on_a_fish_mask_on_the_gpu_equal_ten_on_the_cpu(dtype):
    gradients, weights = make_gradients(10), []
    for device in ("cpu", "cuda"):
        model, _ = make(device, dtype)
        optimizer = FSAM(model.named_parameters(), lr=1e-2, trainable=FishMask.random(model, 0.1))
        train(model, optimizer, gradients)
        weights.append(weights_of(model))
    assert_close_after_ten_steps(*weights, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("optimizer", [FSAM, MomentumSAM])
@pytest.mark.parametrize("arguments", [{}, {"master_weights": True}], ids=["plain", "master weights"])
def test_average_of_the_weights_on_the_gpu_equals_that_on_the_cpu(optimizer, dtype, arguments):
    gradients, averages = make_gradients(10), []
    for device in ("cpu", "cuda"):
        model, averaging = make(device, dtype, optimizer, ema_decay=0.9, **arguments)
        train(model, averaging, gradients)
        averages.append(torch.cat([averaging.state[p]["ema"].double().cpu().flatten() for p in model.parameters()]))
    assert_close_after_ten_steps(*averages, dtype)


def weights_of(model):
    return torch.cat([p.detach().double().cpu().flatten() for p in model.parameters()])


def assert_close_after_ten_steps(of_cpu, of_gpu, dtype):
    """A step moves a weight by about lr; its square root and division differ by a few ulp. A 16-bit weight may land on
    the neighbouring value where that tips the rounding."""
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(of_gpu, of_cpu, rtol=2 * ulp, atol=10 * 1e-2 * max(4 * ulp, 1e-12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", MOMENTUM)
def test_ten_steps_of_momentum_sam_on_the_gpu_equal_ten_on_the_cpu(name, dtype):
    """The perturbed weights that a step leaves, and the clean ones."""
    gradients, perturbed, clean = make_gradients(10), [], []
    for device in ("cpu", "cuda"):
        model, optimizer = make(device, dtype, MomentumSAM, **MOMENTUM[name])
        train(model, optimizer, gradients)
        perturbed.append(weights_of(model))
        optimizer.eval()
        clean.append(weights_of(model))
    assert_close_after_ten_steps(*clean, dtype)
    assert_close_after_ten_steps(*perturbed, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eval_and_train_on_the_gpu_bring_the_perturbed_weights_back_to_the_bit(dtype):
    model, optimizer = make("cuda", dtype, MomentumSAM)
    train(model, optimizer, make_gradients(3))
    before = weights_of(model)
    optimizer.eval()
    assert not torch.equal(weights_of(model), before)
    optimizer.train()
    assert torch.equal(weights_of(model), before)


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        (FSAM, {"mask": FisherMask(0.3)}),
        (FSAM, {"mask": FisherMask(0.3), "alpha": 0.3, "beta": 0.5}),
        (FSAM, {"schedule": Schedule(every=3, reuse=0.5)}),
        (MomentumSAM, {}),
    ],
    ids=["fisher-sam", "fisher-gsam and -esam", "looksam", "momentum-sam"],
)
def test_step_on_the_gpu_does_not_wait_for_the_device(optimizer, arguments):
    model, optimizer = make("cuda", torch.bfloat16, optimizer, **arguments, max_grad_norm=1.0)
    gradients = [[[g.cuda().bfloat16() for g in grads] for grads in pair] for pair in make_gradients(3)]
    train(model, optimizer, gradients)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(model, optimizer, gradients)
    finally:
        torch.cuda.set_sync_debug_mode("default")
