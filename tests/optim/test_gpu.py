"""The same numbers on a GPU as on the CPU, no waiting, CUDA graphs: `pytest -m gpu`, skipped where there is none."""

import copy

import pytest
import torch

from fsam_triton import FSAM, SAM, FisherMask, FishMask, MomentumSAM, Schedule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]
VARIANTS = {
    "sam": {},
    "flat": {"flatten": True},
    "asam": {"adaptive": True},
    "fisher-sam": {"mask": FisherMask(0.3, interval=2)},
    "anchored and clipped": {"l2_sp": 0.1, "max_grad_norm": 0.5},
    "master weights": {"master_weights": True},
    "esam": {"beta": 0.5},
    "fisher-esam": {"beta": 0.5, "mask": FisherMask(0.3, interval=2)},
    "gsam": {"alpha": 0.3, "max_grad_norm": 0.5},
    "gsam, master weights": {"alpha": 0.3, "master_weights": True},
    "looksam": {"schedule": Schedule(every=3, reuse=0.5)},
    "sgd": {"rule": "sgd", "momentum": 0.9},
}
MOMENTUM = {
    "plain": {},
    "anchored and clipped": {"l2_sp": 0.1, "max_grad_norm": 0.5},
    "master weights": {"master_weights": True},
}
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])


def make(device, dtype, optimizer=FSAM, **arguments):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 100), torch.nn.Tanh(), torch.nn.Linear(100, 8))
    model = copy.deepcopy(model).to(device, dtype)
    return model, optimizer(model.named_parameters(), lr=1e-2, **arguments)


def give(model, gradients):
    for p, grad in zip(model.parameters(), gradients, strict=True):
        p.grad = grad.to(p.device, p.dtype)


def train(model, optimizer, gradients):
    """Steps with given gradients, so that only the optimizer differs between devices."""
    for ascent, descent in gradients:
        if isinstance(optimizer, MomentumSAM):
            optimizer.perturb()
        elif optimizer.is_sharp:
            give(model, ascent)
            optimizer.perturb()
        give(model, descent)
        optimizer.step()


def make_gradients(steps):
    generator = torch.Generator().manual_seed(1)
    shapes = [(100, 32), (100,), (8, 100), (8,)]
    return [[[torch.randn(s, generator=generator) for s in shapes] for _ in range(2)] for _ in range(steps)]


def weights_of(model):
    return torch.cat([p.detach().double().cpu().flatten() for p in model.parameters()])


def assert_close_after_ten_steps(of_cpu, of_gpu, dtype):
    """A step moves a weight by about lr; its square root and division differ by a few ulp. A 16-bit weight may land on
    the neighbouring value where that tips the rounding."""
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(of_gpu, of_cpu, rtol=2 * ulp, atol=10 * 1e-2 * max(4 * ulp, 1e-12))


@every_dtype
@pytest.mark.parametrize("name", VARIANTS)
def test_ten_steps_on_the_gpu_equal_ten_on_the_cpu(name, dtype):
    gradients = make_gradients(10)
    weights = []
    for device in ("cpu", "cuda"):
        model, optimizer = make(device, dtype, **VARIANTS[name])
        train(model, optimizer, gradients)
        weights.append(weights_of(model))
    assert_close_after_ten_steps(*weights, dtype)


@every_dtype
def test_ten_steps_on_a_fish_mask_on_the_gpu_equal_ten_on_the_cpu(dtype):
    gradients, weights = make_gradients(10), []
    for device in ("cpu", "cuda"):
        model, _ = make(device, dtype)
        optimizer = FSAM(model.named_parameters(), lr=1e-2, trainable=FishMask.random(model, 0.1))
        train(model, optimizer, gradients)
        weights.append(weights_of(model))
    assert_close_after_ten_steps(*weights, dtype)


@every_dtype
def test_ten_steps_of_sam_around_torchs_adamw_on_the_gpu_equal_ten_on_the_cpu(dtype):
    gradients, weights = make_gradients(10), []
    for device in ("cpu", "cuda"):
        model, _ = make(device, dtype)
        train(model, SAM(torch.optim.AdamW(model.parameters(), lr=1e-2)), gradients)
        weights.append(weights_of(model))
    assert_close_after_ten_steps(*weights, dtype)


