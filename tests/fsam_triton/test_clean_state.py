"""state_dict() of models whose parameters MomentumSAM keeps perturbed: clean at any time, however a model is built."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from fsam_triton import FSAM, FishMask, MomentumSAM
from tests.training import round_trip

pytestmark = pytest.mark.usefixtures("one_thread")

PRECISIONS = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "bf16_master": (torch.bfloat16, {"master_weights": True}),
}
every_precision = pytest.mark.parametrize(("dtype", "kwargs"), PRECISIONS.values(), ids=PRECISIONS.keys())


class Tagger(nn.Module):
    """Nested, with tied weights, a parameter of its own, a buffer, and a module that is never called itself."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 16)
        self.block = nn.ModuleDict(
            {"attention": nn.MultiheadAttention(16, 2), "norms": nn.ModuleList([nn.LayerNorm(16)])}
        )
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(1))
        self.head = nn.Linear(16, 8)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen += 1
        x = self.embed(tokens)
        x = x + self.block["attention"](x, x, x, need_weights=False)[0]
        return self.head(self.block["norms"][0](x)) * self.scale


TOKENS = torch.arange(8)[:, None]


def tagger(dtype=torch.float32, seed: int = 0) -> Tagger:
    torch.manual_seed(seed)
    return Tagger().to(dtype)


def pair(dtype=torch.float32, **kwargs) -> tuple[Tagger, MomentumSAM]:
    model = tagger(dtype)
    return model, MomentumSAM(model.parameters(), lr=0.01, rho=4.0, **kwargs)


def train(model: nn.Module, optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(TOKENS)[:, 0].float(), TOKENS[:, 0]).backward()
        optimizer.step()


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def assert_equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name]), name


def assert_shows_clean(model: nn.Module, optimizer: MomentumSAM) -> None:
    """What state_dict() shows in train mode is what the parameters hold in eval mode, and not what they hold now."""
    shown = copied(model.state_dict())
    for name, parameter in model.named_parameters():
        # The perturbation of a single weight may be below its last digit.
        assert parameter.numel() == 1 or not torch.equal(shown[name], parameter), f"{name} is not perturbed"
    optimizer.eval()
    assert all(torch.equal(shown[name], parameter) for name, parameter in held_by(model).items())
    assert_equal(model.state_dict(), shown)
    optimizer.train()


