"""A module for Lightning's Trainer, and the same steps in plain PyTorch."""

import contextlib
import copy

import pytest
import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn

from fsam_triton import FSAM, FisherMask, MomentumSAM, Schedule
from tests.integration.tiny import copied

WARNINGS = "ignore:.*(num_workers|LeafSpec|log_every_n_steps|val_dataloader)"

VARIANTS = {
    "sam": {},
    "gsam": {"alpha": 0.4},
    "fisher": {"mask": FisherMask(0.3, interval=2), "adaptive": True},
    "looksam": {"schedule": Schedule(every=2, reuse=0.7)},
    "esam": {"beta": 0.5, "beta_per": "tensor"},
}
every_variant = pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
BATCHES = 10


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 2))


def loader() -> torch.utils.data.DataLoader:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(4 * BATCHES, 8, generator=generator)
    data = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())
    return torch.utils.data.DataLoader(data, batch_size=4)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def optimizer_of(model: nn.Module, optimizer_cls=FSAM, **kwargs):
    return optimizer_cls(model.named_parameters(), **{"lr": 0.01, "rho": 0.5, **kwargs})


class Module(L.LightningModule):
    """`passes`: (batch_idx, whether perturbed) of each call of training_step; `seen`: weights of the validations."""

    def __init__(self, seed=0, **kwargs):
        super().__init__()
        self.network, self.kwargs = network(seed), kwargs
        self.passes: list[tuple[int, bool]] = []
        self.validated: list[dict[str, Tensor]] = []

    def training_step(self, batch, batch_idx):
        perturbed = self.optimizers().perturbed
        self.passes.append((batch_idx, perturbed))
        loss = loss_of(self.network, batch)
        if not perturbed:
            self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.validated.append(copied(self.network))

    def configure_optimizers(self):
        return optimizer_of(self.network, **self.kwargs)


class AfterSteps(L.Callback):
    """Keeps the weights after each batch."""

    def __init__(self):
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append(copied(pl_module.network))


def fit(module, callbacks=(), *, validate=False, ckpt_path=None, **arguments):
    arguments = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        **arguments,
    }
    trainer = L.Trainer(callbacks=list(callbacks), **arguments)
    trainer.fit(module, loader(), loader() if validate else None, ckpt_path=ckpt_path)
    return trainer


def fp16(**arguments) -> MixedPrecision:
    """What ``precision="16-mixed"`` makes on a GPU; on CPU Lightning makes bf16 of it."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **arguments))


def plain(accumulate=1, dtype=None, scaler=None, clip=None, epochs=1, **kwargs) -> list[nn.Module]:
    """The same steps in plain PyTorch: the model after each."""
    model = network()
    optimizer = optimizer_of(model, **kwargs)
    after = []

    def backward(micro_batches) -> None:
        for batch in micro_batches:
            cast = torch.autocast("cpu", dtype=dtype, cache_enabled=False) if dtype else contextlib.nullcontext()
            with cast:
                loss = loss_of(model, batch) / accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)

    for _ in range(epochs):
        batches = list(loader())
        for start in range(0, BATCHES, accumulate):
            micro_batches = batches[start : start + accumulate]
            optimizer.zero_grad()
            backward(micro_batches)
            if optimizer.is_sharp:
                optimizer.perturb(scaler)
                backward(micro_batches)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            after.append(copy.deepcopy(model))
    return after


def momentum_steps() -> list[nn.Module]:
    """Plain PyTorch: models with the clean weights after each step."""
    model = network()
    optimizer, after = optimizer_of(model, MomentumSAM), []
    for batch in loader():
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.eval()
        twin = network()
        twin.load_state_dict(model.state_dict())
        after.append(twin)
        optimizer.train()
    return after
