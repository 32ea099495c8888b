"""What MomentumSAM leaves behind, at any moment of the loop: a clean model that needs nothing of ours, no hooks."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules import module as modules

from fsam_triton import FSAM, MomentumSAM
from tests.optim.tagger import TOKENS, assert_equal, assert_shows_clean, copied, held_by, loss_of, pair, tagger, train

pytestmark = pytest.mark.usefixtures("one_thread")

HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


every_duplicate = pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])


@every_duplicate
def test_copy_of_the_model_alone_has_nothing_to_do_with_the_optimizer(duplicate):
    model, optimizer = pair()
    train(model, optimizer)
    twin = duplicate(model)
    assert_equal(twin.state_dict(), model.state_dict())
    held = copied(twin.state_dict())
    train(model, optimizer)
    loss_of(twin)
    assert not optimizer.perturbed
    assert_equal(held_by(twin), {name: held[name] for name in held_by(twin)})
    again = MomentumSAM(twin.parameters(), lr=0.01, rho=4.0)
    train(twin, again)
    loss_of(twin)
    assert_shows_clean(twin, again)


@every_duplicate
@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_model_and_its_parts_cannot_be_copied_while_perturbed(duplicate, moment):
    model, optimizer = pair()
    train(model, optimizer)
    loss = loss_of(model)
    if moment == "backward":
        loss.backward()
    for part in (model, model.block, model.embed, optimizer):
        with pytest.raises(RuntimeError, match=r"perturbed.*restore\(\)"):
            duplicate(part)
    optimizer.step()
    duplicate((model, optimizer))


@pytest.mark.slow
def test_model_saved_as_a_whole_after_a_step_is_loaded_without_this_package(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = MomentumSAM(model.parameters(), rho=4.0)
    for _ in range(3):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    torch.save(model, tmp_path / "model.pt")
    code = """
        import sys, torch
        model = torch.load(sys.argv[1], weights_only=False)
        assert not any(name.startswith("fsam_triton") for name in sys.modules)
        print(model(torch.ones(1, 4)).tolist())
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "model.pt")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(model.eval()(torch.ones(1, 4)).tolist())


def hooks_of(model: nn.Module) -> int:
    return sum(len(getattr(module, name)) for module in model.modules() for name in HOOKS)


def test_no_hook_is_left_in_the_modules_after_a_step():
    model, optimizer = pair()
    train(model, optimizer)
    assert hooks_of(model) == 0
    loss_of(model)
    assert hooks_of(model) > 0
    optimizer.restore()
    assert hooks_of(model) == 0


@pytest.fixture
def no_garbage():
    """Without the optimizers of tests before."""
    gc.collect()


@pytest.mark.parametrize("how", ["at once", "within a cycle"])
def test_optimizer_that_is_dropped_while_perturbed_leaves_clean_weights_and_no_hook(no_garbage, how):
    before = dict(modules._global_forward_pre_hooks)
    model, optimizer = pair()
    if how == "within a cycle":
        optimizer.itself = optimizer
    train(model, optimizer)
    loss_of(model)
    clean = copied(model.state_dict())
    del optimizer
    if how == "within a cycle":
        gc.collect()
    assert modules._global_forward_pre_hooks == before
    assert hooks_of(model) == 0
    assert_equal(model.state_dict(), clean)
    copy.deepcopy(model)


def test_optimizer_dropped_within_the_forward_pass_leaves_clean_weights_and_no_hook(no_garbage):
    before = dict(modules._global_forward_pre_hooks)

    class Dropping(nn.Linear):
        def forward(self, x):
            if len(steps) == 2:
                optimizers.clear()
            return super().forward(x)

    model, optimizers, steps = Dropping(4, 4), [], []
    optimizers.append(MomentumSAM(model.parameters(), lr=0.01, rho=4.0))
    for _ in range(2):
        model(torch.ones(4)).sum().backward()
        optimizers[0].step()
        steps.append(copied(held_by(model)))
    model(torch.ones(4))
    assert modules._global_forward_pre_hooks == before
    assert hooks_of(model) == 0
    assert_equal(held_by(model), steps[-1])


# -- exceptions --------------------------------------------------------------------------------------------------------