def held_by(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


@every_precision
def test_state_dict_shows_clean_weights_between_steps_and_between_passes(dtype, kwargs):
    model, optimizer = pair(dtype, **kwargs)
    for _ in range(3):
        train(model, optimizer)
        assert_shows_clean(model, optimizer)
    loss = model(TOKENS).float().sum()
    assert_shows_clean(model, optimizer)
    assert torch.isfinite(loss)


def test_buffers_and_order_of_the_state_dict_are_the_models():
    (model, optimizer), twin = pair(), tagger()
    train(model, optimizer)
    assert list(model.state_dict()) == list(twin.state_dict())
    assert model.state_dict()["seen"] == 2
    assert model.state_dict()._metadata == twin.state_dict()._metadata


def test_state_dict_of_a_part_and_with_a_prefix_shows_clean_weights():
    model, optimizer = pair()
    train(model, optimizer)
    clean = copied(model.state_dict())
    part = model.block["attention"].out_proj.state_dict(prefix="block.attention.out_proj.")
    assert part
    assert all(torch.equal(value, clean[name]) for name, value in part.items())
    own = {}
    model.embed.state_dict(destination=own)
    assert torch.equal(own["weight"], clean["embed.weight"])


def test_state_dict_with_keep_vars_has_the_parameters_themselves():
    model, optimizer = pair()
    train(model, optimizer)
    state = model.state_dict(keep_vars=True)
    assert all(state[name] is parameter for name, parameter in model.named_parameters(remove_duplicate=False))


def test_state_dict_has_no_gradients_and_the_parameters_shapes_and_strides():
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    optimizer = MomentumSAM(model.parameters())
    model(torch.ones(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        parameter = getattr(model, name)
        assert not value.requires_grad
        assert (value.shape, value.stride()) == (parameter.shape, parameter.stride())


@every_precision
def test_tied_weights_are_saved_once_and_stay_tied(dtype, kwargs):
    model, optimizer = pair(dtype, **kwargs)
    train(model, optimizer)
    for state in (model.state_dict(), round_trip(model.state_dict())):
        assert state["head.weight"].untyped_storage()._cdata == state["embed.weight"].untyped_storage()._cdata


def test_saving_one_module_does_not_save_the_whole_model():
    model = nn.ModuleDict({"small": nn.Linear(4, 4), "large": nn.Linear(512, 512)})
    optimizer = MomentumSAM(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(model["small"].state_dict(), buffer)
    # 80 bytes of weights; the file's own records take a few KB, the other module would take 1 MB.
    assert buffer.getbuffer().nbytes < 16384


@every_precision
def test_safetensors_saves_clean_weights_with_ties(dtype, kwargs, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, optimizer = pair(dtype, **kwargs)
    train(model, optimizer)
    safetensors.save_model(model, tmp_path / "model.safetensors")
    other = tagger(dtype, seed=1)
    safetensors.load_model(other, tmp_path / "model.safetensors")
    optimizer.eval()
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
    model.save_pretrained(tmp_path)
    held = copied(dict(model.named_parameters()))
    optimizer.eval()
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    assert_equal(loaded.state_dict(), model.state_dict())
    assert not torch.equal(held["bert.embeddings.word_embeddings.weight"], loaded.get_input_embeddings().weight)


def test_parts_that_are_called_one_by_one_and_late_are_found():
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    optimizer = MomentumSAM(model.parameters(), lr=0.01, rho=4.0)
    for name in ("first", "first", "second", "second"):
        optimizer.zero_grad()
        model[name](torch.ones(4)).sum().backward()
        optimizer.step()
    assert_shows_clean(model, optimizer)


def test_model_that_is_never_called_shows_clean_weights():
    model, optimizer = pair()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert_shows_clean(model, optimizer)


def test_model_that_is_resumed_and_saved_without_a_step_shows_clean_weights():
    """A script that starts again after its last step: it loads, finds nothing to do, and saves."""
    model, optimizer = pair()
    train(model, optimizer)
    saved = round_trip({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other = tagger(seed=1)
    resumed = MomentumSAM(other.parameters())
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.perturbed
    assert_equal(other.state_dict(), saved["model"])


def test_modules_made_or_wrapped_after_the_optimizer_show_clean_weights():
    weight = nn.Parameter(torch.eye(4))
    optimizer = MomentumSAM([weight], lr=0.01, rho=4.0)
    model = nn.Linear(4, 4, bias=False)
    model.weight = weight
    wrapped = nn.Sequential(model)
    wrapped(torch.ones(4)).sum().backward()
    optimizer.step()
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
    assert_shows_clean(model, optimizer)


def test_parameters_the_optimizer_was_not_given_are_shown_as_they_are():
    model = tagger()
    optimizer = MomentumSAM([model.head.bias], lr=0.01, rho=4.0)
    train(model, optimizer)
    state = model.state_dict()
    assert not torch.equal(state["head.bias"], model.head.bias)
    assert all(torch.equal(state[n], p) for n, p in model.named_parameters() if n != "head.bias")


def test_parameters_without_modules_train():
    weight = nn.Parameter(torch.ones(4))
    optimizer = MomentumSAM([weight], lr=0.01, rho=4.0)
    for _ in range(2):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    clean = optimizer.clean_weight(weight).clone()
    assert not torch.equal(weight, clean)
    optimizer.eval()
    assert optimizer.clean_weight(weight) is None
    assert torch.equal(weight, clean)


def test_no_hook_on_forward_passes_is_left_behind():
    hooks = (torch_modules._global_forward_pre_hooks, torch_modules._global_forward_hooks)
    before = [len(h) for h in hooks]
    model, optimizer = pair()
    train(model, optimizer)
    assert [len(h) for h in hooks] == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def compiled_by_wrapper(model):
    return torch.compile(model, backend="eager", fullgraph=True)


def compiled_in_a_function(model):
    return torch.compile(lambda tokens: model(tokens), backend="eager", fullgraph=True)


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [compiled_by_wrapper, compiled_in_a_function, compiled_in_place])
def test_compiled_model_trains_without_warnings_and_shows_clean_weights(compiled):
    torch._dynamo.reset()
    model, optimizer = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(compiled(model), optimizer)
    assert_shows_clean(model, optimizer)


def test_state_dict_of_the_compiled_wrapper_shows_clean_weights():
    model, optimizer = pair()
    wrapper = torch.compile(model, backend="eager")
    train(wrapper, optimizer)
    shown = copied(wrapper.state_dict())
    optimizer.eval()
    assert_equal({f"_orig_mod.{name}": value for name, value in model.state_dict().items()}, shown)


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copy_of_the_model_alone_has_nothing_to_do_with_the_optimizer(duplicate):
    model, optimizer = pair()
    train(model, optimizer)
    optimizer.eval()
    twin = duplicate(model)
    assert_equal(twin.state_dict(), model.state_dict())
    held = copied(twin.state_dict())
    optimizer.train()
    train(model, optimizer)
    assert_equal(twin.state_dict(), held)
    again = MomentumSAM(twin.parameters(), lr=0.01, rho=4.0)
    train(twin, again)
    assert_shows_clean(twin, again)


def test_copy_of_the_model_in_train_mode_has_the_perturbed_weights():
    """As documented: a copy reads the parameters. It must not show the original's clean weights as its own."""
    model, optimizer = pair()
    train(model, optimizer)
    twin = copy.deepcopy(model)
    assert_equal({name: value for name, value in twin.state_dict().items() if name != "seen"}, held_by(model))
    assert_shows_clean(model, optimizer)


def test_optimizer_that_is_gone_leaves_a_model_that_shows_its_parameters():
    model, optimizer = pair()
    train(model, optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in held_by(model).items())


def test_modules_do_not_keep_the_optimizer_and_the_optimizer_not_the_modules_alive():
    model, optimizer = pair()
    train(model, optimizer)
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
    assert_equal({n: v for n, v in model.state_dict().items() if n != "seen"}, held_by(model))
    train(model, second)
    assert_shows_clean(model, second)


def test_optimizer_that_was_left_in_train_mode_does_not_speak_for_its_successor():
    model, first = pair()
    train(model, first)
    second = MomentumSAM(model.parameters(), lr=0.01, rho=4.0)
    assert_equal({n: v for n, v in model.state_dict().items() if n != "seen"}, held_by(model))
    train(model, second)
    assert_shows_clean(model, second)
    held = copied(held_by(model))
    first.eval()
    first.train()
    assert_equal(held_by(model), held)
    assert_shows_clean(model, second)


@every_precision
def test_loaded_weights_are_shown_at_once(dtype, kwargs):
    model, optimizer = pair(dtype, **kwargs)
    train(model, optimizer)
    copied(model.state_dict())
    donor = copied(tagger(dtype, seed=1).state_dict())
    model.load_state_dict(donor)
    assert_equal(model.state_dict(), donor)


def test_loading_by_assignment_shows_the_new_tensors():
    model, optimizer = pair()
    train(model, optimizer)
    donor = copied(tagger(seed=1).state_dict())
    model.load_state_dict(donor, assign=True)
    assert_equal(model.state_dict(), donor)


def test_cast_model_shows_clean_weights_in_its_new_type():
    model, optimizer = pair()
    train(model, optimizer)
    clean = copied(model.state_dict())
    model.half()
    assert_equal(model.state_dict(), {name: value.half() for name, value in clean.items()})


def test_state_dict_hooks_of_others_see_clean_weights():
    model, optimizer = pair()
    train(model, optimizer)
    clean, seen = copied(model.state_dict()), {}
    model.register_state_dict_post_hook(lambda module, state, prefix, meta: seen.update(copied(state)))
    model.state_dict()
    assert_equal(seen, clean)


@pytest.mark.parametrize(
    "arguments", [{}, {"master_weights": True}, {"trainable": 0.3}], ids=["backup", "master", "fish"]
)
def test_model_saved_between_perturb_and_step_is_the_clean_one(arguments):
    model = tagger().to(torch.bfloat16 if "master_weights" in arguments else torch.float32)
    if "trainable" in arguments:
        arguments = {"trainable": FishMask.random(model, 0.3)}
    optimizer = FSAM(model.named_parameters(), lr=0.01, rho=4.0, **arguments)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.perturb()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert_equal(round_trip(model.state_dict()), before)
    optimizer.restore()
    assert_equal(dict(model.named_parameters()), {name: before[name] for name, _ in model.named_parameters()})
