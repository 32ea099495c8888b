"""LoRA adapters of peft, on Llama and GPT-2: BAR, Flat-LoRA and SAM on the adapters against fp64 by hand."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tests.integration import lora
from tests.integration.lora import MODELS, base_bits, llama, loss_of, train, train_with_written_noise, trained

pytest.importorskip("peft")
pytest.importorskip("transformers")

from fsam_triton import FSAM, AdamWL2SP, FlatLoRA, MomentumSAM

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, LR = 50, 0.001
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def assert_close(model: nn.Module, other: nn.Module) -> None:
    """fp64: a few roundings of weights below 1 in each of 50 steps, 2**-53 each, which so small a learning rate does
    not amplify much (at ten times the rate training of GPT-2 itself does, by 1e9)."""
    pairs = list(zip(trained(model), trained(other), strict=True))
    assert pairs
    for (name, p), (_, q) in pairs:
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-12, msg=name)


def assert_same(bits: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert bits.keys() == others.keys()
    for name, tensor in bits.items():
        assert torch.equal(tensor, others[name]), name


def factors(pairs: dict[str, nn.Parameter], by: str, alpha: float) -> dict[str, float]:
    """What BAR multiplies each matrix with (arXiv 2410.14802, algorithms 2 and 3)."""
    out = {}
    for name, a in pairs.items():
        if "lora_A" in name:
            partner = name.replace("lora_A", "lora_B")
            b = pairs[partner]
            of_a, of_b = (float((p.grad if by == "gradients" else p.detach()).norm()) for p in (a, b))
            a_grows = (of_a > of_b) == (by == "gradients")
            out[name], out[partner] = (1 + alpha * LR, 1 - alpha * LR)[:: 1 if a_grows else -1]
    return out


@every_model
@pytest.mark.parametrize("by", ["gradients", "weights"])
def test_bar_is_the_papers_algorithm_over_torchs_adamw(make, by):
    model = make()
    by_hand = copy.deepcopy(model)
    start = copy.deepcopy(dict(trained(model)))
    train(model, AdamWL2SP(trained(model), LR, weight_decay=0.1, balance=2.0, balance_by=by), STEPS)
    pairs = dict(trained(by_hand))
    optimizer = torch.optim.AdamW(pairs.values(), LR, weight_decay=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(by_hand, step).backward()
        with torch.no_grad():
            for name, factor in factors(pairs, by, 2.0).items():
                pairs[name] *= factor
        optimizer.step()
    assert_close(model, by_hand)
    assert all(not torch.equal(p, start[name]) for name, p in trained(model))


@every_model
def test_flat_lora_is_the_published_code_with_weights_that_are_put_back(make):
    model = make()
    by_hand, before = copy.deepcopy(model), base_bits(model)
    optimizer = AdamWL2SP(trained(model), LR)
    with FlatLoRA(model, optimizer, sigma=0.5, total_steps=STEPS, seed=3):
        train(model, optimizer, STEPS)
    train_with_written_noise(by_hand, torch.optim.AdamW([p for _, p in trained(by_hand)], LR), STEPS, sigma=0.5, seed=3)
    assert_close(model, by_hand)
    assert_same(base_bits(model), before)
    plain = make()
    train(plain, AdamWL2SP(trained(plain), LR), STEPS)
    pairs = zip(trained(model), trained(plain), strict=True)
    assert all(float((p - q).detach().abs().max()) > 1e-6 for (_, p), (_, q) in pairs)


@every_model
@pytest.mark.parametrize("kind", [FSAM, MomentumSAM], ids=lambda kind: kind.__name__)
def test_sam_of_the_adapters_alone_is_sam_by_hand(make, kind):
    model = make()
    by_hand, before = copy.deepcopy(model), base_bits(model)
    optimizer = kind(trained(model), lr=LR, rho=0.05)
    for step in range(STEPS):
        if kind is FSAM:
            optimizer.step(lambda step=step: closure(model, optimizer, step))
        else:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    params = [p for _, p in trained(by_hand)]
    base = torch.optim.AdamW(params, LR)
    for step in range(STEPS):
        if kind is FSAM:
            base.zero_grad()
            loss_of(by_hand, step).backward()
            directions = [p.grad.clone() for p in params]
        else:
            directions = [-base.state[p]["exp_avg"] if base.state[p] else torch.zeros_like(p) for p in params]
        norm = math.sqrt(sum(float(d.square().sum()) for d in directions)) + 1e-12
        clean = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, direction in zip(params, directions, strict=True):
                p += 0.05 / norm * direction
        base.zero_grad()
        loss_of(by_hand, step).backward()
        with torch.no_grad():
            for p, old in zip(params, clean, strict=True):
                p.copy_(old)
        base.step()
    assert_close(model, by_hand)
    assert_same(base_bits(model), before)


def closure(model: nn.Module, optimizer, step: int) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model, step)
    loss.backward()
    return loss


# -- resume and merge --------------------------------------------------------------------------------------------------


KINDS = {
    "sam": lambda model: FSAM(trained(model), lr=LR, rho=0.05),
    "momentum-sam": lambda model: MomentumSAM(trained(model), lr=LR, rho=0.05),
    "bar": lambda model: AdamWL2SP(trained(model), LR, balance=1.0),
    "flat": lambda model: AdamWL2SP(trained(model), LR),
}


def run(kind: str, model: nn.Module, optimizer, steps: int, start: int = 0) -> None:
    if kind == "sam":
        for step in range(start, start + steps):
            optimizer.step(lambda step=step: closure(model, optimizer, step))
    elif kind == "flat":
        with FlatLoRA(model, optimizer, sigma=0.3, total_steps=6, step=start):
            train(model, optimizer, steps, start)
    else:
        train(model, optimizer, steps, start)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_are_saved_and_loaded_are_trained_as_if_nothing_had_been(kind, tmp_path):
    import peft

    whole = llama(torch.float32)
    optimizer = KINDS[kind](whole)
    run(kind, whole, optimizer, 3)
    whole.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    run(kind, whole, optimizer, 3, start=3)

    base = llama(torch.float32).unload()
    resumed = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    other = KINDS[kind](resumed)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    run(kind, resumed, other, 3, start=3)
    for (name, p), (_, q) in zip(trained(whole), trained(resumed), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_computes_what_the_trained_one_does_in_eval_mode(kind):
    model = llama()
    optimizer = KINDS[kind](model)
    run(kind, model, optimizer, 3)
    model.eval()
    before = model(input_ids=lora.tokens(0)).logits
    if isinstance(optimizer, MomentumSAM):
        optimizer.eval()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=lora.tokens(0)).logits, before, rtol=1e-10, atol=1e-10)
