"""Tiny models with LoRA adapters of peft, data for them, and Flat-LoRA as its paper's code has it, in fp64."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

VOCABULARY, LENGTH = 32, 8


def llama(dtype: torch.dtype = torch.float64, **config) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": LENGTH, "vocab_size": VOCABULARY, **config}
    tokens = {"bos_token_id": 0, "eos_token_id": 1}
    return adapted(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **tokens)).to(dtype), "all-linear")


def gpt(dtype: torch.dtype = torch.float64) -> nn.Module:
    """GPT-2, whose linear layers are Conv1D, with weights the other way round."""
    import transformers

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": LENGTH, "vocab_size": VOCABULARY}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 1}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **off)).to(dtype)
    return adapted(model, ["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)


MODELS = {"llama": llama, "gpt": gpt}


def adapted(model: nn.Module, modules: str | list[str], **config) -> nn.Module:
    """With adapters that are not those of the beginning, where B is zero."""
    import peft

    options = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": modules, **config}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model.train()


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def base_bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything that is not trained, buffers included."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t.detach().clone() for name, t in (*frozen.items(), *model.named_buffers())}


def tokens(step: int) -> Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int) -> Tensor:
    return model(input_ids=tokens(step), labels=tokens(step)).loss


def train(model: nn.Module, optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


# -- by hand -----------------------------------------------------------------------------------------------------------


def _word(x: int) -> int:
    return x % 2**32


def key(number: int, step: int, seed: int) -> int:
    """The hash of `spec`, in Python's integers."""
    x = _word(step * 0x85EBCA6B + number * 0xC2B2AE35 + _word(seed * 0x9E3779B1 + 0x2B992DDF))
    for factor in (0x7FEB352D, 0x846CA68B):
        x = _word((x ^ x >> 15) * factor)
    return x ^ x >> 16


def normals(n: int, key: int) -> Tensor:
    x = (np.arange(n, dtype=np.uint64) * 0x9E3779B1 + key) % 2**32
    for factor in (0x2C1B3C6D, 0x7FEB352D):
        x = (x ^ x >> np.uint64(15)) * factor % 2**32
    t = sum((x >> np.uint64(8 * i)) % 256 for i in range(4)).astype(np.float64) - 510
    return torch.from_numpy(0.006421040743589401 * t + 5.773954203647236e-09 * t**3)


def lora_layers(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer"))


def noises(model: nn.Module, step: int, total: int, sigma: float, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each base weight with its noise: equation 7 of arXiv 2409.14396, with the published ramp."""
    strength = sigma * 0.5 * (1 - math.cos(step / total * math.pi))
    for number, layer in enumerate(lora_layers(model)):
        w = layer.base_layer.weight
        delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        z = normals(w.numel(), key(number, step, seed)).view(w.shape)
        merged = w.detach() + (delta.T if layer.fan_in_fan_out else delta).detach()
        axis = 0 if layer.fan_in_fan_out else 1
        scale = strength / math.sqrt(w.shape[axis]) * merged.norm(dim=axis, keepdim=True)
        yield w, scale * z


def train_with_written_noise(model: nn.Module, optimizer, steps: int, sigma: float, seed: int) -> None:
    """As the paper's code: noise is added to the weights before each step; but they are put back from copies."""
    for step in range(steps):
        kept = []
        with torch.no_grad():
            for w, noise in list(noises(model, step, steps, sigma, seed)):
                kept.append((w, w.clone()))
                w += noise
        optimizer.zero_grad()
        loss_of(model, step).backward()
        with torch.no_grad():
            for w, clean in kept:
                w.copy_(clean)
        optimizer.step()
