"""FSAM and MomentumSAM in Lightning's Trainer, against the same steps in plain PyTorch."""

import contextlib
import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, FisherMask, MomentumSAM, Schedule
from tests.integration.tiny import assert_equal, copied
from tests.training import assert_same_bits

L = pytest.importorskip("pytorch_lightning")
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402
from pytorch_lightning.plugins import MixedPrecision  # noqa: E402

from fsam_triton.integrations.lightning import SharpnessAware  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*(num_workers|LeafSpec|log_every_n_steps|val_dataloader)"),
]

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


# -- fp32 and bf16 -----------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("callbacks", [[], [SharpnessAware()]], ids=["alone", "callback"])
def test_automatic_optimization_equals_plain_pytorch_to_the_bit(kwargs, callbacks):
    module = Module(**kwargs)
    fit(module, callbacks)
    assert_same_bits(module.network, plain(**kwargs)[-1])


def test_second_call_of_training_step_is_at_the_perturbed_weights():
    module = Module()
    fit(module)
    assert module.passes == [(i, perturbed) for i in range(BATCHES) for perturbed in (False, True)]


@pytest.mark.parametrize("callbacks", [[], [SharpnessAware()]], ids=["alone", "callback"])
def test_bf16_equals_plain_autocast_to_the_bit(callbacks):
    module = Module()
    fit(module, callbacks, precision="bf16-mixed")
    assert_same_bits(module.network, plain(dtype=torch.bfloat16)[-1])


