"""Training runs with FSDP2 that tests compare with the same runs in one process."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.optim import Optimizer

from fsam_triton import FSAM, SAM, AdamWL2SP, FisherMask, MomentumSAM, Schedule
from tests.processes import eager_passes

STEPS, HALF = 10, 5
FULL = StateDictOptions(full_state_dict=True)
NOTHING = torch.empty(0)
MASK = FisherMask(keep_ratio=0.3, interval=3, samples=2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A training run: with which optimizer, in which type, sharded how."""

    kind: type = FSAM
    arguments: dict = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    # Arguments of fully_shard, and whether a module inside is sharded by itself.
    fsdp: dict = dataclasses.field(default_factory=dict)
    nested: bool = True
    reshards_after_backward: bool = True
    # An evaluation without a backward pass after each of the optimizer's passes leaves gathered weights behind.
    evaluates: bool = False
    micro_batches: int = 1

    @property
    def tolerance(self) -> float:
        """Relative; gradients are summed in another order."""
        return 1e-12 if self.dtype == torch.float64 else 1e-6


CASES = {
    "adamw": Case(AdamWL2SP, {"l2_sp": 0.1, "max_grad_norm": 0.5, "amsgrad": True, "ema_decay": 0.9}),
    "adamw-fp32": Case(AdamWL2SP, {"l2_sp": 0.1, "max_grad_norm": 0.5}, torch.float32),
    "fisher": Case(arguments={"mask": MASK}),
    "fisher-asam-fp32": Case(arguments={"mask": MASK, "mask_norm": "masked", "adaptive": True}, dtype=torch.float32),
    "fisher-random": Case(arguments={"mask": FisherMask(keep_ratio=0.3, interval=3, scores="random")}),
    "friendly": Case(arguments={"sigma": 0.8}),
    "preconditioned": Case(arguments={"preconditioned": True, "eps": 1e-3}),
    "gsam": Case(arguments={"alpha": 0.3, "max_grad_norm": 0.5}),
    "looksam": Case(arguments={"schedule": Schedule(every=3, reuse=0.7)}),
    "esam": Case(arguments={"beta": 0.6}),
    "esam-per-tensor": Case(arguments={"beta": 0.6, "beta_per": "tensor"}),
    "momentum-sam": Case(MomentumSAM, {"rho": 0.3, "max_grad_norm": 0.5}),
    "momentum-sam-fp32": Case(MomentumSAM, {"rho": 0.3}, torch.float32),
    "around-adamw": Case(SAM, {"mask": MASK}),
    "gsam-accumulated": Case(arguments={"alpha": 0.3}, micro_batches=2),
    "gathered-sam": Case(fsdp={"reshard_after_forward": False}, evaluates=True),
    "gathered-momentum-sam": Case(MomentumSAM, {"rho": 0.3}, fsdp={"reshard_after_forward": False}, evaluates=True),
    "one-module-momentum-sam": Case(MomentumSAM, {"rho": 0.3}, nested=False, evaluates=True),
    "not-resharded-sam": Case(reshards_after_backward=False),
}


def make_model(case: Case, seed: int = 0) -> nn.Module:
    """Two processes get shards of 4 and 3 rows, three also empty ones."""
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 2)]
    return nn.Sequential(*layers).to(case.dtype)


def shard(case: Case, model: nn.Module, mesh: DeviceMesh, **arguments) -> nn.Module:
    arguments = {**case.fsdp, **arguments}
    if case.nested:
        fully_shard(model[2], mesh=mesh, **arguments)
    fully_shard(model, mesh=mesh, **arguments)
    model.set_reshard_after_backward(case.reshards_after_backward)
    return model


def make_optimizer(case: Case, model: nn.Module) -> Optimizer:
    rho = {} if case.kind is AdamWL2SP else {"rho": 0.5}
    if case.kind is SAM:
        return SAM(torch.optim.AdamW(model.named_parameters(), lr=0.01), **rho, **case.arguments)
    return case.kind(model.named_parameters(), **{"lr": 0.01, **rho, **case.arguments})


