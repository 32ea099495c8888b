"""BAR and Flat-LoRA in transformers' Trainer: which noise each micro-batch has, and that runs can be resumed."""

import copy

import pytest
import torch
from torch import nn

from fsam_triton import AdamWL2SP, FlatLoRA
from tests.integration.lora import base_bits, llama, lora_layers, loss_of, tokens, trained

pytest.importorskip("peft")
pytest.importorskip("transformers")
import transformers

from fsam_triton.integrations.transformers import FlatLoRACallback, SAMTrainer, create_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [{"input_ids": row, "labels": row} for step in range(16) for row in tokens(step)]


def trainer(model: nn.Module, folder, *, callbacks=(), optimizer=None, cls=None, **options) -> transformers.Trainer:
    defaults = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": [], "seed": 5}
    args = transformers.TrainingArguments(
        folder, use_cpu=True, disable_tqdm=True, **{"save_strategy": "no", **defaults, **options}
    )
    optimizers = (optimizer(model, args) if optimizer else None, None)
    cls = cls or transformers.Trainer
    return cls(model, args, train_dataset=TEXTS, callbacks=list(callbacks), optimizers=optimizers)


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, p), (_, q) in zip(trained(model), trained(other), strict=True):
        assert torch.equal(p, q), name


class Watched(transformers.Trainer):
    """Notes the noise of a layer, as its forward pass has it, at each micro-batch."""

    def training_step(self, model, inputs, *args):
        layer = next(lora_layers(model)).base_layer
        noise = layer(torch.eye(16)).detach() - nn.functional.linear(torch.eye(16), layer.weight).detach()
        vars(self).setdefault("noises", []).append(noise)
        return super().training_step(model, inputs, *args)


def test_noise_is_that_of_each_step_for_all_its_micro_batches_and_gone_after(tmp_path):
    model = llama(torch.float32)
    before, callback = base_bits(model), FlatLoRACallback(sigma=0.5)
    run = trainer(model, tmp_path, callbacks=[callback], cls=Watched, gradient_accumulation_steps=2)
    run.train()
    norms = [float(noise.norm()) for noise in run.noises]
    assert len(norms) == 8
    for first, second in zip(run.noises[::2], run.noises[1::2], strict=True):
        assert torch.equal(first, second)
    # Of half a cosine over four steps.
    assert norms[0] == 0.0
    assert [norm / norms[4] for norm in norms[2::2]] == pytest.approx([0.293, 1.0, 1.707], rel=0.3)
    assert callback.flat is None
    assert all("forward" not in vars(layer.base_layer) for layer in lora_layers(model))
    after = base_bits(model)
    assert all(torch.equal(bits, after[name]) for name, bits in before.items())


def test_training_is_that_of_a_loop_with_flat_lora(tmp_path):
    model, by_hand = llama(torch.float32), llama(torch.float32)
    options = {"optimizer": lambda model, args: AdamWL2SP(trained(model), 1e-2), "lr_scheduler_type": "constant"}
    run = trainer(model, tmp_path, callbacks=[FlatLoRACallback(sigma=0.5)], max_grad_norm=0.0, **options)
    batches = []
    step = run.training_step
    run.training_step = lambda model, inputs, *args: (
        batches.append(inputs["input_ids"].clone()) or step(model, inputs, *args)
    )
    run.train()
    optimizer = AdamWL2SP(trained(by_hand), 1e-2)
    with FlatLoRA(by_hand, optimizer, sigma=0.5, total_steps=4, seed=5):
        for ids in batches:
            optimizer.zero_grad()
            by_hand(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    for (name, p), (_, q) in zip(trained(model), trained(by_hand), strict=True):
        # Trainer divides the loss by the number of tokens itself.
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["flat", "balanced"])
def test_run_that_is_resumed_is_one_that_was_not_interrupted(kind, tmp_path):
    def run(model: nn.Module, folder, **options) -> None:
        if kind == "flat":
            options["callbacks"] = [FlatLoRACallback(sigma=0.5)]
        else:
            options["optimizer"] = lambda model, args: create_optimizer(model, args, AdamWL2SP, balance=1.0)
        checkpoint = options.pop("checkpoint", None)
        trainer(model, folder, save_steps=2, **options).train(resume_from_checkpoint=checkpoint)

    whole = llama(torch.float32)
    run(whole, tmp_path, **{"save_strategy": "steps"})
    resumed = llama(torch.float32)
    run(resumed, tmp_path / "again", checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(whole, resumed)


def test_evaluation_during_training_has_no_noise(tmp_path):
    model = llama(torch.float32)
    seen = []

    class Evaluated(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.eval()
            with torch.no_grad():
                loss = loss_of(model, 3).detach()
            model.train()
            flat.flat.close()
            seen.append((loss, loss_of(model.eval(), 3).detach()))
            control.should_training_stop = True

    flat = FlatLoRACallback(sigma=0.5)
    trainer(model, tmp_path, callbacks=[flat, Evaluated()]).train()
    assert seen[0][0] == seen[0][1]


def test_training_that_fails_leaves_noise_that_close_or_the_next_training_takes_away(tmp_path):
    model = llama(torch.float32)
    callback = FlatLoRACallback(sigma=0.5)
    run = trainer(model, tmp_path, callbacks=[callback])
    step, run.training_step = run.training_step, lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.train()
    run.training_step = step
    run.train()
    assert callback.flat is None
    assert all("forward" not in vars(layer.base_layer) for layer in lora_layers(model))


def test_balanced_optimizer_of_training_arguments_balances_its_pairs(tmp_path):
    model, other = llama(torch.float32), llama(torch.float32)
    for one, balance in ((model, 2.0), (other, 0.0)):
        trainer(
            one,
            tmp_path,
            optimizer=lambda model, args, b=balance: create_optimizer(
                model, args, AdamWL2SP, balance=b, balance_by="weights"
            ),
            weight_decay=0.1,
        ).train()
    before, grown = dict(trained(llama(torch.float32))), dict(trained(other))
    for name, p in trained(model):
        partner = before[name.replace("lora_A", "lora_?").replace("lora_B", "lora_A").replace("lora_?", "lora_B")]
        is_larger = float(before[name].detach().norm()) > float(partner.detach().norm())
        assert (float(p.detach().norm()) < float(grown[name].detach().norm())) == is_larger, name


@pytest.mark.parametrize("options", [{"rho": 0.01}, {"optimizer_cls": "momentum-sam", "rho": 0.01}], ids=str)
def test_mixin_takes_balance_as_one_of_its_optimizers_arguments_and_the_callback_beside_it(options, tmp_path):
    model, callback = llama(torch.float32), FlatLoRACallback()
    before = copy.deepcopy(dict(trained(model)))
    text = ",".join(f"{name}={value}" for name, value in {**options, "balance": 0.5}.items())
    run = trainer(model, tmp_path, callbacks=[callback], cls=SAMTrainer, optim_args=text)
    run.train()
    assert {group["balance"] for group in run.optimizer.param_groups} == {0.5}
    assert all(not torch.equal(p, before[name]) for name, p in trained(model))
