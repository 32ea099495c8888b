"""Mixup of text classifiers against explicit computations, for the kinds of heads that transformers has."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

transformers = pytest.importorskip("transformers")

from fsam_triton import Mixup, MixupDraw  # noqa: E402  (transformers, if installed)

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [3, 7, 5, 7, 2, 4]
PERMUTATION = torch.tensor([1, 2, 0, 4, 3, 5])
LAM = 0.3
LABELS = torch.tensor([0, 1, 2, 2, 0, 1])
PAD = 1
SIZES = {"vocab_size": 32, "num_labels": 3, "pad_token_id": PAD}
ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SMALL_BERT = {**SIZES, **ENCODER, "max_position_embeddings": 16}
DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 16}
MODELS = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL_BERT)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL_BERT)),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(**SIZES, **DISTILBERT)
    ),
    "deberta": lambda: transformers.DebertaV2ForSequenceClassification(transformers.DebertaV2Config(**SMALL_BERT)),
    "gpt2": lambda: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    ),
}


def model_of(name: str) -> nn.Module:
    """In fp64, without dropout."""
    torch.manual_seed(0)
    return MODELS[name]().double().eval()


def batch() -> dict[str, Tensor]:
    """Rows of different lengths, padded."""
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    tokens = torch.randint(2, 32, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": torch.where(mask == 1, tokens, PAD), "attention_mask": mask}


def draw(where: str, lam: float = LAM) -> MixupDraw:
    return MixupDraw(lam, PERMUTATION, where)


def mixed(rows: Tensor) -> Tensor:
    return LAM * rows + (1 - LAM) * rows[PERMUTATION]


class MixedOutput(nn.Module):
    """A module whose output is mixed."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return mixed(self.module(*args, **kwargs))


def explicit_logits(name: str, model: nn.Module, where: str) -> Tensor:
    """By parts of the model, called one by one or put in the place of others."""
    inputs = batch()
    if where == "embeddings":
        owner, attribute = (model.transformer, "wte") if name == "gpt2" else (model.base_model, "embeddings")
        module = getattr(owner, attribute)
        setattr(owner, attribute, MixedOutput(module))
        inputs["attention_mask"] = inputs["attention_mask"] | inputs["attention_mask"][PERMUTATION]
        logits = model(**inputs).logits
        setattr(owner, attribute, module)
        return logits
    if name == "roberta":
        return model.classifier(mixed(model.roberta(**inputs).last_hidden_state))
    if name == "gpt2":
        last = torch.tensor(LENGTHS) - 1
        return model.score(mixed(model.transformer(**inputs).last_hidden_state[torch.arange(len(last)), last]))
    if name == "bert":
        return model.classifier(mixed(model.bert(**inputs).pooler_output))
    hidden = model.base_model(**inputs).last_hidden_state
    pooled = model.pooler(hidden) if name == "deberta" else model.pre_classifier(hidden[:, 0]).relu()
    return model.classifier(mixed(pooled))


def soft_labels(labels: Tensor, classes: int = 3) -> Tensor:
    one_hot = functional.one_hot(labels, classes).double()
    return mixed(one_hot)


@pytest.mark.parametrize("where", ["embeddings", "pooled"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_the_explicit_computation(name, where):
    """Numbers of the order of 1 in fp64, after some thousand operations: off by far less than 1e-12."""
    model, this = model_of(name), draw(where)
    parameters = dict(model.named_parameters())
    with this.applied(model):
        logits = model(**batch()).logits
    expected = explicit_logits(name, model, where)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    assert (logits - model(**batch()).logits).abs().max() > 1e-3
    losses = this.loss(logits, LABELS), functional.cross_entropy(expected, soft_labels(LABELS))
    actual, exact = (torch.autograd.grad(loss, list(parameters.values()), allow_unused=True) for loss in losses)
    for key, ours, theirs in zip(parameters, actual, exact, strict=True):
        assert (ours is None) == (theirs is None), key
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12, msg=key)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_is_the_cross_entropy_of_the_mixed_labels(label_smoothing):
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = functional.cross_entropy(logits, soft_labels(LABELS), label_smoothing=label_smoothing)
    torch.testing.assert_close(draw("pooled").loss(logits, LABELS, label_smoothing), expected, rtol=0, atol=1e-14)


def change_of_the_logits(name: str, rows: list[int], position: int) -> Tensor:
    """What other tokens at a position of these rows make of the logits of each row."""
    model, inputs = model_of(name), batch()
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][rows, position] = 31 - other["input_ids"][rows, position]
    with draw("embeddings").applied(model), torch.no_grad():
        return (model(**other).logits - model(**inputs).logits).abs().amax(1)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "deberta"])
