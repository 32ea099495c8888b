"""FSAM in Lightning's Trainer with its GradScaler, and exceptions in a second pass."""

import pytest
import torch

from fsam_triton import FisherMask
from tests.integration.tiny import assert_equal, copied
from tests.training import assert_same_bits

pytest.importorskip("pytorch_lightning")
from fsam_triton.integrations.lightning import SharpnessAware
from tests.integration.lightning_module import WARNINGS, AfterSteps, Module, every_variant, fit, fp16, network, plain

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(WARNINGS)]


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
