"""estimate_fisher against a loop over samples; which way parameters go; what it leaves as it was; errors."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fsam_triton import ops
from fsam_triton.fisher import estimate_fisher, slow
from fsam_triton.kernels import reference

STATISTICS = ["square", "abs"]
KINDS = ["label", "expect"]


# -- models ------------------------------------------------------------------------------------------------------------


def tokens(batch: int, length: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    ids = torch.randint(1, 40, (batch, length), generator=generator)
    labels = torch.randint(0, 3, (batch,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40,
        n_embd=24,
        n_layer=2,
        n_head=2,
        n_positions=16,
        num_labels=3,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2ForSequenceClassification(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        num_labels=3,
        pad_token_id=0,
    )
    return transformers.LlamaForSequenceClassification(config)


class Cnn(nn.Module):
    """Strides, dilations, groups, "same" padding, other padding modes, changes in place of the first layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, groups=4, padding="same", dilation=2),
            nn.BatchNorm2d(8, affine=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 6, (3, 2), padding=(1, 0), bias=False, padding_mode="reflect"),
            nn.GroupNorm(2, 6),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
            nn.BatchNorm1d(3),
        )
        with torch.no_grad():
            for seed in range(3):
                self(images(5, 9, seed)[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def images(batch: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (batch,), generator=generator)
    return torch.randn(batch, 3, size, size, generator=generator), labels


class Shared(nn.Module):
    """A layer used three times, by F.linear too; an embedding tied to the output; raw parameters of all sorts."""

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6, padding_idx=0, sparse=True)
        self.positions = nn.Embedding(12, 6)
        self.first = nn.Parameter(torch.randn(1, 1, 6))
        self.norm = nn.RMSNorm(6)
        self.linear = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6))
        self.matrix = nn.Parameter(torch.randn(6, 6)) if raw else None
        self.output = nn.Linear(6, 20, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.cat([self.first.expand(len(ids), -1, -1), self.embedding(ids)], 1)
        h = h + self.positions(torch.arange(h.shape[1]))
        for _ in range(3):
            h = torch.tanh(self.linear(self.norm(h))) * self.scale
        h = h + F.linear(h, self.linear.weight)
        if self.matrix is not None:
            h = h + h @ self.matrix
        return self.output(h.mean(1))


def ids(batch: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 20, shape, generator=generator) for shape in ((batch, length), (batch,)))


def inputs(batch: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *shape, generator=generator), torch.randint(0, 3, (batch,), generator=generator)


# As many samples as positions, once: what is a position must not be taken for a sample.
MODELS = {
    "bert": (bert, [tokens(4, 7, 1), tokens(5, 5, 2), tokens(3, 9, 3)]),
    "gpt2": (gpt2, [tokens(4, 7, 1), tokens(5, 5, 2), tokens(3, 9, 3)]),
    "llama": (llama, [tokens(4, 7, 1), tokens(5, 5, 2)]),
    "cnn": (Cnn, [images(4, 9, 11), images(5, 8, 12)]),
    "shared": (Shared, [ids(4, 5, 1), ids(5, 4, 2), ids(3, 7, 3)]),
    "raw": (lambda: Shared(raw=True), [ids(4, 5, 1), ids(3, 7, 3)]),
}


def made(make, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make().to(dtype).eval()


def cast(batch, dtype: torch.dtype):
    """The batch with its floating point tensors in another type."""
    if isinstance(batch, dict):
        return batch
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in batch)


# -- the oracle --------------------------------------------------------------------------------------------------------


