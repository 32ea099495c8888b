"""What happens to a model between perturb() and step(): written, moved, saved, copied, left alone."""

import copy
import gc
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, SAM, AdamWL2SP, MomentumSAM
from tests.problem import Problem, small_model
from tests.training import assert_same_bits, assert_unchanged, closure_of, train, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "fp32": (torch.float32, lambda params: FSAM(params, lr=0.01, rho=0.5)),
    "bf16": (torch.bfloat16, lambda params: FSAM(params, lr=0.01, rho=0.5)),
    "bf16, masters": (torch.bfloat16, lambda params: FSAM(params, lr=0.01, rho=0.5, master_weights=True)),
    "flat": (torch.float32, lambda params: FSAM(params, lr=0.01, rho=0.5, flatten=True)),
    "gsam": (torch.float32, lambda params: FSAM(params, lr=0.01, rho=0.5, alpha=0.4)),
    "around sgd": (torch.float32, lambda params: SAM(torch.optim.SGD(params, lr=0.01, momentum=0.9), rho=0.5)),
}
every_kind = pytest.mark.parametrize(("dtype", "make"), KINDS.values(), ids=KINDS.keys())


def perturbed(dtype: torch.dtype, make, steps: int = 2):
    """A model that was trained for a while, now between two passes; and its clean weights."""
    model = small_model(dtype)
    optimizer = make(model.parameters())
    train(model, optimizer, steps)
    clean = weights_of(model)
    closure_of(model, optimizer, steps)()
    optimizer.perturb()
    assert not torch.equal(model["dense"].weight, clean[0])
    return model, optimizer, clean


# -- what somebody writes ----------------------------------------------------------------------------------------------


def load(model: nn.Module, values: list[Tensor]) -> None:
    names = [name for name, _ in model.named_parameters()]
    model.load_state_dict(dict(zip(names, values, strict=True)))


def assign(model: nn.Module, values: list[Tensor]) -> None:
    for p, value in zip(model.parameters(), values, strict=True):
        p.data = value.clone()


def assign_parts_of_a_vector(model: nn.Module, values: list[Tensor]) -> None:
    nn.utils.vector_to_parameters(torch.cat([value.flatten() for value in values]), model.parameters())


@torch.no_grad()
def broadcast(model: nn.Module, values: list[Tensor]) -> None:
    """As torch.distributed.broadcast(p, 0) writes a parameter."""
    for p, value in zip(model.parameters(), values, strict=True):
        p.copy_(value)


WRITERS = [load, assign, assign_parts_of_a_vector, broadcast]
every_writer = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)


@every_writer
@every_kind
def test_weights_that_are_written_between_the_passes_stay(dtype, make, write):
    model, optimizer, _ = perturbed(dtype, make)
    written = weights_of(small_model(dtype, seed=5))
    write(model, written)
    shown = list(model.state_dict().values())
    assert all(map(torch.equal, shown, written))
    optimizer.restore()
    assert not optimizer.perturbed
    assert_unchanged(model, written)


@every_writer
@every_kind
def test_step_starts_from_the_weights_that_were_written_between_the_passes(dtype, make, write):
    """As that of a twin whose clean weights they were, and which gets the same gradients."""
    models = [perturbed(dtype, make) for _ in range(2)]
    written = weights_of(small_model(dtype, seed=5))
    (model, optimizer, _), (twin, other, _) = models
    write(model, written)
    other.restore()
    broadcast(twin, written)
    # The state of GSAM's twin has no first gradient after its restore, so that its step is a plain one.
    if getattr(optimizer, "alpha", 0.0):
        optimizer.restore()
    for trained, own in ((model, optimizer), (twin, other)):
        for p, g in zip(trained.parameters(), Problem(seed=3).gradients(written, 0), strict=True):
            p.grad = g
        own.step()
    assert_same_bits(model, twin)


@every_kind
def test_one_parameter_that_is_written_leaves_the_others_to_be_restored(dtype, make):
    model, optimizer, clean = perturbed(dtype, make)
    with torch.no_grad():
        model["head"].weight.fill_(0.25)
    optimizer.restore()
    expected = [torch.full_like(w, 0.25) if w.shape == (8, 16) else w for w in clean]
    assert_unchanged(model, expected)


@every_kind
def test_weights_that_are_clamped_between_the_passes_keep_to_it(dtype, make):
    model, optimizer, _ = perturbed(dtype, make)
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.25, 0.25)
    clamped = weights_of(model)
    optimizer.restore()
    assert_unchanged(model, clamped)


