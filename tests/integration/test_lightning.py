"""FSAM in Lightning's Trainer, in fp32 and bf16, against the same steps in plain PyTorch."""

import pytest
import torch

from fsam_triton import FSAM, MomentumSAM
from tests.integration.tiny import assert_equal
from tests.training import assert_same_bits

pytest.importorskip("pytorch_lightning")
from fsam_triton.integrations.lightning import SharpnessAware
from tests.integration.lightning_module import BATCHES, WARNINGS, AfterSteps, Module, every_variant, fit, fp16, plain

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(WARNINGS)]


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
