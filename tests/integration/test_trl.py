"""TRL's trainers with `SharpnessAwareMixin`: what both passes see, and what is counted."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.integration.tiny import copied

pytest.importorskip("trl")
import datasets
import peft
import tokenizers
import transformers
import trl

from fsam_triton.integrations.transformers import SharpnessAwareMixin

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["<pad>", "</s>", *"abcdefghijklmn"]
PROMPTS = ["a b c", "d e", "b f g", "c d a", "e f", "g a b"] * 2
GOOD, BAD = [f" {p[0]} h" for p in PROMPTS], [" k l m"] * len(PROMPTS)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", padding_side="left"
    )


def loaded(cls: type, folder: Path, **config) -> transformers.PreTrainedModel:
    """A model with a folder, from which TRL loads a reference."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), max_position_embeddings=32, pad_token_id=0, eos_token_id=1, **sizes, **config
    )
    cls(config).save_pretrained(folder)
    return cls.from_pretrained(folder)


def reward(completions: list[str], **_) -> list[float]:
    return [float(len(set(text))) for text in completions]


PAIRS = {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}
TEXTS = {"text": [p + g for p, g in zip(PROMPTS, GOOD, strict=True)]}
JUDGED = {"prompt": PROMPTS, "completion": GOOD, "label": [True, False] * (len(PROMPTS) // 2)}
ONLINE = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
# Trainer, its arguments' class, its data, more of its arguments, and what it is given besides.
KINDS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, TEXTS, {}, {}),
    "lora": (
        trl.SFTTrainer,
        trl.SFTConfig,
        TEXTS,
        {},
        {"peft_config": peft.LoraConfig(r=2, target_modules="all-linear")},
    ),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, PAIRS, {}, {}),
    "reward": (trl.RewardTrainer, trl.RewardConfig, PAIRS, {}, {}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, JUDGED, {}, {}),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, {"prompt": PROMPTS}, ONLINE, {"reward_funcs": reward}),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, {"prompt": PROMPTS}, ONLINE, {"reward_funcs": reward}),
    "grpo-reused": (
        trl.GRPOTrainer,
        trl.GRPOConfig,
        {"prompt": PROMPTS},
        {**ONLINE, "num_iterations": 2, "steps_per_generation": 4},
        {"reward_funcs": reward},
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, folder: Path, *, bases: tuple[type, ...] = (), given=(), **arguments):
    """A trainer of this kind, with `bases` before it."""
    trainer, config, data, own, more = KINDS[kind]
    arguments = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        **own,
        **arguments,
    }
    args = config(
        str(folder), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no", **arguments
    )
    is_reward = kind == "reward"
    cls = transformers.LlamaForSequenceClassification if is_reward else transformers.LlamaForCausalLM
    return type(trainer.__name__, (*bases, trainer), {})(
        model=loaded(cls, folder / "model", **({"num_labels": 1} if is_reward else {})),
        args=args,
        train_dataset=datasets.Dataset.from_dict(data),
        processing_class=tokenizer(),
        **more,
        **dict(given),
    )


class Watched(SharpnessAwareMixin):
    """Notes what the loss is computed of, and at which weights."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        tensors = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
        self.seen = [*getattr(self, "seen", []), (self._sam.perturbed, tensors)]
        return super().compute_loss(model, inputs, *args, **kwargs)


def sam(kind: str, folder: Path, rho: float = 0.1, **arguments):
    trainer = make(kind, folder, bases=(Watched,), given={"optimizer_kwargs": {"rho": rho}}, **arguments)
    trainer.train()
    return trainer


@pytest.fixture(autouse=True, scope="module")
def _no_telemetry():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl.trainer.base_trainer._BaseTrainer, "_send_telemetry", lambda self: None)
        yield


def plain(kind: str, folder: Path, **arguments):
    trainer = make(kind, folder, **arguments)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def unmoved(tmp_path_factory):
    """Ours and TRL's own trainer, at a learning rate of 0: they see the same weights, step after step."""
    folder = tmp_path_factory.mktemp("unmoved")
    return functools.cache(lambda kind: [train(kind, folder, learning_rate=0.0) for train in (sam, plain)])


@every_kind
def test_second_pass_sees_what_the_first_one_saw(kind, unmoved):
    """Two micro-batches a step; online, the completions of the first pass."""
    ours, _ = unmoved(kind)
    assert [perturbed for perturbed, _ in ours.seen] == [False, False, True, True] * 3
    for i in (0, 1, 4, 5, 8, 9):
        (_, first), (_, second) = ours.seen[i], ours.seen[i + 2]
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def logged(trainer) -> list[dict]:
    """Without times, and the norm of the gradient, which is the second one's."""
    left_out = ("time", "runtime", "per_second", "grad_norm")
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in left_out)}
        for entry in trainer.state.log_history
    ]


@every_kind
def test_metrics_and_counts_are_those_of_the_plain_trainer(kind, unmoved):
    ours, theirs = unmoved(kind)
    assert len(logged(ours)) == 4
    assert logged(ours) == [pytest.approx(entry, rel=1e-5, nan_ok=True) for entry in logged(theirs)]


@pytest.mark.parametrize("kind", ["sft", "lora", "dpo", "grpo"])
def test_steps_without_a_radius_are_the_plain_trainers(kind, tmp_path):
    """Both passes are at the weights then; AdamW in one pass rounds in another order."""
    ours, theirs = sam(kind, tmp_path, rho=0.0, adam_epsilon=1e-2), plain(kind, tmp_path, adam_epsilon=1e-2)
    expected = copied(theirs.model)
    for name, weight in copied(ours.model).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)