def batch_of(case: Case, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs, labels = (torch.randn(12, n, generator=generator).to(case.dtype) for n in (6, 2))
    return inputs, labels > 0


def loss_between(outputs: Tensor, labels: Tensor) -> Tensor:
    # Not cross entropy: gradients of two classes have equal magnitudes, between which a mask would choose at random.
    return nn.functional.binary_cross_entropy_with_logits(outputs, labels.to(outputs.dtype))


def loss_of(case: Case, model: nn.Module, step: int, rank: int, n: int) -> Tensor:
    """The mean over this rank's part of the batch."""
    inputs, labels = (part.chunk(n)[rank] for part in batch_of(case, step))
    return loss_between(model(inputs), labels)


def backward(case: Case, model: nn.Module, step: int, rank: int, n: int) -> None:
    """Forward and backward passes of all micro-batches; gradients are exchanged in the last."""
    for part in range(case.micro_batches):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(part == case.micro_batches - 1)
        loss_of(case, model, step + 100 * part, rank, n).backward()


def train(
    case: Case, model: nn.Module, optimizer: Optimizer, rank: int = 0, n: int = 1, start: int = 0, stop: int = STEPS
) -> list[Tensor]:
    """The losses that evaluations have found, at perturbed and at clean weights in turn."""
    losses = []

    def evaluate() -> None:
        if case.evaluates:
            with torch.no_grad():
                loss = loss_of(case, model, 1000, 0, 1)
            losses.append(loss)

    for step in range(start, stop):
        optimizer.zero_grad()
        if isinstance(optimizer, FSAM | SAM) and optimizer.is_sharp:
            with optimizer.ascent_pass():
                backward(case, model, step, rank, n)
            evaluate()
            optimizer.perturb()
            evaluate()
        backward(case, model, step, rank, n)
        evaluate()
        optimizer.step()
        evaluate()
        if case.kind is MomentumSAM and case.evaluates:
            optimizer.eval()
            evaluate()
            optimizer.train()
    return losses


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def result_of(optimizer: Optimizer, losses: list[Tensor]) -> dict:
    if hasattr(optimizer, "restore"):
        optimizer.restore()
    # The optimizer's, because after an evaluation the model has gathered ones.
    group = optimizer.param_groups[0]
    named = dict(zip(group["param_names"], group["params"], strict=True))
    optimizer.state_dict()
    state = {
        name: {key: whole(value) for key, value in optimizer.state[p].items() if key != "mask"}
        for name, p in named.items()
    }
    for entry in state.values():
        if "remainder" in entry:
            # Bits, which shards show as a type that can be gathered; as floats NaNs would not be equal.
            entry["remainder"] = entry["remainder"].view(torch.int16)
    has_mask = isinstance(optimizer, FSAM | SAM)
    masks = {name: whole(optimizer.mask_of(p)) for name, p in named.items()} if has_mask else {}
    return {"weights": {name: whole(p) for name, p in named.items()}, "state": state, "masks": masks, "losses": losses}


def rank_and_size(mesh: DeviceMesh) -> tuple[int, int]:
    return mesh.mesh.flatten().tolist().index(dist.get_rank()), mesh.size()


def assign_gradients(model: nn.Module, step: int, values: Callable[[Tensor], Tensor] = torch.clone) -> None:
    """The same gradients, however the parameters are sharded."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        gradient = values(torch.randn(p.shape, generator=generator)).to(p.dtype)
        p.grad = gradient
        if isinstance(p, DTensor):
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None)


def load(model: nn.Module, optimizer: Optimizer, weights: dict, state: dict, options=None) -> None:
    # Not set_state_dict, which loads the optimizer first.
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(model, optimizer, state, options=options)


# -- tensor parallelism ------------------------------------------------------------------------------------------------


def make_even_model(case: Case, seed: int = 0) -> nn.Module:
    """Its layers can be cut in two."""
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)]
    return nn.Sequential(*layers).to(case.dtype)


def parallelize(model: nn.Module, mesh: DeviceMesh, *, sequence: bool = False) -> nn.Module:
    """Cut matrices by their columns and rows; with `sequence` each rank normalises a part of the batch."""
    from torch.distributed.tensor import Replicate, Shard

    plan: dict[str, Any] = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if sequence:
        plan |= {
            "2": RowwiseParallel(output_layouts=Shard(0)),
            "3": SequenceParallel(sequence_dim=0),
            "5": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
        }
    return parallelize_module(model, mesh, plan)


# -- one process -------------------------------------------------------------------------------------------------------


@functools.cache
@eager_passes()
def alone(name: str, make: Callable[[Case], nn.Module] = make_model) -> dict:
    case = CASES[name]
    model = make(case)
    optimizer = make_optimizer(case, model)
    return result_of(optimizer, train(case, model, optimizer))


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest over tensors, relative to the tensor."""
    assert actual.keys() == expected.keys()
    norm = torch.linalg.vector_norm
    return max(
        float(norm((actual[key] - e).double()) / norm(e.double()).clamp(min=1e-30)) for key, e in expected.items()
    )


def assert_same_run(actual: dict, expected: dict, case: Case) -> None:
    assert difference(actual["weights"], expected["weights"]) <= case.tolerance
    for name, state in expected["state"].items():
        # A shard shows what a mask is chosen by also when there is nothing yet.
        state = {"fisher": torch.zeros_like(state["exp_avg"]), **state} if "fisher" in actual["state"][name] else state
        # Moments are sums of gradients that cancel, in fp32 to fewer digits than weights have.
        if case.dtype == torch.float64:
            assert difference(actual["state"][name], state) <= case.tolerance, name
        assert torch.equal(actual["masks"].get(name, NOTHING), expected["masks"].get(name, NOTHING)), name


def of_members(results: list[dict], key: str) -> list:
    """Of the processes that have it: not all are in every mesh."""
    found = [result[key] for result in results if key in result]
    assert found, key
    return found
