"""Backups that count steps: whatever comes between the passes, the clean weights come back to the bit."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, FisherMask, FishMask, MomentumSAM
from fsam_triton.buffers import lanes
from tests.kernels.cases import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
KINDS = {
    "sam": (FSAM, {}),
    "asam": (FSAM, {"adaptive": True, "rho": 1.0}),
    "fisher-sam": (FSAM, {"mask": FisherMask(0.3, interval=2)}),
    "gsam": (FSAM, {"alpha": 0.3}),
    "esam": (FSAM, {"beta": 0.5}),
    "momentum-sam": (MomentumSAM, {}),
}
every_kind = pytest.mark.parametrize("name", KINDS)


class Training:
    """Of a model of odd sizes, with gradients made by hand."""

    def __init__(self, name: str, dtype: torch.dtype, backup_format: str | None = "8bit", **more) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(33, 50), nn.LSTM(50, 8), nn.LayerNorm(8)).to(dtype)
        kind, own = KINDS[name]
        arguments = {"lr": 1e-2, **own, **more}
        self.optimizer = kind(self.model.named_parameters(), backup_format=backup_format, **arguments)

    def give(self, seed: int, without: int | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        for i, p in enumerate(self.model.parameters()):
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if i == without else grad

    def perturb(self, step: int, without: int | None = None) -> None:
        self.give(2 * step, without)
        self.optimizer.perturb()

    def step(self, step: int, without: int | None = None) -> None:
        self.give(2 * step + 1, without)
        self.optimizer.step()

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            self.perturb(step)
            self.step(step)

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def assert_restored(training: Training) -> None:
    training.train(0, 2)
    clean = training.weights()
    training.perturb(2)
    assert not torch.equal(training.weights(), clean)
    training.optimizer.restore()
    assert_same_bits(training.weights(), clean)


@narrow
@every_kind
def test_restored_weights_are_the_clean_ones(name, dtype):
    assert_restored(Training(name, dtype))


@pytest.mark.parametrize("name", ["sam", "momentum-sam"])
def test_selected_weights_are_restored_too(name):
    mask = FishMask.random(Training(name, torch.bfloat16).model, 0.3)
    assert_restored(Training(name, torch.bfloat16, trainable=mask))


def test_large_weights_are_put_back_in_parts(monkeypatch):
    monkeypatch.setattr(lanes, "_PART", 100)
    assert_restored(Training("sam", torch.bfloat16))


@narrow
@every_kind
def test_steps_equal_those_with_whole_backups_where_no_weight_moves_far(name, dtype):
    """A tiny radius, and weights that are not near zero: nothing is cut off."""
    runs = []
    for backup_format in ("8bit", None):
        training = Training(name, dtype, backup_format, rho=1e-2)
        with torch.no_grad():
            for p in training.model.parameters():
                p.copy_(p.sign() * (p.abs() + 0.5))
        training.train(0, 4)
        runs.append(training.weights())
    assert_same_bits(*runs)


def test_weights_move_by_127_steps_at_most():
    training = Training("sam", torch.bfloat16, rho=1e6, stochastic_rounding=False)
    before = training.weights().float()
    training.perturb(0)
    after = training.weights().float()
    # 127 steps of bf16 are less than a doubling or a halving.
    same_side = before.abs() > 1e-30
    assert (after / before)[same_side].max() <= 2.0
    assert (after / before)[same_side].min() >= 0.5
    assert (after != before).float().mean() > 0.99


@narrow
def test_gradients_that_are_missing_in_one_pass(dtype):
    """What is not perturbed is not put back either, and what has no second gradient is."""
    runs = []
    for backup_format in ("8bit", None):
        training = Training("sam", dtype, backup_format, rho=1e-2)
        with torch.no_grad():
            for p in training.model.parameters():
                p.copy_(p.sign() * (p.abs() + 0.5))
        training.train(0, 2)
        training.perturb(2, without=0)
        training.step(2, without=3)
        training.perturb(3, without=1)
        training.step(3)
        runs.append(training.weights())
    assert_same_bits(*runs)


def moved_elsewhere(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def to_float(model: nn.Module) -> None:
    model.float()


def written(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.fill_(0.25)


def one_element_written_elsewhere(model: nn.Module) -> None:
    other = model[0].weight.data.clone()
    other[0, 0] = 0.25
    model[0].weight.data = other


@pytest.mark.parametrize("act", [moved_elsewhere, to_float, written, one_element_written_elsewhere])
@pytest.mark.parametrize("name", ["sam", "momentum-sam"])
def test_what_is_done_to_perturbed_weights_from_outside_counts_as_with_whole_backups(name, act):
    results = []
    for backup_format in ("8bit", None):
        training = Training(name, torch.bfloat16, backup_format)
        training.train(0, 2)
        training.perturb(2)
        act(training.model)
        training.optimizer.restore()
        results.append(training.weights())
    assert_same_bits(*results)


def test_state_dicts_between_the_passes_show_clean_weights():
    training = Training("sam", torch.bfloat16)
    training.train(0, 2)
    clean = copy.deepcopy(training.model.state_dict())
    training.perturb(2)
    shown = training.model.state_dict()
    assert all(torch.equal(shown[name], value) for name, value in clean.items())
    p = training.model[0].weight
    assert torch.equal(training.optimizer.clean_weight(p), clean["0.weight"])


def weights_of_a_pass(training: Training, inputs: Tensor) -> Tensor:
    """The weights that a forward pass without gradients sees."""
    seen = []
    handle = training.model[0].register_forward_hook(lambda *_: seen.append(training.weights()))
    with torch.no_grad():
        training.model[0](inputs)
    handle.remove()
    return seen[0]


def test_evaluation_in_the_middle_of_a_step():
    results = []
    for evaluates in (True, False):
        training = Training("momentum-sam", torch.bfloat16)
        training.train(0, 2)
        clean = training.weights()
        inputs = torch.ones(3, 33, dtype=torch.bfloat16)
        training.model[0](inputs)
        assert training.optimizer.perturbed
        perturbed = training.weights()
        if evaluates:
            training.model.eval()
            assert_same_bits(weights_of_a_pass(training, inputs), clean)
            training.model.train()
            assert_same_bits(training.weights(), perturbed)
        training.step(2)
        results.append(training.weights())
    assert_same_bits(*results)


def test_full_precision_weights_keep_whole_backups():
    training = Training("sam", torch.float32)
    plain = Training("sam", torch.float32, None)
    for one in (training, plain):
        one.train(0, 3)
    assert_same_bits(training.weights(), plain.weights())
