"""Lightning saves, averages, validates and logs clean weights, of FSAM and MomentumSAM."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fsam_triton import FSAM, MomentumSAM
from tests.integration.tiny import assert_equal, copied
from tests.training import assert_same_bits

pytest.importorskip("pytorch_lightning")
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint

from fsam_triton.integrations.lightning import SharpnessAware
from tests.integration.lightning_module import (
    BATCHES,
    WARNINGS,
    AfterSteps,
    Module,
    every_variant,
    fit,
    fp16,
    loader,
    loss_of,
    momentum_steps,
    network,
    plain,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(WARNINGS)]


def saved_in(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name.removeprefix("network."): weight for name, weight in state.items()}


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)


@pytest.mark.parametrize("optimizer_cls", [FSAM, MomentumSAM])
def test_checkpoints_hold_the_clean_weights_of_their_step(optimizer_cls, tmp_path):
    module = Module(optimizer_cls=optimizer_cls)
    fit(module, [SharpnessAware(), every_step(tmp_path)])
    expected = plain() if optimizer_cls is FSAM else momentum_steps()
    for step, model in enumerate(expected, 1):
        assert_equal(saved_in(tmp_path / f"step={step}.ckpt"), copied(model))


@every_variant
@pytest.mark.parametrize("plugins", [None, "fp16"], ids=["fp32", "fp16"])
def test_training_resumed_from_a_checkpoint_ends_with_the_same_bits(kwargs, plugins, tmp_path):
    def plugin():
        return fp16(init_scale=256.0, growth_interval=3) if plugins else None

    module, other = Module(**kwargs), Module(seed=1, **kwargs)
    checkpoints = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(module, [SharpnessAware(), checkpoints], max_epochs=2, plugins=plugin())
    fit(other, [SharpnessAware()], max_epochs=2, plugins=plugin(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert 2 * len(other.passes) == len(module.passes)
    assert_same_bits(other.network, module.network)


def test_averaging_callback_averages_clean_weights_and_gives_back_the_last_ones():
    """The average is swapped into the model for each validation, and out of it after that."""
    averaging, module, after = EMAWeightAveraging(decay=0.5), Module(), AfterSteps()
    fit(module, [SharpnessAware(), averaging, after], validate=True, val_check_interval=4)
    steps = plain()
    for weights, model in zip(after.weights, steps, strict=True):
        assert_equal(weights, copied(model))
    average = copied(steps[0])
    for model in steps[1:]:
        average = {name: 0.5 * average[name] + 0.5 * weight for name, weight in copied(model).items()}
    assert_equal(copied(module.network), average)


def test_logged_loss_is_that_of_the_clean_weights():
    module = Module()
    trainer = fit(module, [SharpnessAware()], accumulate_grad_batches=2)
    models = [network(), *plain(2)]
    losses = [loss_of(models[i // 2], batch) for i, batch in enumerate(loader())]
    eps = torch.finfo(torch.float32).eps
    assert abs(trainer.callback_metrics["train_loss"] - sum(losses) / BATCHES) <= BATCHES * eps


def test_momentum_sam_validates_and_ends_with_clean_weights():
    module = Module(optimizer_cls=MomentumSAM)
    fit(module, [SharpnessAware()], validate=True, val_check_interval=5)
    steps = momentum_steps()
    for weights, step in zip(module.validated, (5, 10), strict=True):
        assert_equal(weights, copied(steps[step - 1]))
    assert_same_bits(module.network, steps[-1])


def test_momentum_sam_stays_clean_when_it_is_validated_after_training():
    module = Module(optimizer_cls=MomentumSAM)
    trainer = fit(module, [SharpnessAware()])
    clean = copied(module.network)
    trainer.validate(module, loader(), verbose=False)
    assert_equal(module.validated[-1], clean)
    assert_equal(copied(module.network), clean)
