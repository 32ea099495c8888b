"""state_dict() of models whose parameters are perturbed: clean, however the model is built."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn

from fsam_triton import FSAM, SAM, FishMask, MomentumSAM
from tests.optim.tagger import (
    TOKENS,
    assert_equal,
    assert_shows_clean,
    copied,
    held_by,
    loss_of,
    pair,
    tagger,
    train,
)
from tests.training import round_trip

pytestmark = pytest.mark.usefixtures("one_thread")

PRECISIONS = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "bf16_master": (torch.bfloat16, {"master_weights": True}),
}
every_precision = pytest.mark.parametrize(("dtype", "kwargs"), PRECISIONS.values(), ids=PRECISIONS.keys())


def perturbed_pair(dtype=torch.float32, **kwargs):
    """A model and its optimizer between a forward pass and the backward pass."""
    model, optimizer = pair(dtype, **kwargs)
    train(model, optimizer)
    loss_of(model)
    return model, optimizer


@every_precision
def test_state_dict_shows_clean_weights_between_forward_pass_and_step(dtype, kwargs):
    model, optimizer = pair(dtype, **kwargs)
    for _ in range(3):
        train(model, optimizer)
        loss_of(model)
        assert_shows_clean(model, optimizer)
    loss = loss_of(model)
    loss.backward()
    assert_shows_clean(model, optimizer)


def test_state_dict_within_the_forward_pass_shows_clean_weights():
    class Looking(nn.Linear):
        def forward(self, x):
            self.shown, self.held = copied(self.state_dict()), copied(held_by(self))
            return super().forward(x)

    model = Looking(4, 4)
    optimizer = MomentumSAM(model.parameters(), lr=0.01, rho=4.0)
    for _ in range(3):
        clean = copied(held_by(model))
        model(torch.ones(4)).sum().backward()
        assert_equal(model.shown, clean)
        optimizer.step()
    assert not torch.equal(model.held["weight"], model.shown["weight"])


def test_buffers_and_order_of_the_state_dict_are_the_models():
    (model, _), twin = perturbed_pair(), tagger()
    assert list(model.state_dict()) == list(twin.state_dict())
    assert model.state_dict()["seen"] == 3
    assert model.state_dict()._metadata == twin.state_dict()._metadata


def test_state_dict_of_a_part_and_with_a_prefix_shows_clean_weights():
    model, _ = perturbed_pair()
    clean = copied(model.state_dict())
    part = model.block["attention"].out_proj.state_dict(prefix="block.attention.out_proj.")
    assert part
    assert all(torch.equal(value, clean[name]) for name, value in part.items())
    own = {}
    model.embed.state_dict(destination=own)
    assert torch.equal(own["weight"], clean["embed.weight"])


def test_state_dict_with_keep_vars_has_the_parameters_themselves():
    model, _ = perturbed_pair()
    state = model.state_dict(keep_vars=True)
    assert all(state[name] is parameter for name, parameter in model.named_parameters(remove_duplicate=False))


def test_state_dict_has_no_gradients_and_the_parameters_shapes_and_strides():
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    optimizer = MomentumSAM(model.parameters())
    for _ in range(2):
        model(torch.ones(1, 3, 4, 4)).sum().backward()
        shown = model.state_dict()
        assert list(shown) == ["weight", "bias"]
        for name, value in shown.items():
            parameter = getattr(model, name)
            assert not value.requires_grad
            assert (value.shape, value.stride()) == (parameter.shape, parameter.stride())
        optimizer.step()


@every_precision
def test_tied_weights_are_saved_once_and_stay_tied(dtype, kwargs):
    model, _ = perturbed_pair(dtype, **kwargs)
    for state in (model.state_dict(), round_trip(model.state_dict())):
        assert state["head.weight"].untyped_storage()._cdata == state["embed.weight"].untyped_storage()._cdata


def test_weights_tied_after_the_optimizer_was_made_are_shown_clean_and_saved_once():
    model = tagger()
    model.head.weight = nn.Parameter(torch.ones(8, 16))
    optimizer = MomentumSAM(model.parameters(), lr=0.01, rho=4.0)
    model.head.weight = model.embed.weight
    train(model, optimizer)
    loss_of(model)
    state = model.state_dict()
    assert state["head.weight"].untyped_storage()._cdata == state["embed.weight"].untyped_storage()._cdata
    assert_shows_clean(model, optimizer)


def test_saving_one_module_does_not_save_the_whole_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 512), nn.Linear(512, 512))
    optimizer = MomentumSAM(model.parameters())
    for _ in range(2):
        model(torch.ones(4)).sum().backward()
        buffer = io.BytesIO()
        torch.save(model[0].state_dict(), buffer)
        # 80 bytes of weights; the file's own records take a few KB, the other modules would take 1 MB.
        assert buffer.getbuffer().nbytes < 16384
        optimizer.step()


@every_precision
def test_safetensors_saves_clean_weights_with_ties(dtype, kwargs, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, optimizer = perturbed_pair(dtype, **kwargs)
    safetensors.save_model(model, tmp_path / "model.safetensors")
    other = tagger(dtype, seed=1)
    safetensors.load_model(other, tmp_path / "model.safetensors")
    optimizer.restore()
    assert_equal(other.state_dict(), model.state_dict())


def test_save_pretrained_writes_clean_weights_with_ties(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    model = transformers.BertForMaskedLM(config)
    optimizer = MomentumSAM(model.parameters(), lr=0.01, rho=4.0)
    for _ in range(2):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    model(input_ids=TOKENS, labels=TOKENS)
    model.save_pretrained(tmp_path)
    held = copied(dict(model.named_parameters()))
    optimizer.restore()
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    assert_equal(loaded.state_dict(), model.state_dict())
    assert not torch.equal(held["bert.embeddings.word_embeddings.weight"], loaded.get_input_embeddings().weight)


# -- which modules -----------------------------------------------------------------------------------------------------


def test_parts_that_are_called_one_by_one_and_late_are_found():
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    optimizer = MomentumSAM(model.parameters(), lr=0.01, rho=4.0)
    for name in ("first", "first", "second", "second"):
        optimizer.zero_grad()
        model[name](torch.ones(4)).sum().backward()
        optimizer.step()
    model["second"](torch.ones(4))
    assert_shows_clean(model, optimizer)


def test_model_that_is_never_called_shows_clean_weights():
    model, optimizer = pair()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.perturb()
    assert_shows_clean(model, optimizer)


def test_modules_made_or_wrapped_after_the_optimizer_show_clean_weights():
    weight = nn.Parameter(torch.eye(4))
    optimizer = MomentumSAM([weight], lr=0.01, rho=4.0)
    model = nn.Linear(4, 4, bias=False)
    model.weight = weight
    wrapped = nn.Sequential(model)
    wrapped(torch.ones(4)).sum().backward()
    optimizer.step()
    wrapped(torch.ones(4))
    assert_shows_clean(wrapped, optimizer)


def test_modules_of_a_group_added_later_show_clean_weights():
    model = tagger()
    optimizer = MomentumSAM(model.block.parameters(), lr=0.01, rho=4.0)
    train(model, optimizer)
    in_block = {id(parameter) for parameter in model.block.parameters()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in in_block]
    optimizer.add_param_group({"params": rest})
    assert torch.equal(model.state_dict()["embed.weight"], model.embed.weight)
    train(model, optimizer)
    loss_of(model)
    assert_shows_clean(model, optimizer)


def test_parameters_the_optimizer_was_not_given_are_shown_as_they_are():
    model = tagger()
    optimizer = MomentumSAM([model.head.bias], lr=0.01, rho=4.0)
    train(model, optimizer)
    loss_of(model)
    state = model.state_dict()
    assert not torch.equal(state["head.bias"], model.head.bias)
    assert all(torch.equal(state[n], p) for n, p in model.named_parameters() if n != "head.bias")


def test_parameters_without_modules_train():
    weight = nn.Parameter(torch.ones(4))
    optimizer = MomentumSAM([weight], lr=0.01, rho=4.0)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.perturb()
        weight.square().sum().backward()
        optimizer.step()
    clean = weight.detach().clone()
    optimizer.perturb()
    assert torch.equal(optimizer.clean_weight(weight), clean)
    assert not torch.equal(weight, clean)
    optimizer.restore()
    assert optimizer.clean_weight(weight) is None
    assert torch.equal(weight, clean)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_scripted_modules_train_and_show_clean_weights():
    twin = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model = torch.jit.script(copy.deepcopy(twin))
    optimizer, other = (MomentumSAM(m.parameters(), lr=0.01, rho=4.0) for m in (model, twin))
    for _ in range(4):
        for m, o in ((model, optimizer), (twin, other)):
            o.zero_grad()
            m(torch.ones(4)).square().sum().backward()
            o.step()
    model(torch.ones(4))
    assert_shows_clean(model, optimizer)
    for p, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, expected)


# -- lifetimes ---------------------------------------------------------------------------------------------------------


def test_optimizer_that_is_dropped_while_perturbed_leaves_clean_weights():
    model, optimizer = perturbed_pair()
    clean = copied(model.state_dict())
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert_equal(model.state_dict(), clean)
    assert_equal(held_by(model), {name: clean[name] for name in held_by(model)})


def test_modules_do_not_keep_the_optimizer_and_the_optimizer_not_the_modules_alive():
    model, optimizer = perturbed_pair()
    parameters = list(model.parameters())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert optimizer.clean_weight(parameters[0]) is not None


@pytest.mark.parametrize("kept", [False, True], ids=["first_is_gone", "first_is_kept"])
def test_second_optimizer_on_a_model_shows_its_own_clean_weights(kept):
    model, first = pair()
    train(model, first)
    first.eval()
    second = MomentumSAM(model.parameters(), lr=0.01, rho=4.0)
    if not kept:
        del first
        gc.collect()
    train(model, second)
    loss_of(model)
    assert_shows_clean(model, second)


# -- what others do to the model meanwhile -----------------------------------------------------------------------------


@every_precision
def test_loaded_weights_are_shown_at_once(dtype, kwargs):
    model, _ = perturbed_pair(dtype, **kwargs)
    copied(model.state_dict())
    donor = copied(tagger(dtype, seed=1).state_dict())
    model.load_state_dict(donor)
    assert_equal(model.state_dict(), donor)


def test_loading_by_assignment_shows_the_new_tensors():
    model, _ = perturbed_pair()
    donor = copied(tagger(seed=1).state_dict())
    model.load_state_dict(donor, assign=True)
    assert_equal(model.state_dict(), donor)


def test_cast_model_shows_clean_weights_in_its_new_type():
    model, _ = perturbed_pair()
    before = model.state_dict()
    clean = copied(before)
    model.half()
    assert_equal(model.state_dict(), {name: value.half() for name, value in clean.items()})


def test_state_dict_hooks_of_others_see_clean_weights():
    model, _ = perturbed_pair()
    clean, seen = copied(model.state_dict()), {}
    model.register_state_dict_post_hook(lambda module, state, prefix, meta: seen.update(copied(state)))
    model.state_dict()
    assert_equal(seen, clean)


# -- two passes --------------------------------------------------------------------------------------------------------

TWO_PASSES = {
    "backup": (torch.float32, {}),
    "master": (torch.bfloat16, {"master_weights": True}),
    "fish": (torch.float32, {"trainable": 0.3}),
}


def assert_saved_clean_between_perturb_and_step(model, optimizer, before) -> None:
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.perturb()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert_equal(round_trip(model.state_dict()), before)
    optimizer.restore()
    assert_equal(dict(model.named_parameters()), {name: before[name] for name, _ in model.named_parameters()})


@pytest.mark.parametrize(("dtype", "arguments"), TWO_PASSES.values(), ids=TWO_PASSES.keys())
def test_model_saved_between_perturb_and_step_is_the_clean_one(dtype, arguments):
    model = tagger(dtype)
    if "trainable" in arguments:
        arguments = {"trainable": FishMask.random(model, 0.3)}
    optimizer = FSAM(model.named_parameters(), lr=0.01, rho=4.0, **arguments)
    assert_saved_clean_between_perturb_and_step(model, optimizer, copied(model.state_dict()))


def test_model_saved_between_the_passes_of_sam_around_another_optimizer_is_the_clean_one():
    model = tagger()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.01), rho=4.0)
    assert_saved_clean_between_perturb_and_step(model, optimizer, copied(model.state_dict()))
