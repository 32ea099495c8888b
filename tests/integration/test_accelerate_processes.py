"""accelerate in two processes: the examples of docs/accelerate.md, and parameters that FSDP2's `prepare` replaces."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fsam_triton import FSAM, SAM, AdamWL2SP, FisherMask, MomentumSAM
from tests.processes import DOCS, eager_passes, spawn

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = dict(
    re.findall(r"^```py\n# (\S+)\n(.*?)^```$", (DOCS / "accelerate.md").read_text(encoding="utf-8"), re.M | re.S)
)
STEPS = 4
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw": lambda model: AdamWL2SP(model.named_parameters(), lr=0.01, max_grad_norm=0.5, l2_sp=0.1),
    "sam": lambda model: FSAM(model.named_parameters(), lr=0.01, rho=0.5),
    "gsam": lambda model: FSAM(model.named_parameters(), lr=0.01, rho=0.5, alpha=0.3, mask=FisherMask(0.3)),
    "sam-flat": lambda model: FSAM(model.parameters(), lr=0.01, rho=0.5, flatten=True),
    "momentum-sam": lambda model: MomentumSAM(model.parameters(), lr=0.01, rho=0.5),
    "around-adamw": lambda model: SAM(torch.optim.AdamW(model.parameters(), lr=0.01), rho=0.5),
}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)]
    return nn.Sequential(*layers).double()


def train(model: nn.Module, optimizer: Optimizer, backward: Callable, rank: int = 0, n: int = 1, steps=range(STEPS)):
    """Written out; `optimizer` may be in accelerate's wrapper."""
    own = getattr(optimizer, "optimizer", optimizer)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs, targets = (torch.randn(12, k, generator=generator).double().chunk(n)[rank] for k in (6, 2))
        for is_first in (True, False) if hasattr(own, "is_sharp") else (False,):
            backward((model(inputs) - targets).square().mean())
            if is_first:
                own.perturb()
        optimizer.step()
        optimizer.zero_grad()
    if hasattr(own, "restore"):
        own.restore()


def weights_of(optimizer: Optimizer) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in params]


# -- the processes -----------------------------------------------------------------------------------------------------


def forget_accelerator() -> None:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def run_page(source: str) -> list[Tensor]:
    names: dict = {"__name__": "__main__"}
    exec(compile(source, "example", "exec"), names)
    assert type(names["model"]).__name__ == "DistributedDataParallel"
    forget_accelerator()
    return [p.detach().clone() for p in names["model"].parameters()]


def sharded_accelerator():
    """accelerate takes FSDP for something of GPUs; its `prepare` knows no difference."""
    accelerator = accelerate.Accelerator(cpu=True)
    accelerate.PartialState._shared_state["distributed_type"] = accelerate.DistributedType.FSDP
    accelerator.state.distributed_type = accelerate.DistributedType.FSDP
    accelerator.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=20
    )
    return accelerator


def train_sharded(make: Callable[[nn.Module], Optimizer], rank: int, n: int) -> dict:
    accelerator, model = sharded_accelerator(), make_model()
    own = make(model)
    model, optimizer = accelerator.prepare(model, own)
    train(model, optimizer, accelerator.backward, rank, n)
    are_shards = [hasattr(p, "device_mesh") for group in own.param_groups for p in group["params"]]
    forget_accelerator()
    return {"weights": weights_of(own), "are shards": all(are_shards)}


def resumed(rank: int, n: int, folder: Path) -> list[Tensor]:
    """Saved after half of the steps, and loaded into another model."""
    for steps in (range(STEPS // 2), range(STEPS // 2, STEPS)):
        accelerator, model = sharded_accelerator(), make_model()
        own = OPTIMIZERS["sam"](model)
        model, optimizer = accelerator.prepare(model, own)
        if steps.start:
            accelerator.load_state(folder / "saved")
        train(model, optimizer, accelerator.backward, rank, n, steps)
        if not steps.start:
            accelerator.save_state(folder / "saved")
        forget_accelerator()
    return weights_of(own)


def run_all(rank: int, n: int, folder: Path) -> dict:
    # What torchrun sets, and accelerate goes by.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    os.environ |= {"OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        # It would take away the process group that the next one needs.
        patch.setattr(accelerate.Accelerator, "end_training", accelerate.Accelerator.wait_for_everyone)
        out: dict = {name: run_page(source) for name, source in EXAMPLES.items()}
    out |= {name: train_sharded(make, rank, n) for name, make in OPTIMIZERS.items()}
    return {**out, "resumed": resumed(rank, n, folder)}


# -- and what comes of it ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    return spawn(run_all, 2, tmp_path_factory.mktemp("accelerate") / "processes")


def assert_close(weights: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for weight, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=tolerance)


@eager_passes()
def page_in_one_process(name: str) -> list[Tensor]:
    """The page's steps without accelerate: of each batch, or accumulated one, of both processes at once."""
    accelerate.utils.set_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    sam = FSAM(model.parameters(), lr=1e-3, rho=0.05, max_grad_norm=1.0)
    data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(2, (64,)))
    for inputs, labels in torch.utils.data.DataLoader(data, batch_size={"closure.py": 16, "accumulation.py": 32}[name]):

        def closure(inputs=inputs, labels=labels) -> Tensor:
            sam.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            return loss

        sam.step(closure)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", ["closure.py", "accumulation.py"])
def test_examples_of_the_page_take_the_steps_of_one_process(results, name):
    """Gradients are summed in another order: an entry near Adam's eps of 1e-8 moves by a part of lr."""
    assert all(map(torch.equal, results[0][name], results[1][name]))
    assert_close(results[0][name], page_in_one_process(name), 1e-5)


@eager_passes()
def alone(name: str) -> list[Tensor]:
    model = make_model()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, Tensor.backward)
    return weights_of(optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_that_fsdp2s_prepare_replaces_are_trained_as_in_one_process(results, name):
    for result in results:
        assert result[name]["are shards"]
        assert_close(result[name]["weights"], alone(name), 1e-12)


def test_state_saved_under_fsdp2_resumes_to_the_same_weights(results):
    for result in results:
        assert_close(result["resumed"], result["sam"]["weights"], 1e-15)
