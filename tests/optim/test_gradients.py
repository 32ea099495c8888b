"""Gradients are the user's: what lies in `p.grad` at the moment of the step is the gradient, and stays as it is."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, AdamWL2SP
from tests.optim.by_hand import (
    assert_same,
    every_kind,
    halves,
    parameters_of,
    square_model,
    take_step,
)
from tests.problem import Problem, assert_weights_close, small_model
from tests.training import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")


# -- zeros, and none ---------------------------------------------------------------------------------------------------


@every_kind
def test_parameter_whose_gradient_is_zeros_decays_and_its_moments_do(kind):
    def program(make):
        model = square_model()
        optimizer = make(model.parameters(), weight_decay=0.5)
        take_step(model, optimizer, 0)

        def zero():
            for p in model[0].parameters():
                p.grad.zero_()

        for step in (1, 2):
            take_step(model, optimizer, step, zero)
        return model.parameters()

    assert_same(kind, program, 3)


@every_kind
def test_parameters_without_a_part_in_the_loss_keep_zeros_under_zero_grad_to_zeros(kind):
    def program(make):
        model = square_model()
        optimizer = make(model.parameters(), weight_decay=0.5)
        for step in range(5):
            take_step(model, optimizer, step, set_to_none=False, problem=Problem(sparse=True))
        return model.parameters()

    # A moment that decays, over the root of one that does, stays below Adam's first quotient of 1.
    assert_same(kind, program, 5)


def test_step_without_any_gradient_changes_nothing():
    model, twin = small_model(), small_model()
    optimizer = AdamWL2SP(model.parameters(), lr=0.01)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert_same_bits(model, twin)
    assert not optimizer.state


@every_kind
def test_gradients_that_hooks_set_to_none_take_no_part(kind):
    def program(make):
        model = square_model()
        optimizer = make(model.parameters())
        model[0].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for step in range(3):
            take_step(model, optimizer, step)
        assert model[0].weight not in optimizer.state
        return model.parameters()

    assert_same(kind, program, 3)


@pytest.mark.parametrize("flatten", [False, True])
def test_optimizer_of_each_parameter_may_step_and_free_its_gradient_within_the_backward_pass(flatten):
    def program(kind, **options):
        model = square_model()
        for p in model.parameters():
            optimizer = kind([p], lr=0.01, **options)

            def step(p, optimizer=optimizer):
                optimizer.step()
                p.grad = None

            p.register_post_accumulate_grad_hook(step)
        for step in range(3):
            Problem().loss(model.parameters(), step).backward()
        return model.parameters()

    expected = program(torch.optim.AdamW)
    assert_weights_close(program(AdamWL2SP, flatten=flatten), expected, 3, 0.01)


# -- whose memory it is ------------------------------------------------------------------------------------------------


@every_kind
def test_gradients_are_left_as_they_are(kind):
    model = square_model()
    optimizer = kind.ours(model.parameters(), lr=0.01)
    for half in halves(optimizer):
        Problem().loss(model.parameters(), 0).backward()
        gradients = [p.grad for p in model.parameters()]
        before = [(gradient.data_ptr(), gradient._version, gradient.clone()) for gradient in gradients]
        half()
        for gradient, (address, version, values) in zip(gradients, before, strict=True):
            assert (gradient.data_ptr(), gradient._version) == (address, version)
            assert torch.equal(gradient, values)
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))


@every_kind
def test_gradients_kept_over_zero_grad_can_be_combined_with_later_ones(kind):
    """Gradient surgery for several tasks."""

    def program(make):
        model = square_model()
        optimizer = make(model.parameters())
        for step in range(3):
            for half in halves(optimizer):
                kept = []
                for task in (0, 1):
                    optimizer.zero_grad()
                    Problem(seed=task).loss(model.parameters(), step).backward()
                    kept.append([p.grad for p in model.parameters()])
                for p, first, second in zip(model.parameters(), *kept, strict=True):
                    p.grad = first + second / 4
                half()
        return model.parameters()

    # Gradients within [0.1, 1.9]: over 0.1, the errors of `rounding_bound` are at most 5 times as large.
    assert_same(kind, program, 3 * 5)


CHANGES = {
    "exchanged": lambda p, q: (q.grad, p.grad),
    "same_tensor": lambda p, q: (p.grad, p.grad),
    "expanded": lambda p, q: (
        torch.ones((), dtype=p.dtype).expand(p.shape),
        q.grad.sum(0, keepdim=True).expand(q.shape),
    ),
    "transposed": lambda p, q: (p.grad.t(), q.grad.t().contiguous().t()),
    "strided": lambda p, q: (p.grad.repeat_interleave(2, 1)[:, ::2], torch.stack([q.grad, p.grad], 2)[..., 0]),
    "negated_lazily": lambda p, q: (torch._neg_view(p.grad), q.grad),
    "of_a_graph": lambda p, q: (p.grad + 0 * p, q.grad.requires_grad_()),
}


@every_kind
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("how", ["assigned", "data"])
def test_gradient_of_other_memory_and_strides_is_the_one_that_counts(kind, change, how):
    def program(make):
        model = parameters_of(*(square_model()[0].weight.detach() * sign for sign in (1, -1)))
        p, q = model
        optimizer = make(model.parameters(), eps=0.1)

        def exchange():
            p_grad, q_grad = change(p, q)
            if how == "data":
                p.grad.data, q.grad.data = p_grad.detach(), q_grad.detach()
            else:
                p.grad, q.grad = p_grad, q_grad

        take_step(model, optimizer, 0)
        for step in range(1, 4):
            take_step(model, optimizer, step, exchange)
        return model.parameters()

    # Of sums of eight: |g| <= 12 with an error of 8 roundings, over a denominator of at least 0.1.
    assert_same(kind, program, 4 * 8)


@every_kind
def test_gradient_changed_in_place_is_used_as_changed(kind):
    def program(make):
        model = square_model()
        optimizer = make(model.parameters(), eps=0.01)
        for step in range(5):
            take_step(model, optimizer, step, lambda: nn.utils.clip_grad_norm_(model.parameters(), 2.0))
        return model.parameters()

    assert_same(kind, program, 5)


@every_kind
def test_gradient_written_through_detach_or_numpy_is_used_as_written(kind):
    """No version counter says so."""

    def program(make):
        model = square_model()
        optimizer = make(model.parameters())

        def write():
            model[0].weight.grad.data.mul_(-0.5)
            model[0].bias.grad.numpy()[:] *= -0.5

        for step in range(3):
            take_step(model, optimizer, step, write)
        return model.parameters()

    assert_same(kind, program, 3)


@every_kind
def test_gradient_of_fewer_elements_is_broadcast_as_under_torch(kind):
    """By `p.grad.data`, which checks nothing: what lies behind it must not be read."""
    model = square_model()
    optimizer = kind.ours(model.parameters(), lr=0.01)

    def shorten():
        model[0].bias.grad.data = torch.ones(1, dtype=torch.float64)

    take_step(model, optimizer, 0, shorten)
    assert (model[0].bias - square_model()[0].bias).unique().numel() <= 8
    moved = square_model()[0].bias * (1 - 0.01 * 0.01) - 0.01
    torch.testing.assert_close(model[0].bias, moved, rtol=0, atol=1e-7 + 1e-8)


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM])
def test_gradient_of_another_type_counts_as_one_of_the_parameters_type(kind):
    results = []
    for widen in (False, True):
        model = square_model(torch.bfloat16)
        optimizer = kind(model.parameters(), lr=0.01)
        for p in model.parameters():
            p.grad_dtype = torch.float32 if widen else p.dtype
        for step in range(3):
            for half in halves(optimizer):
                for p, gradient in zip(model.parameters(), Problem().gradients(model.parameters(), step), strict=True):
                    p.grad = gradient.float() if widen else gradient
                half()
        results.append(model)
    assert_same_bits(*results)


def test_sparse_gradient_is_refused_by_name_and_nothing_is_changed():
    embedding = nn.Embedding(8, 4, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = AdamWL2SP(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradient of parameter 'weight'"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


# -- over time ---------------------------------------------------------------------------------------------------------


def test_gradients_that_stay_are_applied_again_as_under_torch_adamw():
    model, twin = small_model(), small_model()
    for trained, factory in ((model, AdamWL2SP), (twin, torch.optim.AdamW)):
        optimizer = factory(trained.parameters(), lr=0.01)
        Problem().loss(trained.parameters(), 0).backward()
        for _ in range(3):
            optimizer.step()
    assert_weights_close(model.parameters(), twin.parameters(), 3, 0.01)


def test_gradients_that_are_never_zeroed_accumulate_as_under_torch_adamw():
    model, twin = small_model(torch.float64), small_model(torch.float64)
    for trained, factory in ((model, AdamWL2SP), (twin, torch.optim.AdamW)):
        optimizer = factory(trained.parameters(), lr=0.01, eps=0.1)
        for step in range(4):
            Problem(sparse=True).loss(trained.parameters(), step).backward()
            optimizer.step()
    # Sums of up to four gradients have twice the roundings, and may cancel to a quarter of one.
    assert_weights_close(model.parameters(), twin.parameters(), 4 * 8, 0.01)


@every_kind
def test_backward_through_weights_that_were_updated_since_is_refused_by_autograd(kind):
    model = square_model()
    optimizer = kind.ours(model.parameters(), lr=0.01)
    loss = model[0].weight.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def moves(weights: list[Tensor]) -> list[float]:
    return [float((after - before).abs().max()) for before, after in pairwise(weights)]


def test_gradient_freed_and_given_again_by_turns_is_followed():
    (p,) = model = parameters_of(torch.zeros(4, 4, dtype=torch.float64))
    optimizer, weights = AdamWL2SP(model.parameters(), lr=0.01, weight_decay=0.0), [p.detach().clone()]
    for step in range(6):
        p.grad = None if step % 2 else torch.ones_like(p)
        optimizer.step()
        weights.append(p.detach().clone())
    # Equal gradients: each update is lr long, but for eps.
    assert moves(weights) == pytest.approx([0.01, 0.0] * 3, rel=1e-7)