class Failing(nn.Linear):
    """Raises `error` in the forward pass, or in the backward pass, once."""

    error, where = None, None

    def forward(self, x):
        x = super().forward(x)
        if self.where == "forward":
            self.fail()
        if self.where == "backward":
            x.register_hook(self.fail)
        return x

    def fail(self, *args):
        self.where = None
        raise self.error


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("steps", [0, 2])
def test_pass_that_raises_can_be_repeated_or_given_up(error, where, steps):
    def take_a_step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(1, 4)).square().sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    model, twin = Failing(4, 4), Failing(4, 4)
    twin.load_state_dict(model.state_dict())
    optimizer, straight = (MomentumSAM(m.parameters(), lr=0.1, rho=1.0) for m in (model, twin))
    for _ in range(steps):
        take_a_step(model, optimizer)
        take_a_step(twin, straight)
    for _ in range(2):
        clean = copied(held_by(twin))
        model.error, model.where = error, where
        with pytest.raises(error):
            take_a_step(model, optimizer)
        assert_equal(model.state_dict(), clean)
        optimizer.restore()
        assert_equal(held_by(model), clean)
        assert hooks_of(model) == 0
        pickled(model)
        model.error, model.where = error, where
        with pytest.raises(error):
            take_a_step(model, optimizer)
        for _ in range(2):
            take_a_step(model, optimizer)
            take_a_step(twin, straight)
        assert_equal(held_by(model), held_by(twin))


def test_model_interrupted_in_its_first_forward_pass_can_be_pickled_after_restore():
    model = Failing(4, 4)
    optimizer = MomentumSAM(model.parameters())
    model.error, model.where = KeyboardInterrupt, "forward"
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(4))
    with pytest.raises(RuntimeError, match=r"restore\(\)"):
        pickle.dumps(model)
    optimizer.restore()
    assert_equal(pickled(model).state_dict(), model.state_dict())


# -- modules hidden from the garbage collector -------------------------------------------------------------------------


@pytest.fixture
def frozen():
    """Whatever is there when it is called is hidden from the collector until the end of the test."""

    def freeze():
        gc.collect()
        gc.freeze()

    yield freeze
    gc.unfreeze()


@pytest.mark.parametrize("when", ["before", "after"])
def test_models_hidden_by_gc_freeze_show_clean_weights(frozen, when):
    model = tagger()
    if when == "before":
        frozen()
    optimizer = MomentumSAM(model.parameters(), lr=0.01, rho=4.0)
    if when == "after":
        frozen()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer)
        loss_of(model)
    with pytest.raises(RuntimeError, match="perturbed"):
        copy.deepcopy(model)
    assert_shows_clean(model, optimizer)


def test_parts_hidden_by_gc_freeze_are_learned_when_they_are_called(frozen):
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    frozen()
    optimizer = MomentumSAM([*first.parameters(), *second.parameters()], lr=0.01, rho=4.0)
    first(torch.ones(4)).sum().backward()
    optimizer.step()
    with pytest.warns(RuntimeWarning, match=r"gc\.freeze\(\).*before it"):
        first(torch.ones(4))
    optimizer.zero_grad()
    second(torch.ones(4)).sum().backward()
    optimizer.step()
    for model in (first, second):
        model(torch.ones(4))
        assert_equal(model.state_dict(), {name: optimizer.clean_weight(p) for name, p in model.named_parameters()})
        optimizer.step()


def test_fsam_warns_of_modules_that_were_hidden_before_it_was_made(frozen):
    model = tagger()
    frozen()
    optimizer = FSAM(model.parameters(), lr=0.01, rho=4.0)
    loss_of(model).backward()
    with pytest.warns(RuntimeWarning, match=r"gc\.freeze\(\)"):
        optimizer.perturb()
    optimizer.restore()


@pytest.mark.filterwarnings("error")
def test_fsam_made_before_gc_freeze_shows_clean_weights(frozen):
    model = tagger()
    optimizer = FSAM(model.parameters(), lr=0.01, rho=4.0)
    before = copied(model.state_dict())
    frozen()
    nn.functional.cross_entropy(model(TOKENS)[:, 0], TOKENS[:, 0]).backward()
    optimizer.perturb()
    assert_equal({**model.state_dict(), "seen": before["seen"]}, before)
    optimizer.restore()