@pytest.mark.parametrize("kwargs", [{}, {"alpha": 0.4}], ids=["sam", "gsam"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradient_clip_val_clips_in_both_passes(kwargs, accumulate):
    module = Module(**kwargs)
    fit(module, [SharpnessAware()], gradient_clip_val=0.1, accumulate_grad_batches=accumulate)
    assert_same_bits(module.network, plain(accumulate, clip=0.1, **kwargs)[-1])


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_training_step_that_returns_none_skips_the_step(half):
    class Skipping(Module):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 9 else super().training_step(batch, batch_idx)

    module, after = Skipping(), AfterSteps()
    fit(module, [SharpnessAware(), after], plugins=fp16(init_scale=1024.0) if half else None)
    assert_equal(after.weights[9], after.weights[8])


# -- accumulation ------------------------------------------------------------------------------------------------------


@every_variant
def test_accumulated_steps_equal_plain_pytorch_to_the_bit(kwargs):
    """Two micro-batches a step: the second passes are in another order, which does not change a sum of two."""
    module = Module(**kwargs)
    fit(module, [SharpnessAware()], accumulate_grad_batches=2)
    assert_same_bits(module.network, plain(2, **kwargs)[-1])


def test_every_micro_batch_of_a_step_is_passed_in_both_passes():
    module = Module()
    fit(module, [SharpnessAware()], accumulate_grad_batches=4)
    first, second = ([i for i, perturbed in module.passes if perturbed == wanted] for wanted in (False, True))
    assert first == list(range(BATCHES))
    # Lightning itself evaluates the last one of a step again, before the callback passes the others.
    assert second == [3, 0, 1, 2, 7, 4, 5, 6, 9, 8]


def test_training_step_without_an_index_that_returns_a_dict_is_passed_again():
    class Other(Module):
        def training_step(self, batch):
            return {"loss": super().training_step(batch, 0)}

    module = Other()
    fit(module, [SharpnessAware()], accumulate_grad_batches=2)
    assert_same_bits(module.network, plain(2)[-1])


# -- fp16 --------------------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("accumulate", [1, 2])
def test_fp16_equals_plain_pytorch_with_a_scaler_to_the_bit(kwargs, accumulate):
    module = Module(**kwargs)
    fit(module, [SharpnessAware()], plugins=fp16(init_scale=1024.0), accumulate_grad_batches=accumulate)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert_same_bits(module.network, plain(accumulate, torch.float16, scaler, **kwargs)[-1])


def test_fp16_without_the_callback_is_adamw_and_says_so():
    module = Module()
    with pytest.warns(UserWarning, match="none was sharpness-aware"):
        fit(module, plugins=fp16(init_scale=1024.0))
    assert not any(perturbed for _, perturbed in module.passes)


def test_fp16_from_an_absurd_scale_settles_as_plain_pytorch_does():
    """The mask is due in the first step, which overflows, and stays."""
    scaling, kwargs = {"init_scale": 2.0**40, "backoff_factor": 2.0**-8}, {"mask": FisherMask(0.3, interval=100)}
    module, plugin = Module(**kwargs), fp16(**scaling)
    fit(module, [SharpnessAware()], plugins=plugin)
    assert plugin.scaler.get_scale() < 2.0**40
    assert not torch.equal(module.network[0].weight, network()[0].weight)
    scaler = torch.amp.GradScaler("cpu", **scaling)
    assert_same_bits(module.network, plain(dtype=torch.float16, scaler=scaler, **kwargs)[-1])


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_fp16_micro_batch_that_is_left_out_leaves_no_perturbed_weights(last):
    """Lightning leaves out the step of accumulated gradients if the last micro-batch returned None."""

    class Skipping(Module):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 8 + last else super().training_step(batch, batch_idx)

    module, after = Skipping(), AfterSteps()
    fit(module, [SharpnessAware(), after], plugins=fp16(init_scale=1024.0), accumulate_grad_batches=2)
    moved = not torch.equal(after.weights[9]["0.weight"], after.weights[7]["0.weight"])
    assert moved != last


@pytest.mark.parametrize("plugins", [None, "fp16"], ids=["fp32", "fp16"])
def test_exception_in_the_second_pass_leaves_clean_weights(plugins):
    class Failing(Module):
        def training_step(self, batch, batch_idx):
            if self.optimizers().perturbed and batch_idx == 2:
                raise ArithmeticError("made up")
            return super().training_step(batch, batch_idx)

    module, after = Failing(), AfterSteps()
    with pytest.raises(ArithmeticError):
        fit(module, [SharpnessAware(), after], plugins=fp16(init_scale=1024.0) if plugins else None)
    assert_equal(copied(module.network), after.weights[-1])


# -- checkpoints and callbacks -----------------------------------------------------------------------------------------


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


# -- manual optimization -----------------------------------------------------------------------------------------------


class Manual(Module):
    """As docs/lightning.md has it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_of(self.network, batch))
        if optimizer.is_sharp:
            optimizer.perturb(getattr(self.trainer.precision_plugin, "scaler", None))
            self.manual_backward(loss_of(self.network, batch))
        optimizer.step()


@every_variant
@pytest.mark.parametrize("callbacks", [[], [SharpnessAware()]], ids=["alone", "callback"])
def test_manual_optimization_equals_plain_pytorch_to_the_bit(kwargs, callbacks):
    module = Manual(**kwargs)
    fit(module, callbacks)
    assert_same_bits(module.network, plain(**kwargs)[-1])


@pytest.mark.parametrize("callbacks", [[], [SharpnessAware()]], ids=["alone", "callback"])
def test_manual_optimization_in_fp16_equals_plain_pytorch_to_the_bit(callbacks):
    module = Manual()
    fit(module, callbacks, plugins=fp16(init_scale=1024.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert_same_bits(module.network, plain(dtype=torch.float16, scaler=scaler)[-1])


def test_manual_optimization_with_a_closure_equals_plain_pytorch_to_the_bit():
    class Closured(Manual):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()

            def closure():
                optimizer.zero_grad()
                self.manual_backward(loss_of(self.network, batch))

            optimizer.step(closure)

    module = Closured()
    fit(module)
    assert_same_bits(module.network, plain()[-1])


def test_manual_optimization_that_forgets_the_second_pass_is_refused():
    class Forgetful(Manual):
        def training_step(self, batch, batch_idx):
            self.manual_backward(loss_of(self.network, batch))
            self.optimizers().step()

    with pytest.raises(RuntimeError, match="backward"):
        fit(Forgetful())


# -- momentum-SAM ------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("optimizer_cls", [FSAM, MomentumSAM])
def test_gradients_are_clipped_in_bf16_mixed_where_there_is_no_scaler(optimizer_cls):
    class Watched(Module):
        norms: list[float] = []  # noqa: RUF012

        def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            grads = [p.grad.norm() for p in self.network.parameters() if p.grad is not None]
            self.norms.append(float(torch.stack(grads).norm()))

    module = Watched(optimizer_cls=optimizer_cls)
    Watched.norms.clear()
    fit(module, [SharpnessAware()], precision="bf16-mixed", gradient_clip_val=1e-3)
    assert len(module.norms) == BATCHES * (2 if optimizer_cls is FSAM else 1)
    assert max(module.norms) <= 1e-3 * 1.001
