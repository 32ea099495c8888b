"""DeepSpeed's engine, which puts flat fp32 partitions into the optimizer's groups: AdamWL2SP trains, SAM is refused.

DeepSpeed is not among the packages for tests, because it is built from source and compiles more when it starts.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fsam_triton import FSAM, SAM, AdamWL2SP, MomentumSAM
from tests.processes import eager_passes, spawn

deepspeed = pytest.importorskip("deepspeed")
pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, LR = 4, 0.01
ACCUMULATED = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
# ZeRO's stage, and what else is in the config.
CONFIGS: dict[str, tuple[int, dict]] = {
    "fp32": (0, {}),
    **{f"fp32-{stage}": (stage, {}) for stage in (1, 2, 3)},
    **{f"bf16-{stage}": (stage, {"bf16": {"enabled": True}}) for stage in (0, 1, 2, 3)},
    "bf16-1-accumulated": (1, ACCUMULATED),
}
SHARP: dict[str, Callable] = {
    "fsam": lambda params: FSAM(params, lr=LR, rho=0.5),
    "sam": lambda params: SAM(torch.optim.AdamW(params, lr=LR), rho=0.5),
    "momentum": lambda params: MomentumSAM(params, lr=LR, rho=0.5),
}
REPLACED = [name for name in CONFIGS if name != "fp32"]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 7), nn.LayerNorm(7), nn.Linear(7, 2)]
    return nn.Sequential(*layers)


def groups_of(model: nn.Module) -> list[dict]:
    named = list(model.named_parameters())
    matrices, rest = ([(name, p) for name, p in named if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    return [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def loss_of(model: nn.Module, step: int, rank: int = 0, n: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    inputs, targets = (torch.randn(12, k, generator=generator).chunk(n)[rank] for k in (6, 2))
    dtype = next(model.parameters()).dtype
    return (model(inputs.to(dtype)) - targets.to(dtype)).square().mean()


# -- the processes -----------------------------------------------------------------------------------------------------


def engine_with(make: Callable[..., Optimizer], config: str):
    stage, more = CONFIGS[config]
    model = make_model()
    own = make(groups_of(model))
    settings = {
        "train_micro_batch_size_per_gpu": 6,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.5,
        **more,
    }
    return deepspeed.initialize(model=model, optimizer=own, config=settings)[0], own


def train(engine, own: Optimizer, rank: int, steps=range(STEPS), two_passes: bool = False) -> None:
    for step in steps:
        engine.backward(loss_of(engine, step, rank, 2))
        if two_passes:
            own.perturb()
            engine.backward(loss_of(engine, step, rank, 2))
        engine.step()


def weights_of(engine) -> list[Tensor]:
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return [p.detach().float().clone() for p in engine.module.parameters()]


def trained(make: Callable[..., Optimizer], config: str, rank: int, **arguments) -> list[Tensor]:
    engine, own = engine_with(make, config)
    train(engine, own, rank, **arguments)
    return weights_of(engine)


def resumed(config: str, rank: int, folder: Path) -> list[Tensor]:
    engine, own = engine_with(lambda params: AdamWL2SP(params, lr=LR), config)
    train(engine, own, rank, range(2))
    engine.save_checkpoint(folder / config)
    engine, own = engine_with(lambda params: AdamWL2SP(params, lr=LR), config)
    engine.load_checkpoint(folder / config)
    train(engine, own, rank, range(2, STEPS))
    return weights_of(engine)


def refusal(name: str, config: str, rank: int, two_passes: bool) -> str:
    try:
        trained(SHARP[name], config, rank, two_passes=two_passes)
    except RuntimeError as error:
        return str(error)
    return ""


def run_all(rank: int, n: int, folder: Path) -> dict:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
    makers = {
        "torch": lambda params: torch.optim.AdamW(params, lr=LR),
        "ours": lambda params: AdamWL2SP(params, lr=LR),
        "anchored": lambda params: AdamWL2SP(params, lr=LR, l2_sp=0.1),
    }
    out: dict = {f"{who} {c}": trained(make, c, rank) for c in CONFIGS for who, make in makers.items()}
    out |= {f"resumed {config}": resumed(config, rank, folder) for config in ("fp32-1", "bf16-2", "bf16-3")}
    out |= {f"{name} fp32": trained(SHARP[name], "fp32", rank, two_passes=name != "momentum") for name in SHARP}
    for config in ("fp32-1", "fp32-3", "bf16-0", "bf16-1-accumulated"):
        for name in SHARP:
            out[f"{name} {config}"] = refusal(name, config, rank, two_passes=False)
            if name != "momentum":
                out[f"two passes {name} {config}"] = refusal(name, config, rank, two_passes=True)
    return out


# -- and what comes of it ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    return spawn(run_all, 2, tmp_path_factory.mktemp("deepspeed") / "processes")[0]


def largest_difference(weights: list[Tensor], others: list[Tensor]) -> float:
    return max(float((p - other).abs().max()) for p, other in zip(weights, others, strict=True))


@pytest.mark.parametrize("config", CONFIGS)
def test_adamw_trains_as_torchs_does(results, config):
    """In fp32 to an ulp or so a step of weights of at most 1; in 16 bits these are rounded to the same."""
    tolerance = STEPS * 2.0**-23 if config.startswith("fp32") else 0
    assert largest_difference(results[f"ours {config}"], results[f"torch {config}"]) <= tolerance


@pytest.mark.parametrize("config", CONFIGS)
def test_anchors_are_the_weights_before_training(results, config):
    """ZeRO cuts the parameters otherwise; in 16 bits clipping rounds otherwise too, by an ulp of a weight above 1."""
    kind = config.split("-")[0]
    tolerance = STEPS * 2.0**-22 if kind == "fp32" else 2.0**-7
    reference = results[f"anchored {'fp32' if kind == 'fp32' else 'bf16-1'}"]
    assert largest_difference(results[f"anchored {config}"], reference) <= tolerance
    assert largest_difference(results[f"anchored {config}"], results[f"ours {config}"]) > 1e-4


@pytest.mark.parametrize("config", ["fp32-1", "bf16-2", "bf16-3"])
def test_checkpoint_of_the_engine_resumes_to_the_same_bits(results, config):
    assert largest_difference(results[f"resumed {config}"], results[f"ours {config}"]) == 0


@pytest.mark.parametrize("config", ["fp32-1", "fp32-3", "bf16-0", "bf16-1-accumulated"])
@pytest.mark.parametrize("name", [*SHARP, "two passes fsam", "two passes sam"])
def test_what_perturbs_is_refused_where_the_engine_has_other_parameters(results, name, config):
    assert "no module has" in results[f"{name} {config}"]
    assert "AdamWL2SP in DeepSpeed" in results[f"{name} {config}"]


@pytest.mark.parametrize("name", SHARP)
@eager_passes()
def test_without_zero_in_fp32_steps_are_those_of_one_process(results, name):
    model = make_model()
    optimizer = SHARP[name](groups_of(model))
    for step in range(STEPS):
        for is_first in (True, False) if name != "momentum" else (False,):
            loss_of(model, step).backward()
            if is_first:
                optimizer.perturb()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert largest_difference(results[f"{name} fp32"], list(model.parameters())) <= 1e-5