def by_loop(model, batches, kind="label", statistic="square", loss_fn=None) -> dict[str, Tensor]:
    """A backward pass for each sample alone, and with "expect" for each of its classes."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in params.items()}
    count = 0

    def add(loss: Tensor, weight: float = 1.0) -> None:
        grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True, allow_unused=True)
        for name, g in zip(params, grads, strict=True):
            if g is not None:
                g = g.to_dense().double()
                total[name] += weight * (g.square() if statistic == "square" else g.abs())

    for batch in batches:
        rows = batch["labels"] if isinstance(batch, dict) else batch[1]
        for i in range(len(rows)):
            label = rows[i : i + 1]
            if isinstance(batch, dict):
                logits = model(**{key: value[i : i + 1] for key, value in batch.items()}).logits
            else:
                logits = model(batch[0][i : i + 1])
            if kind == "label":
                add((loss_fn or F.cross_entropy)(logits, label).sum())
            else:
                for log_p in logits.log_softmax(-1)[0]:
                    add(log_p, float(log_p.detach().exp()))
            count += 1
    return {name: value / count for name, value in total.items()}


def size(fisher: Tensor, statistic: str) -> Tensor:
    """The size of a gradient, of which rounding errors are a part: the root of a square."""
    return fisher.double().sqrt() if statistic == "square" else fisher.double()


def assert_equal_but_for_rounding(actual, expected, statistic="square", rtol=1e-5, noise=None) -> None:
    """Within rtol of each element, but for what gradients are off by: `noise` by name, or some roundings of the largest
    gradient in fp64. (Gradients of key biases are zero but for that.)"""
    assert actual.keys() == expected.keys()
    largest = max(float(size(value, statistic).max()) for value in expected.values())
    for name, value in expected.items():
        exact, off = size(value, statistic), 1e-13 * largest if noise is None else noise[name]
        error = (size(actual[name], statistic) - exact).abs()
        # Half of rtol: the square's relative error is twice the root's.
        worst = float((error - rtol / 2 * exact).max())
        assert worst <= off, f"{name}: {worst} > {off}"


@pytest.fixture
def slow_names(monkeypatch) -> set[str]:
    """Fills with the names of parameters that go the slow way."""
    seen: set[str] = set()
    original = slow.SlowPasses.add

    def add(self, names, batch):
        seen.update(names)
        original(self, names, batch)

    monkeypatch.setattr(slow.SlowPasses, "add", add)
    return seen


def count(batches) -> int:
    return sum(len(batch["labels"] if isinstance(batch, dict) else batch[1]) for batch in batches)


def estimate(model, batches, **options) -> dict[str, Tensor]:
    return estimate_fisher(model, batches, count(batches), progress=False, **options)


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_estimate_in_fp64_equals_a_loop_over_samples(name, kind, statistic, slow_names):
    make, batches = MODELS[name]
    model, batches = made(make), [cast(batch, torch.float64) for batch in batches]
    actual = estimate(model, batches, kind=kind, statistic=statistic)
    assert_equal_but_for_rounding(actual, by_loop(model, batches, kind, statistic), statistic)
    assert slow_names == ({"matrix"} if name == "raw" else set())
    assert {value.dtype for value in actual.values()} == {torch.float64}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_estimate_in_fp32_is_as_exact_as_a_loop_over_samples(name, kind):
    """Within 1e-5 of the loop in fp64, and four times that loop's largest rounding error in fp32 for each tensor: two
    ways of adding differ by the errors of both, and twice as much is left to the order of their additions."""
    make, batches = MODELS[name]
    model = made(make, torch.float32)
    actual, loop = estimate(model, batches, kind=kind), by_loop(model, batches, kind)
    exact = by_loop(made(make), [cast(batch, torch.float64) for batch in batches], kind)
    noise = {name: 4 * float((loop[name].sqrt() - exact[name].sqrt()).abs().max()) for name in exact}
    assert_equal_but_for_rounding(actual, exact, noise=noise)
    assert {value.dtype for value in actual.values()} == {torch.float32}
    assert {name: value.shape for name, value in actual.items()} == {n: p.shape for n, p in model.named_parameters()}


def relative(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of the tensors' relative errors, of those that are not zero but for rounding."""
    return max(
        float((actual[name].double().sqrt() - value.sqrt()).norm() / value.sqrt().norm())
        for name, value in expected.items()
        if "key.bias" not in name
    )