class Masked(nn.Linear):
    """Prunes itself in every forward pass, by giving its weight another tensor."""

    def __init__(self) -> None:
        super().__init__(6, 5, bias=False, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        self.weight.data = torch.rand(5, 6, generator=generator, dtype=torch.float64) + 0.5
        self.mask = torch.rand(5, 6, generator=generator) > 0.5

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data * self.mask
        return super().forward(x)


@pytest.mark.parametrize("base", [None, torch.optim.AdamW], ids=["fsam", "around adamw"])
def test_weight_that_is_given_another_tensor_in_each_forward_pass_trains_as_sam_by_hand(base):
    model, twin = Masked(), Masked()
    optimizer = (
        FSAM(model.parameters(), lr=0.01, rho=0.1) if base is None else SAM(base(model.parameters(), lr=0.01), 0.1)
    )
    plain = torch.optim.AdamW(twin.parameters(), lr=0.01)
    inputs = torch.randn(7, 6, dtype=torch.float64)

    def loss_of(module: Masked) -> Tensor:
        return module(inputs).square().mean()

    for _ in range(5):

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        optimizer.step(closure)
        loss_of(twin).backward()
        clean, g = twin.weight.detach().clone(), twin.weight.grad
        twin.weight.data = clean + 0.1 * g / (g.norm() + 1e-12)
        plain.zero_grad()
        loss_of(twin).backward()
        twin.weight.data = clean
        plain.step()
        plain.zero_grad()
    # Five steps; a gradient of a few hundred roundings, and a quotient of at most 1.
    torch.testing.assert_close(model.weight, twin.weight, rtol=0, atol=5 * 0.01 * 1000 * 2.0**-52)


def test_parameter_that_changes_its_shape_between_the_passes_is_refused_by_name():
    model = nn.Linear(4, 3)
    optimizer = FSAM(model.named_parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.perturb()
    model.weight.data = torch.zeros(5, 4)
    with pytest.raises(RuntimeError, match="'weight'"):
        optimizer.restore()


# -- the model meanwhile -----------------------------------------------------------------------------------------------


@every_kind
def test_state_dict_of_the_model_is_clean(dtype, make):
    model, _, clean = perturbed(dtype, make)
    assert all(map(torch.equal, model.state_dict().values(), clean))


@every_kind
def test_copying_and_pickling_model_or_optimizer_is_refused_until_the_step(dtype, make):
    model, optimizer, _ = perturbed(dtype, make)
    for thing in (model, optimizer, (model, optimizer)):
        with pytest.raises(RuntimeError, match="perturbed"):
            copy.deepcopy(thing)
        with pytest.raises(RuntimeError, match="perturbed"):
            pickle.dumps(thing)
    Problem().loss(model.parameters(), 2).backward()
    optimizer.step()
    for thing in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(thing, model)


@every_kind
def test_refused_copy_leaves_the_step_as_it_would_have_been(dtype, make):
    models = [perturbed(dtype, make)[:2] for _ in range(2)]
    with pytest.raises(RuntimeError, match="perturbed"):
        copy.deepcopy(models[0])
    for model, optimizer in models:
        closure_of(model, optimizer, 2)()
        optimizer.step()
    assert_same_bits(models[0][0], models[1][0])


@every_kind
def test_optimizer_that_is_dropped_leaves_clean_weights(dtype, make):
    model, optimizer, clean = perturbed(dtype, make)
    del optimizer
    assert_unchanged(model, clean)
    # And nothing else: the model can be copied.
    assert_same_bits(copy.deepcopy(model), model)


@pytest.fixture
def frozen_modules():
    """gc.freeze() and what undoes it."""
    yield gc.freeze
    gc.unfreeze()


@every_kind
def test_state_dict_is_clean_after_gc_freeze(dtype, make, frozen_modules):
    model = small_model(dtype)
    optimizer = make(model.parameters())
    frozen_modules()
    closure_of(model, optimizer, 0)()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.perturb()
    assert all(map(torch.equal, model.state_dict().values(), weights_of(small_model(dtype))))
    with pytest.raises(RuntimeError, match="perturbed"):
        copy.deepcopy(model)


# -- afterwards --------------------------------------------------------------------------------------------------------

LOAD = """
import sys
sys.modules["fsam_triton"] = sys.modules["triton"] = None
import torch
for path in sys.argv[1:]:
    model = torch.load(path, weights_only=False)
    model(torch.ones(2, 4)).sum().backward()
    torch.save([p.detach() for p in model.parameters()], path)
"""
TRAINED_BY = {
    "fsam": FSAM,
    "momentum_sam": MomentumSAM,
    "adamw": AdamWL2SP,
    "flat": lambda params: FSAM(params, flatten=True),
    "around sgd": lambda params: SAM(torch.optim.SGD(params, lr=0.1)),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """Models that were trained and pickled whole, and the weights that another process has loaded."""
    folder, models, optimizers = tmp_path_factory.mktemp("pickled"), {}, []
    for i, (name, make) in enumerate(TRAINED_BY.items()):
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        optimizer = make(model.parameters())
        for _ in range(3):

            def closure(model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = model(torch.ones(2, 4)).square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)
        # The optimizer is alive, and the last loop ended without a word to it.
        optimizers.append(optimizer)
        torch.save(model, folder / f"{i}.pt")
        models[name] = model, folder / f"{i}.pt"
    paths = [str(path) for _, path in models.values()]
    subprocess.run([sys.executable, "-c", LOAD, *paths], check=True, timeout=240)
    return {name: (model, torch.load(path)) for name, (model, path) in models.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED_BY)
def test_trained_model_that_is_pickled_whole_loads_where_this_package_is_not(name, loaded):
    model, weights = loaded[name]
    assert_unchanged(model, weights)
