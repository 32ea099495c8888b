"""MomentumSAM notices forward passes: which perturb, which see clean weights, of models made and called in all ways."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.optim.momentum import same
from tests.optim.nets import Net, X, clean_copy, loss_of, optimizer_of, train, trained
from tests.training import weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

# -- which forward passes see what -------------------------------------------------------------------------------------


@pytest.fixture(params=["eval", "no_grad", "inference_mode", "eval_no_grad"])
def look(request):
    """Evaluates a model in a way that is not training."""

    def evaluate(model, x=X):
        if "eval" in request.param:
            model.eval()
        context = {"eval": torch.enable_grad, "inference_mode": torch.inference_mode}.get(request.param, torch.no_grad)
        with context():
            out = model(x).detach().clone()
        model.train()
        return out

    return evaluate


def test_look_between_steps_sees_clean_weights_and_perturbs_nothing(look):
    model, optimizer = trained()
    expected = clean_copy(model)(X)
    assert torch.equal(look(model), expected)
    assert not optimizer.perturbed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_look_between_micro_batches_sees_clean_weights_and_changes_no_bit_of_the_run(look, dtype):
    runs = []
    for looks in (False, True):
        model = Net(dtype=dtype)
        optimizer = optimizer_of(model)
        for _ in range(4):
            clean, seen = clean_copy(model).to(dtype)(X.to(dtype)), None
            for part in X.to(dtype).split(3):
                loss_of(model, part).backward()
                if looks:
                    assert torch.equal(look(model, X.to(dtype)), clean)
                seen = seen or weights_of(model)
                assert same(model.parameters(), seen)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(weights_of(model))
    assert same(*runs)


def test_look_between_forward_and_backward_pass_leaves_the_graph_as_it_was(look):
    (model, optimizer), (twin, straight) = trained(), trained()
    for _ in range(3):
        clean = clean_copy(model)(X)
        loss = loss_of(model)
        assert torch.equal(look(model), clean)
        assert optimizer.perturbed
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    train(twin, straight, 3)
    assert same(model.parameters(), twin.parameters())


def test_edit_between_forward_and_backward_pass_is_noticed_by_autograd_in_spite_of_a_look(look):
    model, optimizer = trained()
    loss = loss_of(model)
    with torch.no_grad():
        model.head.weight.mul_(2)
    edited = model.head.weight.detach().clone()
    look(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.restore()
    assert torch.equal(model.head.weight, edited)


def test_edit_within_a_look_is_of_clean_weights():
    class Clamping(Net):
        def forward(self, x):
            if not self.training:
                with torch.no_grad():
                    self.head.weight.clamp_(-0.1, 0.1)
            return super().forward(x)

    model = Clamping()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    loss_of(model).backward()
    expected = model.state_dict()["head.weight"].clamp(-0.1, 0.1)
    model.eval()(X)
    optimizer.restore()
    assert torch.equal(model.head.weight, expected)


def test_parts_in_eval_mode_within_a_model_that_trains_are_perturbed():
    """A frozen batch norm, say: it is the outermost module that is trained."""
    model, optimizer = trained()
    clean = weights_of(model)
    model.head.eval()
    loss_of(model)
    assert optimizer.perturbed
    assert not torch.equal(model.head.weight, clean[-2])


def test_eval_mode_of_the_model_until_train_mode_sees_clean_weights():
    model, optimizer = trained()
    expected = clean_copy(model)(X)
    model.eval()
    assert torch.equal(model(X), expected)
    model.train()
    assert not torch.equal(model(X), expected)
    optimizer.restore()


# -- how models are called ---------------------------------------------------------------------------------------------


def step_by_parts(model: Net, x: Tensor) -> Tensor:
    return model.head(model.body(x))


def step_by_layers(model: Net, x: Tensor) -> Tensor:
    for layer in model.body:
        x = layer(x)
    return model.head(x)


def wrapped(model: Net, x: Tensor) -> Tensor:
    return nn.Sequential(nn.ModuleDict({"model": model})["model"], nn.Identity())(x)


def called_directly(model: Net, x: Tensor) -> Tensor:
    """Its own `forward`, which no hook sees; its parts are seen."""
    return model.forward(x)


@pytest.mark.parametrize("call", [step_by_parts, step_by_layers, wrapped, called_directly])
def test_models_called_in_parts_train_to_the_same_bits(call):
    model, twin = Net(), Net()
    optimizer, straight = optimizer_of(model), optimizer_of(twin)
    train(lambda x: call(model, x), optimizer)
    train(twin, straight)
    assert same(model.parameters(), twin.parameters())


CHECKPOINTS = {
    "reentrant": lambda part, x: checkpoint(part, x.requires_grad_() if x.is_leaf else x, use_reentrant=True),
    "not_reentrant": lambda part, x: checkpoint(part, x, use_reentrant=False),
}


@pytest.mark.parametrize("called", ["whole", "parts"])
@pytest.mark.parametrize("through", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_activation_checkpointing_changes_no_bit(through, called):
    model, twin = Net(through), Net()
    optimizer, straight = optimizer_of(model), optimizer_of(twin)
    whole = model if called == "whole" else model.forward
    for _ in range(4):
        optimizer.zero_grad()
        whole(X.clone()).square().mean().backward()
        optimizer.step()
    train(twin, straight)
    assert same(model.parameters(), twin.parameters())


def test_look_between_forward_and_backward_pass_of_a_checkpointed_model_changes_no_bit(look):
    model, twin = Net(CHECKPOINTS["not_reentrant"]), Net()
    optimizer, straight = optimizer_of(model), optimizer_of(twin)
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(model)
        look(model)
        loss.backward()
        optimizer.step()
    train(twin, straight)
    assert same(model.parameters(), twin.parameters())


def test_step_within_the_forward_pass_of_a_wrapper_perturbs_the_passes_that_follow():
    """Lightning's manual optimization under DDP: the wrapper's forward is the whole training step."""

    class Training(nn.Module):
        def __init__(self, model, optimizer):
            super().__init__()
            self.model, self.optimizer = model, optimizer

        def forward(self, steps):
            train(self.model, self.optimizer, steps)

    model, twin = Net(), Net()
    optimizer, straight = optimizer_of(model), optimizer_of(twin)
    Training(model, optimizer)(3)
    Training(model, optimizer)(1)
    train(twin, straight)
    assert same(model.parameters(), twin.parameters())
    assert not optimizer.perturbed


def test_module_that_gets_parameters_of_the_optimizer_later_is_noticed():
    late, holder = nn.Linear(4, 4), nn.Sequential(nn.Identity())
    optimizer = optimizer_of(late)
    holder(X)
    holder.append(late)
    train(holder, optimizer, 2)
    assert not optimizer.perturbed
    holder(X)
    assert optimizer.perturbed


def test_frozen_parameters_neither_move_nor_call_for_a_perturbation():
    model = Net()
    model.body.requires_grad_(False)
    optimizer = optimizer_of(model)
    before = copy.deepcopy(model.body.state_dict())
    train(model, optimizer)
    model.body(X)
    assert not optimizer.perturbed
    loss_of(model)
    assert optimizer.perturbed
    assert all(torch.equal(p, before[name]) for name, p in model.body.named_parameters())


def test_parameters_frozen_for_a_while_are_not_perturbed_meanwhile():
    model, optimizer = trained()
    model.body.requires_grad_(False)
    before = weights_of(model.body)
    train(model, optimizer, 2)
    loss_of(model)
    assert optimizer.perturbed
    assert same(model.body.parameters(), before)
    optimizer.step()
    model.body.requires_grad_(True)
    loss_of(model)
    assert not same(model.body.parameters(), before)


def test_modules_of_others_are_none_of_its_business():
    model, optimizer = trained()
    teacher = clean_copy(model)
    teacher(X)
    nn.Identity()(X)
    assert not optimizer.perturbed
    assert same(teacher.parameters(), model.parameters())


# -- several optimizers ------------------------------------------------------------------------------------------------


def test_optimizers_of_two_parts_of_a_model_each_perturb_their_own():
    model, twin = Net(), Net()
    both, by_hand = ([optimizer_of(m.body), optimizer_of(m.head, rho=0.3)] for m in (model, twin))
    for _ in range(4):
        loss_of(model).backward()
        for optimizer in by_hand:
            optimizer.perturb()
        assert same(model.parameters(), twin.parameters())
        step_by_layers(twin, X).square().mean().backward()
        for optimizer in (*both, *by_hand):
            optimizer.step()
            optimizer.zero_grad()
    assert same(model.parameters(), twin.parameters())
    assert not any(optimizer.perturbed for optimizer in (*both, *by_hand))


def generator() -> Net:
    model = Net()
    model.head = nn.Linear(8, 4)
    return model


def discriminator() -> Net:
    model = Net()
    model.head = nn.Linear(8, 1)
    nn.init.constant_(model.head.weight, 0.1)
    return model


class Gan:
    """A generator and a discriminator, each with its own optimizer."""

    def __init__(self):
        self.generator, self.discriminator = generator(), discriminator()
        self.of_generator, self.of_discriminator = map(optimizer_of, (self.generator, self.discriminator))

    def train_discriminator(self):
        self.of_discriminator.zero_grad()
        with torch.no_grad():
            fake = self.generator(X)
        (self.discriminator(X) - self.discriminator(fake)).mean().backward()
        self.of_discriminator.step()

    def train_generator(self):
        self.of_generator.zero_grad()
        self.discriminator(self.generator(X)).mean().backward()
        self.of_generator.step()


def test_gan_whose_discriminator_is_frozen_meanwhile_is_clean_after_each_step():
    gan = Gan()
    for _ in range(3):
        gan.train_discriminator()
        before = weights_of(gan.discriminator)
        gan.discriminator.requires_grad_(False)
        gan.train_generator()
        gan.discriminator.requires_grad_(True)
        assert same(gan.discriminator.parameters(), before)
        assert not gan.of_discriminator.perturbed
        assert not gan.of_generator.perturbed


def test_gan_whose_discriminator_is_not_frozen_is_clean_to_all_that_do_not_train_it():
    """Its forward pass in the generator's step is followed by no step of its own."""
    gan = Gan()
    for _ in range(3):
        gan.train_discriminator()
        clean = weights_of(gan.discriminator)
        gan.train_generator()
        assert not gan.of_generator.perturbed
        assert gan.of_discriminator.perturbed
        assert same(gan.discriminator.state_dict().values(), clean)
    expected = clean_copy(gan.discriminator, discriminator)(X)
    assert torch.equal(gan.discriminator.eval()(X), expected)
    gan.of_discriminator.restore()
    assert same(gan.discriminator.parameters(), clean)