@pytest.mark.parametrize("way", ["bf16 weights", "bf16 autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_estimate_in_bf16_is_near_that_in_fp64(name, way):
    """About ten operations from the loss to each gradient, each rounding to 8 bits."""
    make, batches = MODELS[name]
    exact = by_loop(made(make), [cast(batch, torch.float64) for batch in batches])
    if way == "bf16 weights":
        actual = estimate(made(make, torch.bfloat16), [cast(batch, torch.bfloat16) for batch in batches])
    else:
        with torch.autocast("cpu", torch.bfloat16):
            actual = estimate(made(make, torch.float32), batches)
    assert relative(actual, exact) < 0.1
    assert {value.dtype for value in actual.values()} == {torch.float32}


def test_squares_of_bf16_gradients_are_summed_in_fp32():
    """4096 samples of one gradient: in bf16 the sum would stop at 256 of them."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    batches = [(torch.ones(64, 1, dtype=torch.bfloat16), torch.zeros(64))] * 64
    actual = estimate(model, batches, loss_fn=lambda logits, labels: logits[:, 0])
    assert actual["weight"].item() == 1.0


def test_gradients_of_a_batch_do_not_cancel():
    """The square of the batch's mean gradient is zero here."""
    model = nn.Linear(1, 1, bias=False)
    batch = (torch.tensor([[1.0], [-1.0]]), torch.zeros(2))
    assert estimate(model, [batch], loss_fn=lambda logits, labels: logits[:, 0])["weight"].item() == 1.0


def test_expectation_does_not_look_at_labels():
    make, batches = MODELS["bert"]
    model = made(make)
    unlabelled = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    actual = estimate_fisher(model, unlabelled, 12, kind="expect", progress=False)
    assert_equal_but_for_rounding(actual, by_loop(model, batches, "expect"))


def test_loss_function_takes_the_place_of_cross_entropy():
    make, batches = MODELS["cnn"]
    model, batches = made(make), [cast(batch, torch.float64) for batch in batches]

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits - F.one_hot(labels, 3)).square().sum(-1)

    expected = by_loop(model, batches, loss_fn=loss)
    assert_equal_but_for_rounding(estimate(model, batches, loss_fn=loss), expected)


def test_only_parameters_that_require_a_gradient_are_estimated(slow_names):
    make, batches = MODELS["bert"]
    model = made(make)
    for name, p in model.named_parameters():
        p.requires_grad_("layer.1.attention" in name or "classifier" in name)
    assert_equal_but_for_rounding(estimate(model, batches), by_loop(model, batches))
    assert not slow_names


def test_unused_parameter_has_no_information():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    model.forward = lambda x: model["used"](x)
    assert not estimate(model, [inputs(4, 3)])["unused.weight"].any()


# -- which way ---------------------------------------------------------------------------------------------------------


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grads):
        x, weight = ctx.saved_tensors
        return grads * weight, (grads * x).sum(0)


class OwnFunction(nn.Module):
    """The first layer's weight is also used by an autograd.Function, which no torch function sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Scale.apply(torch.tanh(self.first(x)), self.first.weight[0]) + self.through(x))

    def through(self, x: Tensor) -> Tensor:
        return Scale.apply(x, self.first.bias)


class Outside(nn.Module):
    """A module holds another's weight where the tree of modules, and so torch.func, does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.others = [self.first.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) @ self.others[0])


class DataDependent(nn.Module):
    """What vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.last = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([row @ self.matrix if float(row.sum()) > 0 else row @ self.matrix.T for row in x])
        return self.last(torch.tanh(h))


class PositionsFirst(nn.Module):
    """Activations are [positions, samples, features] until the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x.transpose(0, 1))))[0])


class Mixing(nn.Module):
    """Samples see each other: normalised by the batch's statistics in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4, track_running_stats=False)
        self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.norm(self.first(x))).mean(-1))))


class Tokens(nn.Module):
    """Rows of all samples' positions in one dimension; a module called for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        once = torch.tanh(self.first(x.flatten(0, 1))).view(len(x), -1, 5).mean(1)
        return self.last(torch.cat([once, self.first(x[:, 0])], -1))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(
            checkpoint(lambda x: torch.tanh(self.middle(torch.tanh(x))), self.first(x), use_reentrant=False)
        )


