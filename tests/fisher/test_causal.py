"""The Fisher information of causal language models: a sequence is a sample."""

import pytest
import torch
import transformers
from torch import Tensor, nn

from fsam_triton import ArgumentError, FishMask, causal_lm_loss
from tests.fisher.cases import assert_equal_but_for_rounding, by_loop, estimate, made

pytestmark = pytest.mark.usefixtures("one_thread")


def language_model() -> nn.Module:
    """Its output layer is its embedding."""
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def texts(lengths: list[int], prompt: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """A padded batch as transformers' collators make it: labels are -100 in padding and in prompts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 30, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    labels = torch.where(mask, ids, -100)
    labels[:, :prompt] = -100
    return {"input_ids": torch.where(mask, ids, 0), "attention_mask": mask.long(), "labels": labels}


def test_loss_is_the_sum_over_the_tokens_of_each_sequence():
    logits, labels = torch.randn(3, 5, 7, dtype=torch.float64), torch.randint(7, (3, 5))
    labels[1, 3:] = -100
    labels[2] = -100
    log_p = logits.log_softmax(-1)
    expected = [
        -sum(log_p[b, t, labels[b, t + 1]] for t in range(4) if labels[b, t + 1] != -100) if b < 2 else 0.0
        for b in range(3)
    ]
    torch.testing.assert_close(causal_lm_loss(logits, labels), torch.tensor(expected, dtype=torch.float64))


def test_losses_are_those_whose_mean_over_all_tokens_transformers_takes():
    model, batch = made(language_model, torch.float32), texts([6, 9, 4], prompt=2)
    with torch.no_grad():
        output = model(**batch)
    tokens = (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(causal_lm_loss(output.logits, batch["labels"]).sum() / tokens, output.loss)


@pytest.mark.parametrize("statistic", ["square", "abs"])
def test_estimate_of_a_language_model_equals_a_loop_over_sequences(statistic):
    model, batches = made(language_model), [texts([6, 9, 4]), texts([5, 5], prompt=2, seed=1)]
    actual = estimate(model, batches, statistic=statistic, loss_fn=causal_lm_loss)
    assert_equal_but_for_rounding(actual, by_loop(model, batches, "label", statistic, causal_lm_loss), statistic)
    assert FishMask.from_scores(actual, 0.01).count == int(0.01 * sum(p.numel() for p in model.parameters()))


def test_language_model_without_a_loss_is_told_which_one_there_is():
    with pytest.raises(ArgumentError, match=r"\(3, 9, 30\).*give a loss_fn.*causal_lm_loss") as error:
        estimate(made(language_model), [texts([6, 9, 4])])
    assert error.value.name == "model"


def test_expectation_over_a_language_models_own_tokens_is_refused():
    with pytest.raises(ArgumentError, match=r"logits \[3, classes\] are expected$"):
        estimate(made(language_model), [texts([6, 9, 4])], kind="expect")


@pytest.mark.parametrize(
    ("logits", "labels", "name"), [((2, 7), (2,), "logits"), ((2, 4, 7), (2, 3), "labels"), ((2, 4, 7), (2,), "labels")]
)
def test_shapes_that_do_not_fit_are_named(logits, labels, name):
    with pytest.raises(ArgumentError) as error:
        causal_lm_loss(torch.zeros(logits), torch.zeros(labels, dtype=torch.long))
    assert error.value.name == name