@every_dtype
@pytest.mark.parametrize("optimizer", [FSAM, MomentumSAM])
@pytest.mark.parametrize("arguments", [{}, {"master_weights": True}], ids=["plain", "master weights"])
def test_average_of_the_weights_on_the_gpu_equals_that_on_the_cpu(optimizer, dtype, arguments):
    gradients, averages = make_gradients(10), []
    for device in ("cpu", "cuda"):
        model, averaging = make(device, dtype, optimizer, ema_decay=0.9, **arguments)
        train(model, averaging, gradients)
        averages.append(torch.cat([averaging.state[p]["ema"].double().cpu().flatten() for p in model.parameters()]))
    assert_close_after_ten_steps(*averages, dtype)


@every_dtype
@pytest.mark.parametrize("name", MOMENTUM)
def test_ten_steps_of_momentum_sam_on_the_gpu_equal_ten_on_the_cpu(name, dtype):
    """The clean weights that a step leaves, and the perturbed ones of the next forward pass."""
    gradients, perturbed, clean = make_gradients(10), [], []
    for device in ("cpu", "cuda"):
        model, optimizer = make(device, dtype, MomentumSAM, **MOMENTUM[name])
        train(model, optimizer, gradients)
        clean.append(weights_of(model))
        optimizer.perturb()
        perturbed.append(weights_of(model))
    assert_close_after_ten_steps(*clean, dtype)
    assert_close_after_ten_steps(*perturbed, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restore_on_the_gpu_brings_the_clean_weights_back_to_the_bit(dtype):
    for kind in (FSAM, MomentumSAM):
        model, optimizer = make("cuda", dtype, kind)
        train(model, optimizer, make_gradients(3))
        before = weights_of(model)
        give(model, make_gradients(1)[0][0])
        optimizer.perturb()
        assert not torch.equal(weights_of(model), before)
        optimizer.restore()
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


# -- CUDA graphs -------------------------------------------------------------------------------------------------------


def around_adamw(named, lr, **arguments):
    return SAM(torch.optim.AdamW(named, lr=lr, capturable=True), **arguments)


# What an optimizer is, and how many steps its graph has.
GRAPHED = {
    "sam": (FSAM, {}, 1),
    "flat": (FSAM, {"flatten": True}, 1),
    "asam": (FSAM, {"adaptive": True}, 1),
    "fisher-sam": (FSAM, {"mask": FisherMask(0.3)}, 1),
    "fisher-sam of rows": (FSAM, {"mask": FisherMask(0.5, unit="row")}, 1),
    "anchored, clipped, average": (FSAM, {"l2_sp": 0.1, "max_grad_norm": 0.5, "ema_decay": 0.9}, 1),
    "gsam": (FSAM, {"alpha": 0.3, "max_grad_norm": 0.5}, 1),
    "looksam": (FSAM, {"schedule": Schedule(every=2, reuse=0.5)}, 2),
    "sgd": (FSAM, {"rule": "sgd", "momentum": 0.9}, 1),
    "lion": (FSAM, {"rule": "lion"}, 1),
    "momentum-sam": (MomentumSAM, {}, 1),
    "around adamw": (around_adamw, {}, 1),
}
# The draws of an ascent depend on how many ascents the host has counted, too: those of a graph are others.
DRAWN = {"esam": (FSAM, {"beta": 0.5}, 1), "esam, gsam": (FSAM, {"beta": 0.5, "alpha": 0.3}, 1)}
WARM_UP = 4


class Loop:
    """A training loop on one batch, of whole steps that can be captured."""

    def __init__(self, kind, dtype, **arguments):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(32, 100), torch.nn.Tanh(), torch.nn.Linear(100, 8))
        self.model = model.to("cuda", dtype)
        self.lr = torch.tensor(1e-2, device="cuda")
        self.optimizer = kind(self.model.named_parameters(), lr=self.lr, **arguments)
        self.inputs, self.targets = torch.randn(16, 32).to("cuda", dtype), torch.randn(16, 8).cuda()

    def backward(self):
        self.optimizer.zero_grad()
        loss = (self.model(self.inputs).float() - self.targets).square().mean()
        loss.backward()
        return loss

    def step(self):
        loss = self.backward()
        if not isinstance(self.optimizer, MomentumSAM) and self.optimizer.is_sharp:
            self.optimizer.perturb()
            self.backward()
        self.optimizer.step()
        return loss.detach()

    def warm_up(self):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self, steps):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(steps):
                self.loss = self.step()
        return graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GRAPHED)