def test_row_attends_to_tokens_that_only_its_partner_has(name):
    """Row 0 has 3 tokens, its partner row 1 has 7; row 1 is the partner of no other row."""
    assert (change_of_the_logits(name, [1], 6) > 1e-6).tolist() == [True, True, False, False, False, False]


def test_row_attends_to_nothing_that_is_padding_in_it_and_in_its_partner():
    """Row 2 has 5 tokens, its partner row 0 has 3."""
    assert change_of_the_logits("bert", [0, 2], 6)[2] == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_mask_of_any_type_is_joined(dtype):
    model, inputs = model_of("bert"), batch()
    with draw("embeddings").applied(model), torch.no_grad():
        expected = model(**inputs).logits
        actual = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"].to(dtype)).logits
    assert torch.equal(actual, expected)


def test_without_a_mask_every_position_is_attended_to():
    model, ids = model_of("bert"), batch()["input_ids"]
    with draw("embeddings").applied(model), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits)


@pytest.mark.parametrize("where", ["embeddings", "pooled"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_mixed_outside_the_block_nor_without_a_permutation(name, where):
    model = model_of(name)
    with torch.no_grad():
        plain = model(**batch()).logits
        with pytest.raises(IndexError), draw(where).applied(model):
            model(**{**batch(), "input_ids": torch.full((6, 7), 99)})
        assert torch.equal(model(**batch()).logits, plain)
        with MixupDraw(where=where).applied(model):
            assert torch.equal(model(**batch()).logits, plain)
    loss = MixupDraw().loss(plain, LABELS, 0.1)
    assert torch.equal(loss, functional.cross_entropy(plain, LABELS, label_smoothing=0.1))


# -- draws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "first"), [(0.0, 0), (0.5, 5), (0.55, 6), (1.0, 10)])
def test_steps_before_the_start_are_not_mixed(start, first):
    mixup = Mixup(total_steps=10, start=start)
    assert [mixup.draw(4, step).permutation is not None for step in range(10)] == [step >= first for step in range(10)]


def test_draw_follows_from_seed_and_step():
    one, same, other = (Mixup(10, alpha=1.0, start=0.0, seed=seed) for seed in (1, 1, 2))

    def numbers(mixup: Mixup, step: int) -> tuple:
        drawn = mixup.draw(100, step)
        return drawn.lam, drawn.permutation.tolist()

    assert numbers(one, 3) == numbers(same, 3)
    for different in (numbers(one, 4), numbers(other, 3)):
        assert all(a != b for a, b in zip(numbers(one, 3), different, strict=True))
    assert sorted(numbers(one, 3)[1]) == list(range(100))


def test_lambda_is_a_half_or_the_one_given():
    assert Mixup(10, start=0.0).draw(4, 0).lam == 0.5
    assert Mixup(10, lam=0.8, start=0.0).draw(4, 0).lam == 0.8


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_lambda_has_the_moments_of_the_beta_distribution(alpha):
    """Mean 1/2, variance 1 / (4 (2 alpha + 1)); the square of a deviation is at most 1/4, hence its variance too."""
    n = 4000
    mixup = Mixup(n, alpha=alpha, start=0.0)
    lam = torch.tensor([mixup.draw(1, step).lam for step in range(n)], dtype=torch.float64)
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(float(lam.mean()) - 0.5) < 5 * math.sqrt(variance / n)
    assert abs(float((lam - 0.5).square().mean()) - variance) < 5 * math.sqrt(variance / 4 / n)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("total_steps", {"total_steps": 0}),
        ("alpha", {"alpha": 0.0}),
        ("alpha", {"alpha": math.inf}),
        ("lam", {"lam": 1.1}),
        ("lam", {"alpha": 1.0, "lam": 0.5}),
        ("where", {"where": "output"}),
        ("start", {"start": -0.1}),
    ],
)
def test_argument_out_of_range_is_refused(name, arguments):
    with pytest.raises(ValueError, match=f"Invalid {name}: "):
        Mixup(**{"total_steps": 10, **arguments})


@pytest.mark.parametrize("where", ["embeddings", "pooled"])
def test_batch_of_another_size_is_refused(where):
    model, inputs = model_of("bert"), {name: rows[:4] for name, rows in batch().items()}
    with draw(where).applied(model), pytest.raises(ValueError, match="must be that of the batch, which has 4 rows"):
        model(**inputs)


def test_model_without_a_classifier_is_refused():
    model = model_of("bert").bert
    with pytest.raises(ValueError, match="Invalid where: 'pooled'"), draw("pooled").applied(model):
        pass


def test_mask_that_is_passed_by_position_is_refused():
    model, inputs = model_of("bert"), batch()
    with draw("embeddings").applied(model), pytest.raises(ValueError, match="name all but the first"):
        model(*inputs.values())
