"""FSAM in Lightning's manual optimization, against the same steps in plain PyTorch."""

import pytest
import torch

from tests.training import assert_same_bits

pytest.importorskip("pytorch_lightning")
from fsam_triton.integrations.lightning import SharpnessAware
from tests.integration.lightning_module import WARNINGS, Module, every_variant, fit, fp16, loss_of, plain

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(WARNINGS)]


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