class Cast(nn.Module):
    """Casts that do nothing, and a look at attributes, are no uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight.to(x.dtype)
        x = F.linear(x.to(self.last.weight.dtype), weight, self.first.bias.contiguous())
        with torch.no_grad():
            norm = self.last.weight.norm()
        return self.last(x / norm)


class Twice(nn.Module):
    """One parameter as two arguments of a function; results in a tuple; a parameter normalised itself."""

    def __init__(self) -> None:
        super().__init__()
        self.vector, self.matrix, self.last = (
            nn.Parameter(torch.randn(4)),
            nn.Parameter(torch.randn(4, 4)),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, (4,), self.vector, self.vector)
        return self.last(x * torch.max(self.matrix, dim=0).values)


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(20, 3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)[0][:, -1])


def everything(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def attention(model: nn.Module) -> set[str]:
    return {name for name in everything(model) if "self_attn" in name}


def recurrent(model: nn.Module) -> set[str]:
    return {name for name in everything(model) if "first" in name}


WAYS = {
    "own_function": (OwnFunction, (4,), {"first.weight", "first.bias"}),
    "outside": (Outside, (4,), {"first.weight"}),
    "data_dependent": (DataDependent, (4,), {"matrix"}),
    "positions_first": (PositionsFirst, (6, 4), everything),
    "as_many_positions_as_samples": (PositionsFirst, (5, 4), everything),
    "mixing": (Mixing, (2, 6), everything),
    "tokens": (Tokens, (6, 4), set()),
    "cast": (Cast, (4,), set()),
    "twice": (Twice, (4,), {"matrix"}),
    "checkpointed": (Checkpointed, (4,), everything),
    "scripted": (Scripted, (4,), {"first.weight", "first.bias"}),
    "attention": (encoder, (5, 4), attention),
    "recurrent": (Recurrent, (5, 4), recurrent),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WAYS)
def test_uses_that_the_fast_way_cannot_do_are_found_and_done_exactly(name, kind, slow_names):
    make, shape, slow = WAYS[name]
    model, batches = made(make), [cast(inputs(size, *shape), torch.float64) for size in (5, 3)]
    assert_equal_but_for_rounding(estimate(model, batches, kind=kind), by_loop(model, batches, kind))
    assert slow_names == (slow(model) if callable(slow) else slow)


def test_batches_of_one_sample_do_not_hide_that_later_ones_are_arranged_otherwise(slow_names):
    model, batches = made(PositionsFirst), [cast(inputs(size, 5, 4), torch.float64) for size in (1, 5, 5)]
    assert_equal_but_for_rounding(estimate(model, batches), by_loop(model, batches))


def test_use_that_comes_up_in_a_later_batch_is_found():
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            return self.last(h @ self.first.weight if x.shape[1] > 2 else h).mean(1)

    model, batches = made(Later), [cast(inputs(size, size - 2, 4), torch.float64) for size in (4, 5, 3)]
    assert_equal_but_for_rounding(estimate(model, batches), by_loop(model, batches))


def test_slow_way_of_a_parameter_does_several_samples_at_once(monkeypatch):
    """The loop serves only to check vmap on one sample."""
    sizes, original = [], slow.SlowPasses.by_loop

    def by_loop(self, names, batch):
        sizes.append(batch.size)
        return original(self, names, batch)

    monkeypatch.setattr(slow.SlowPasses, "by_loop", by_loop)
    make, batches = MODELS["raw"]
    estimate(made(make), batches)
    assert sizes == [1]


def test_slow_way_needs_no_more_memory_than_it_is_given(monkeypatch):
    """One sample at a time, if there is no room for two."""
    make, batches = MODELS["raw"]
    model = made(make)
    monkeypatch.setattr(slow, "ELEMENTS", 1)
    assert_equal_but_for_rounding(estimate(model, batches), by_loop(model, batches))


def test_empty_batches_are_left_out():
    model, batches = made(Cast), [cast(inputs(size, 4), torch.float64) for size in (0, 4, 0, 3)]
    assert_equal_but_for_rounding(estimate(model, batches), by_loop(model, batches))


def test_compiled_model_is_run_uncompiled():
    model = made(OwnFunction)
    batches = [cast(inputs(4, 4), torch.float64)]
    expected = by_loop(model, batches)
    compiled = torch.compile(model)
    actual = estimate(compiled, batches)
    assert_equal_but_for_rounding({name.removeprefix("_orig_mod."): value for name, value in actual.items()}, expected)


# -- the operator ------------------------------------------------------------------------------------------------------


def layer(batch: int, positions: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 5), (batch, positions, 5), (batch, positions, 6)
    total, a, d = (torch.randn(shape, generator=generator) for shape in shapes)
    return total.square(), a.to(dtype), d.to(dtype)


@pytest.mark.skipif(ops.interpreting(), reason="the interpreter cannot be traced")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_keeps_the_rules_of_torch_library(dtype):
    torch.library.opcheck(ops.linear_fisher_, (*layer(3, 4, dtype), False))


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("used", [[4, 0, 7], [1, 1, 1], [7, 7, 7], [0, 0, 0]], ids=str)
def test_positions_without_a_gradient_change_nothing(used, absolute):
    total, a, d = layer(3, 7)
    for i, n in enumerate(used):
        d[i, n:] = 0.0
    expected = total.double()
    reference.linear_fisher_(expected, a.double(), d.double(), absolute)
    ops.linear_fisher_(total, a, d, absolute)
    # Seven products and additions for a gradient of numbers of about one, three squares or sizes.
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-5)


# -- samples -----------------------------------------------------------------------------------------------------------


def test_last_batch_is_cut_and_no_other_is_asked_for():
    model, batches = made(bert), MODELS["bert"][1]

    def loader():
        yield from batches[:2]
        raise AssertionError("one batch too many")

    cut = [batches[0], {key: value[:2] for key, value in batches[1].items()}]
    actual = estimate_fisher(model, loader(), 6, progress=False)
    assert_equal_but_for_rounding(actual, by_loop(model, cut))


def test_fewer_samples_than_asked_for_are_used_with_a_warning():
    model, batches = made(Cnn, torch.float32), MODELS["cnn"][1]
    with pytest.warns(UserWarning, match="9 samples instead of 100"):
        actual = estimate_fisher(model, batches, 100, progress=False)
    expected = estimate(model, batches)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_as_many_samples_as_asked_for_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate(made(Cnn, torch.float32), MODELS["cnn"][1])


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar_counts_samples(progress, capsys):
    estimate_fisher(made(Cnn, torch.float32), MODELS["cnn"][1], 7, progress=progress)
    assert ("7/7" in capsys.readouterr().err) == progress


# -- what stays as it was ----------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["bert", "raw"])
def test_modes_gradients_and_hooks_stay_as_they_were(name, fails):
    make, batches = MODELS[name]
    model, called = made(make, torch.float32).train(), []
    frozen = next(module for module in model.modules() if isinstance(module, nn.Linear))
    frozen.eval()
    params = dict(model.named_parameters())
    for i, p in enumerate(params.values()):
        p.grad = torch.full_like(p, 7.0) if i % 2 else None
        p.register_hook(lambda g: called.append("tensor hook"))
        p.register_post_accumulate_grad_hook(lambda p: called.append("post-accumulate hook"))
    next(iter(params.values())).requires_grad_(name == "raw")
    before = {name: (p, p.detach().clone(), p.grad, p.requires_grad) for name, p in params.items()}
    modes = [module.training for module in model.modules()]

    def loader():
        assert not any(module.training for module in model.modules())
        yield batches[0]
        if fails:
            raise Boom

    if fails:
        with pytest.raises(Boom):
            estimate_fisher(model, loader(), 100, progress=False)
    else:
        estimate_fisher(model, loader(), 4, progress=False)
    assert [module.training for module in model.modules()] == modes
    for key, p in model.named_parameters():
        same, value, grad, requires_grad = before[key]
        assert p is same
        assert torch.equal(p, value)
        assert p.grad is grad
        assert grad is None or bool((grad == 7.0).all())
        assert p.requires_grad == requires_grad
    assert not called


def test_dropout_is_off():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    first, second = (estimate(model, [inputs(5, 4)]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_may_be_off_around_the_call():
    model, batch = made(bert), MODELS["bert"][1][0]
    with torch.no_grad():
        actual = estimate(model, [batch])
    assert_equal_but_for_rounding(actual, by_loop(model, [batch]))


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 1.5}, "num_samples"),
        ({"num_samples": True}, "num_samples"),
        ({"kind": "labels"}, "kind"),
        ({"statistic": "mean"}, "statistic"),
        ({"loss_fn": 3}, "loss_fn"),
        ({"loss_fn": F.cross_entropy, "kind": "expect"}, "loss_fn"),
        ({"loss_fn": F.cross_entropy}, "loss_fn"),
        ({"dataloader": []}, "dataloader"),
        ({"dataloader": [torch.ones(2, 4)]}, "dataloader"),
        ({"dataloader": [{"input": torch.ones(2, 4)}]}, "dataloader"),
        ({"dataloader": [({}, {})]}, "dataloader"),
        ({"model": nn.Linear(4, 3).requires_grad_(False)}, "model"),
        ({"model": nn.LazyLinear(3)}, "model"),
        ({"model": nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1)))}, "model"),
    ],
)
def test_bad_argument_is_named(options, name):
    arguments = {"model": nn.Linear(4, 3), "dataloader": [inputs(4, 4)], "num_samples": 2} | options
    with pytest.raises(ValueError, match=f"Invalid {name}"):
        estimate_fisher(**arguments, progress=False)


def test_error_of_the_model_is_the_users_to_see():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        estimate(nn.Linear(4, 3), [inputs(4, 5)])


def test_mean_is_finite_for_confident_predictions():
    """Probabilities of zero have a logarithm of -inf in places, and a weight of zero."""
    model = nn.Linear(2, 2)
    model.weight.data = torch.tensor([[1e3, 0.0], [0.0, 1e3]])
    actual = estimate(model, [(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))], kind="expect")
    assert all(math.isfinite(value) for value in actual["weight"].flatten())
