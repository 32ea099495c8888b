"""FlatLoRA: when there is noise and which, that bases stay to the bit, and what is left in a model."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import AdamWL2SP, ArgumentError, FlatLoRA
from fsam_triton.kernels import reference
from tests.integration import lora
from tests.integration.lora import adapted, base_bits, gpt, llama, lora_layers, loss_of, tokens, train, trained

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


def on(model: nn.Module, **options) -> FlatLoRA:
    return FlatLoRA(model, **{"sigma": 0.5, "total_steps": None, **options})


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=tokens(0)).logits.detach()


def differs(model: nn.Module, other: Tensor) -> bool:
    return not torch.equal(logits(model), other)


# -- when --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt])
def test_noise_is_in_training_alone(make):
    model = make()
    plain = logits(model)
    with on(model):
        assert differs(model, plain)
        with torch.no_grad():
            assert not differs(model, plain)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(model.eval()))
        assert not differs(model.eval(), plain)
        assert differs(model.train(), plain)
    assert not differs(model, plain)


def test_merged_adapters_have_no_noise():
    model = llama()
    plain = logits(model)
    with on(model):
        model.merge_adapter()
        torch.testing.assert_close(logits(model), plain)
        model.unmerge_adapter()
        assert float((logits(model) - plain).abs().max()) > 1e-3


def test_strength_rises_along_half_a_cosine():
    flat = on(llama(), sigma=0.2, total_steps=4)
    found = []
    for _ in range(6):
        found.append(flat.strength)
        flat.advance()
    half = 0.2 * (1 - 2**-0.5) / 2
    assert found == pytest.approx([0.0, half, 0.1, 0.2 - half, 0.2, 0.2], abs=1e-15)
    flat.close()


def test_noise_is_the_same_within_a_step_and_another_one_in_the_next():
    model = llama()
    optimizer = AdamWL2SP(trained(model), lr=0.0)
    with on(model, optimizer=optimizer):
        first = logits(model)
        assert not differs(model, first)
        loss_of(model, 0).backward()
        assert not differs(model, first)
        optimizer.step()
        assert differs(model, first)


def test_seed_and_step_make_the_noise():
    model = llama()
    with on(model, seed=1, step=7):
        first = logits(model)
    with on(model, seed=1) as flat:
        assert differs(model, first)
        flat.step = 7
        assert not differs(model, first)
    with on(model, seed=2, step=7):
        assert differs(model, first)


def test_layers_of_the_same_weights_have_noise_of_their_own():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].load_state_dict(model[0].state_dict())
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    with on(model):
        first, second = (layer.base_layer(torch.eye(8)) for layer in lora_layers(model))
    assert not torch.equal(first, second)


def test_checkpointed_layers_have_the_gradients_of_others():
    model = llama(torch.float32)
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    other.enable_input_require_grads()
    for one in (model, other):
        with on(one):
            loss_of(one, 0).backward()
    for (name, p), (_, q) in zip(trained(model), trained(other), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_gradient_is_that_of_the_noisy_weight():
    """Of a layer with a bias that is trained, by autograd through a weight that is written out."""
    layer = nn.Linear(6, 5).double()
    model = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(r=2, target_modules=["0"], bias="all"))
    base = next(lora_layers(model)).base_layer
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    with on(model):
        noisy = base(torch.eye(6, dtype=torch.float64)).detach() - base.bias.detach()
        base(x).square().sum().backward()
    found = x.grad, base.bias.grad
    x.grad = base.bias.grad = None
    nn.functional.linear(x, noisy.T, base.bias).square().sum().backward()
    torch.testing.assert_close(found, (x.grad, base.bias.grad))


# -- types of bases ----------------------------------------------------------------------------------------------------


def noisy(lora_layer: nn.Module, dense: Tensor, flat: FlatLoRA, number: int, dtype: torch.dtype) -> Tensor:
    """W + noise by the reference, with the norms of the merged weight as it is."""
    delta = (lora_layer.lora_B["default"].weight @ lora_layer.lora_A["default"].weight).detach()
    merged = dense.double() + lora_layer.scaling["default"] * delta.double()
    scale = (flat.strength / dense.shape[1] ** 0.5 * merged.norm(dim=1)).to(torch.float32)
    out = torch.empty(dense.shape, dtype=dtype)
    reference.add_noise_(out, dense, scale, flat.key(number), False)
    return out


def assert_layers_are_noisy(model: nn.Module, flat: FlatLoRA, dtype: torch.dtype, dense=lambda base: base.weight):
    """Norms are those of sums that are not made: W A^T and A in the weight's type have an error u each, where u is its
    rounding, so a norm one of 2 u at most while B A is the smaller part."""
    for number, layer in enumerate(lora_layers(model)):
        base = layer.base_layer
        w = dense(base).detach()
        expected = noisy(layer, w, flat, number, dtype).float()
        actual = base(torch.eye(w.shape[1], dtype=dtype)).detach().T.float()
        # The result may be rounded the other way, and noise is of at most 4.1 deviations.
        u, deviation = torch.finfo(dtype).eps, flat.strength * float(w.float().norm(dim=1).max()) / w.shape[1] ** 0.5
        torch.testing.assert_close(actual, expected, rtol=u, atol=4.1 * deviation * 2 * u)
        assert float((expected - w.float()).std()) > 0.5 * deviation


def test_base_of_bf16_is_noisy_and_stays_to_the_bit():
    model = llama(torch.bfloat16)
    before = base_bits(model)
    optimizer = AdamWL2SP(trained(model), 1e-2)
    assert {p.dtype for _, p in trained(model)} == {torch.float32}
    with on(model, optimizer=optimizer, total_steps=5) as flat:
        train(model, optimizer, 5)
        assert_layers_are_noisy(model, flat, torch.bfloat16)
    after = base_bits(model)
    assert all(torch.equal(bits, after[name]) for name, bits in before.items())


def four_bit(**options) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = llama(torch.float32, hidden_size=64, intermediate_size=64).unload()
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                layer = bitsandbytes.nn.Linear4bit(child.in_features, child.out_features, bias=False, **options)
                layer.weight = bitsandbytes.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                setattr(parent, name, layer.to("cpu"))
    return adapted(model, ["q_proj", "v_proj", "gate_proj", "down_proj"])


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_base_of_4_bits_is_noisy_and_stays_to_the_bit(compute_dtype):
    from bitsandbytes.functional import dequantize_4bit

    model = four_bit(compute_dtype=compute_dtype, quant_type="nf4")
    before = base_bits(model)
    assert sum(bits.dtype == torch.uint8 for bits in before.values()) == 14
    plain = logits(model)
    optimizer = AdamWL2SP(trained(model), 1e-2)
    with on(model, optimizer=optimizer, total_steps=4) as flat:
        train(model, optimizer, 4)
        assert_layers_are_noisy(
            model, flat, compute_dtype, lambda base: dequantize_4bit(base.weight.data, base.weight.quant_state)
        )
    after = base_bits(model)
    assert all(torch.equal(bits, after[name]) for name, bits in before.items())
    assert differs(model, plain)


@pytest.mark.parametrize("make", [llama, gpt])
def test_autocast_takes_the_noisy_weight_in_its_type(make):
    model = make(torch.float32)
    with on(model), torch.autocast("cpu", torch.bfloat16):
        base = next(lora_layers(model)).base_layer
        assert base(torch.ones(1, 16)).dtype == torch.bfloat16
        loss = loss_of(model, 0)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for _, p in trained(model))


# -- what is left ------------------------------------------------------------------------------------------------------


def attributes(model: nn.Module) -> list[set[str]]:
    return [set(vars(module)) for module in model.modules()]


def test_nothing_is_left_in_the_model_nor_in_the_optimizer():
    model = llama()
    optimizer = torch.optim.AdamW([p for _, p in trained(model)])
    before, hooks = attributes(model), len(optimizer._optimizer_step_post_hooks)
    state = copy.deepcopy(model.state_dict())
    flat = on(model, optimizer=optimizer)
    loss_of(model, 0).backward()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    flat.close()
    flat.close()
    assert attributes(model) == before
    assert len(optimizer._optimizer_step_post_hooks) == hooks


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, pickled])
def test_copy_of_a_model_in_training_has_no_noise_and_can_be_given_its_own(again):
    model = llama()
    plain = logits(model)
    with on(model):
        other = again(model)
        assert not differs(other, plain)
        with on(other):
            assert differs(other, plain)
        assert not differs(other, plain)
        assert differs(model, plain)


def test_model_that_is_merged_in_training_has_no_noise():
    model = llama()
    plain = logits(model)
    with on(model):
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tokens(0)).logits, plain)


def test_weight_that_is_written_between_forward_and_backward_is_an_error():
    model = llama()
    with on(model):
        loss = loss_of(model, 0)
        with torch.no_grad():
            list(lora_layers(model))[-1].base_layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="written between"):
            loss.backward()


def test_norms_follow_a_base_that_is_replaced_between_steps():
    model = llama()
    with on(model) as flat:
        logits(model)
        for layer in lora_layers(model):
            layer.base_layer.weight.data = torch.ones_like(layer.base_layer.weight)
        flat.advance()
        layer = next(lora_layers(model))
        found = layer.base_layer(torch.eye(16, dtype=torch.float64)).detach().T
    z = lora.normals(found.numel(), lora.key(0, 1, 0)).view_as(found)
    delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    scale = 0.5 / 4 * (1 + delta.detach()).norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, 1 + scale * z)


# -- errors ------------------------------------------------------------------------------------------------------------


def dora() -> nn.Module:
    return adapted(llama().unload(), ["q_proj"], use_dora=True)


def with_another() -> nn.Module:
    model = llama()
    on(model)
    return model


def hooked() -> nn.Module:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = llama()
    add_hook_to_module(next(lora_layers(model)).base_layer, ModelHook())
    return model


def trainable() -> nn.Module:
    model = llama()
    next(lora_layers(model)).base_layer.weight.requires_grad_(True)
    return model


def reentrant() -> nn.Module:
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return model


FIRST = "layer 'base_model.model.model.layers.0.self_attn.q_proj'"
WRONG = {
    "no adapters": ("model", lambda: llama().unload(), {}),
    "dora": (FIRST, dora, {}),
    "another one": (FIRST, with_another, {}),
    "hooks": (FIRST, hooked, {}),
    "trained base": (FIRST, trainable, {}),
    "re-entrant": ("use_reentrant", reentrant, {}),
    "sigma": ("sigma", llama, {"sigma": -1.0}),
    "no steps": ("total_steps", llama, {"total_steps": 0}),
    "step": ("step", llama, {"step": -1}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_have_noise_is_refused_and_left_alone(wrong):
    name, make, options = WRONG[wrong]
    model = make()
    before = attributes(model)
    with pytest.raises(ArgumentError) as error:
        on(model, **options)
    assert error.value.name == name
    assert attributes(model) == before


def test_layer_of_8_bits_is_refused():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64)), peft.LoraConfig(r=2, target_modules=["0"]))
    layer = next(lora_layers(model))
    layer.base_layer = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    with pytest.raises(ArgumentError, match="must be a dense Linear"):
        on(model)
