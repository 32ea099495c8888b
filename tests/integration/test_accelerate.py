"""FSAM in accelerate's loops, as docs/accelerate.md has them, against the same steps without accelerate."""

import contextlib

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, FisherMask, Schedule
from tests.integration.tiny import assert_equal, copied
from tests.training import assert_same_bits, assert_unchanged, weights_of

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = {
    "sam": {},
    "gsam": {"alpha": 0.4},
    "fisher": {"mask": FisherMask(0.3, interval=2), "adaptive": True},
    "looksam": {"schedule": Schedule(every=2, reuse=0.7)},
}
every_variant = pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())


@pytest.fixture(autouse=True)
def _own_accelerator():
    """accelerate keeps precision and accumulation for the whole process."""
    forget_accelerator()
    yield
    forget_accelerator()


def forget_accelerator() -> None:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 2))


def dataset(n: int) -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, 8, generator=generator)
    return torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())


def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(inputs), labels)


class Loop:
    """The second loop of docs/accelerate.md."""

    def __init__(self, samples=48, accumulate=1, scaler=None, clip=None, seed=0, precision="no", **kwargs):
        self.clip = clip
        precision = precision if scaler is None else "fp16"
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
        )
        if scaler is not None:
            # accelerate makes a scaler on a GPU alone. The model is left in fp32, to be compared to the bit.
            self.accelerator.scaler = scaler
        model = classifier(seed)
        self.sam = FSAM(model.named_parameters(), lr=0.01, rho=0.5, **kwargs)
        loader = torch.utils.data.DataLoader(dataset(samples), batch_size=4)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, self.sam, loader)
        self.accelerator.native_amp = self.accelerator.native_amp or scaler is not None

    def backward(self, batch: list[Tensor]) -> None:
        self.accelerator.backward(loss_of(self.model, *batch))

    def train(self, batches: range = range(1000), spoiled: int | None = None) -> None:
        """`spoiled`: the number of the batch whose second pass overflows."""
        accelerator, micro_batches = self.accelerator, []
        for number, batch in enumerate(self.loader):
            if number not in batches:
                continue
            micro_batches.append(batch)
            with accelerator.accumulate(self.model):
                self.backward(batch)
                if accelerator.sync_gradients:
                    if self.sam.is_sharp:
                        self.sam.perturb(accelerator.scaler)
                        for again in micro_batches:
                            self.backward(again)
                    micro_batches.clear()
                    if number == spoiled:
                        self.model[0].weight.grad[0, 0] = float("inf")
                    if self.clip is not None:
                        accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()


def plain(samples=48, accumulate=1, clip=None, precision=None, **kwargs) -> nn.Module:
    """The same steps without accelerate."""
    model = classifier()
    optimizer = FSAM(model.named_parameters(), lr=0.01, rho=0.5, **kwargs)
    batches = list(torch.utils.data.DataLoader(dataset(samples), batch_size=4))
    for start in range(0, len(batches), accumulate):

        def closure(micro_batches=batches[start : start + accumulate]) -> None:
            optimizer.zero_grad()
            for batch in micro_batches:
                with torch.autocast("cpu", dtype=precision) if precision else contextlib.nullcontext():
                    outputs = model(batch[0])
                (nn.functional.cross_entropy(outputs.float(), batch[1]) / accumulate).backward()
            if clip is not None and (optimizer.perturbed or not optimizer.is_sharp):
                nn.utils.clip_grad_norm_(model.parameters(), clip)

        optimizer.step(closure)
    return model


@every_variant
@pytest.mark.parametrize("accumulate", [1, 4])
def test_loop_equals_plain_pytorch_to_the_bit(kwargs, accumulate):
    loop = Loop(accumulate=accumulate, **kwargs)
    loop.train()
    assert_same_bits(loop.model, plain(accumulate=accumulate, **kwargs))


def test_step_at_the_end_of_the_data_has_fewer_micro_batches():
    loop = Loop(samples=40, accumulate=4)
    loop.train()
    assert_same_bits(loop.model, plain(samples=40, accumulate=4))


@every_variant
def test_clipping_by_accelerate_equals_plain_pytorchs_to_the_bit(kwargs):
    loop = Loop(accumulate=2, clip=0.1, **kwargs)
    loop.train()
    assert_same_bits(loop.model, plain(accumulate=2, clip=0.1, **kwargs))


def test_bf16_equals_plain_autocast_to_the_bit():
    loop = Loop(accumulate=2, precision="bf16")
    loop.train()
    assert_same_bits(loop.model, plain(accumulate=2, precision=torch.bfloat16))


@every_variant
@pytest.mark.parametrize("clip", [None, 0.1])
def test_scaler_gives_the_weights_of_training_without_one_to_the_bit(kwargs, clip):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    loop = Loop(accumulate=2, scaler=scaler, clip=clip, **kwargs)
    loop.train()
    assert scaler.get_scale() == 256.0 * 2**3
    assert_same_bits(loop.model, plain(accumulate=2, clip=clip, **kwargs))


def test_overflow_in_the_second_pass_leaves_the_weights_and_halves_the_scale():
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    loop = Loop(accumulate=2, scaler=scaler)
    loop.train(range(0, 2))
    before = weights_of(loop.model)
    loop.train(range(2, 4), spoiled=3)
    assert_unchanged(loop.model, before)
    assert scaler.get_scale() == 128.0
    loop.train(range(4, 6))
    assert all(p.isfinite().all() for p in loop.model.parameters())
    assert not torch.equal(loop.model[0].weight, before[0])


def test_closure_gives_the_steps_of_the_written_out_loop_to_the_bit():
    closured, loop = Loop(), Loop()
    for batch in closured.loader:

        def closure(batch=batch) -> Tensor:
            closured.optimizer.zero_grad()
            loss = loss_of(closured.model, *batch)
            closured.accelerator.backward(loss)
            return loss

        closured.optimizer.step(closure)
    loop.train()
    assert_same_bits(closured.model, loop.model)


def test_closure_with_a_scaler_is_refused_with_what_to_do():
    loop = Loop(scaler=torch.amp.GradScaler("cpu"))
    loop.backward(next(iter(loop.loader)))
    with pytest.raises(RuntimeError, match=r"perturb\(scaler\)"):
        loop.optimizer.step(lambda: None)


@every_variant
def test_saved_state_resumes_to_the_same_bits(kwargs, tmp_path):
    loop = Loop(accumulate=2, scaler=torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2), **kwargs)
    loop.train(range(0, 6))
    loop.accelerator.save_state(tmp_path)
    other_scaler = torch.amp.GradScaler("cpu")
    other = Loop(accumulate=2, seed=1, scaler=other_scaler, **kwargs)
    other.accelerator.load_state(tmp_path)
    assert_equal(copied(other.model), copied(loop.model))
    assert other_scaler.get_scale() == loop.accelerator.scaler.get_scale()
    for training in (loop, other):
        training.train(range(6, 12))
    assert_equal(copied(other.model), copied(loop.model))