def test_steps_of_a_captured_graph_equal_those_without_one(name, dtype):
    kind, arguments, steps = GRAPHED[name]
    captured, eager = Loop(kind, dtype, **arguments), Loop(kind, dtype, **arguments)
    captured.warm_up()
    graph = captured.capture(steps)
    for _ in range(6 // steps):
        graph.replay()
    eager.warm_up()
    for _ in range(6):
        eager.step()
    assert_close_after_ten_steps(weights_of(eager.model), weights_of(captured.model), dtype)


# Torch's own AdamW has no master weights, and squares of gradients that fp16 cannot hold.
REPLAYED = [
    pytest.param(name, dtype, {"master_weights": True} if masters else {}, id=f"{name}-{dtype}-{masters}")
    for name in (*GRAPHED, *DRAWN)
    for dtype, masters in (
        *((torch.float32, False), (torch.bfloat16, False)),
        *([] if name == "around adamw" else [(torch.float16, False), (torch.bfloat16, True), (torch.float16, True)]),
    )
]


@pytest.mark.parametrize(("name", "dtype", "arguments"), REPLAYED)
def test_replays_train_and_leave_clean_weights(name, dtype, arguments):
    kind, own, steps = {**GRAPHED, **DRAWN}[name]
    loop = Loop(kind, dtype, **own, **arguments)
    loop.warm_up()
    first = float(loop.backward())
    graph = loop.capture(steps)
    for _ in range(30):
        graph.replay()
    assert not loop.optimizer.perturbed
    assert all(p.isfinite().all() for p in loop.model.parameters())
    assert float(loop.loss) < 0.7 * first
    # Nothing is left of the graph: the loop goes on without it.
    before = weights_of(loop.model)
    loop.step()
    assert not torch.equal(weights_of(loop.model), before)


@pytest.mark.parametrize("name", ["sam", "gsam", "momentum-sam", "around adamw"])
def test_learning_rate_that_is_a_tensor_steers_the_replays(name):
    kind, arguments, steps = GRAPHED[name]
    loop = Loop(kind, torch.float32, **arguments)
    loop.warm_up()
    graph = loop.capture(steps)
    graph.replay()
    loop.lr.fill_(0.0)
    before = weights_of(loop.model)
    graph.replay()
    assert torch.equal(weights_of(loop.model), before)
    loop.lr.fill_(1e-2)
    graph.replay()
    assert not torch.equal(weights_of(loop.model), before)


@pytest.mark.parametrize(
    ("kind", "dtype", "arguments"),
    [(FSAM, torch.float32, {"beta": 0.5}), (FSAM, torch.bfloat16, {}), (around_adamw, torch.bfloat16, {})],
    ids=["draws", "roundings", "roundings around adamw"],
)
def test_random_numbers_of_replays_differ(kind, dtype, arguments):
    """At weights that stay where they are, the perturbed ones of two replays are not the same."""
    loop = Loop(kind, dtype, weight_decay=0.0, **arguments) if kind is FSAM else Loop(kind, dtype, **arguments)
    loop.warm_up()
    loop.lr.fill_(0.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop.backward()
        loop.optimizer.perturb()
        perturbed = torch.cat([p.detach().flatten() for p in loop.model.parameters()])
        loop.backward()
        loop.optimizer.step()
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(perturbed.clone())
    assert not torch.equal(*seen)


def test_optimizers_own_a_graph_each():
    """Their tables and numbers are their own, and stay as long as they are replayed."""
    loops = [Loop(FSAM, torch.float32) for _ in range(2)]
    for loop in loops:
        loop.warm_up()
    graphs = [loop.capture(1) for loop in loops]
    junk = [torch.randn(1 << 16, device="cuda") for _ in range(100)]
    del junk
    for _ in range(3):
        for graph in graphs:
            graph.replay()
    assert torch.equal(weights_of(loops[0].model), weights_of(loops[1].model))
