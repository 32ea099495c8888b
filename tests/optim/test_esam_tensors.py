"""ESAM: the random part of the tensors that is perturbed, and the gradients that are not computed for it."""

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, FisherMask, Schedule
from tests.fp64_optimizers import ReferenceFSAM, assert_masks_are_well_separated
from tests.optim.esam import BOTH_MASKS, moved_by_perturb
from tests.optim.variants import WIDE
from tests.problem import Problem, assert_weights_close, small_model
from tests.training import assert_same_bits, assert_unchanged, closure_of, several_groups, train, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def requires_grad(model: nn.Module) -> list[bool]:
    return [p.requires_grad for p in model.parameters()]


def drawn_indices(model: nn.Module, optimizer: FSAM) -> set[int]:
    """The tensors of which the coming ascent needs gradients; all were updated before."""
    with optimizer.ascent_pass():
        return {index for index, needed in enumerate(requires_grad(model)) if needed}


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("grouping", [lambda m: list(m.named_parameters()), several_groups], ids=["one", "several"])
@BOTH_MASKS
def test_fifty_steps_of_drawn_tensors_equal_the_reference(ours, theirs, grouping, dtype):
    model, problem, draws = small_model(dtype), Problem(seed=1), []
    shared = {"lr": 0.01, "rho": 0.5, "beta": 0.5}
    params = grouping(model)
    # eps over beta: the reference divides where something is selected.
    everything = [torch.ones_like(p, dtype=torch.bool) for p in model.parameters()]
    reference = ReferenceFSAM(
        params,
        tensors=lambda step: draws[step],
        selections=lambda step, index: everything[index],
        **shared,
        **theirs,
    )
    optimizer = FSAM(params, beta_per="tensor", **shared, **ours)
    for step in range(50):
        before, closure = weights_of(model), closure_of(model, optimizer, step, problem)

        def noting(closure=closure, before=before):
            if optimizer.perturbed:
                pairs = zip(model.parameters(), before, strict=True)
                draws.append({index for index, (p, w) in enumerate(pairs) if not torch.equal(p, w)})
            return closure()

        optimizer.step(noting)
        reference.step(lambda weights, step=step: problem.gradients(weights, step))
    assert len(set(map(frozenset, draws))) > 10
    assert_masks_are_well_separated(reference, dtype)
    assert_weights_close(model.parameters(), reference.weights, 50, 0.01)


@pytest.mark.parametrize("beta", [0.001, 0.3, 0.7])
def test_what_is_not_drawn_is_not_moved_and_something_is_always_drawn(beta):
    model = small_model()
    optimizer, counts = FSAM(model.parameters(), rho=0.5, beta=beta, beta_per="tensor"), []
    train(model, optimizer, 1)
    for step in range(100):
        drawn = drawn_indices(model, optimizer)
        closure_of(model, optimizer, step)()
        moved = {index for index, m in enumerate(moved_by_perturb(model, optimizer)) if m.any()}
        assert moved == drawn
        counts.append(len(moved))
        optimizer.restore()
    assert min(counts) >= 1
    # 600 coin flips, five standard deviations; and where all fail (probability (1 - beta)**6) one is drawn in addition.
    expected = 600 * beta + 100 * (1 - beta) ** 6
    assert abs(sum(counts) - expected) < 5 * (600 * beta * (1 - beta)) ** 0.5 + 5


def test_frozen_tensors_do_not_count_as_drawn():
    model = small_model()
    for p in list(model.parameters())[:5]:
        p.requires_grad_(False)
    optimizer = FSAM(model.parameters(), rho=0.5, beta=0.01, beta_per="tensor")
    for step in range(10):
        closure_of(model, optimizer, step)()
        assert moved_by_perturb(model, optimizer)[5].all()
        optimizer.restore()


def test_gradients_of_tensors_that_are_not_drawn_are_not_computed_in_the_ascent_pass():
    model = small_model()
    optimizer = FSAM(model.parameters(), rho=0.5, beta=0.5, beta_per="tensor")
    train(model, optimizer, 1)
    computed = dict.fromkeys(range(6), 0)
    for index, p in enumerate(model.parameters()):

        def count(p: Tensor, index=index) -> None:
            computed[index] += 1

        p.register_post_accumulate_grad_hook(count)
    expected = dict(computed)
    for step in range(1, 8):
        drawn = drawn_indices(model, optimizer)
        assert drawn
        optimizer.step(closure_of(model, optimizer, step))
        # One gradient in the second pass, and one in the first where it is wanted.
        expected = {index: n + 1 + (index in drawn) for index, n in expected.items()}
    assert computed == expected
    assert len(set(computed.values())) > 1


def test_gradient_of_a_tensor_that_is_not_drawn_stays_none_in_the_ascent_pass_by_hand():
    model = small_model()
    optimizer = FSAM(model.parameters(), rho=0.5, beta=0.5, beta_per="tensor")
    train(model, optimizer, 1)
    drawn = drawn_indices(model, optimizer)
    with optimizer.ascent_pass():
        closure_of(model, optimizer, 1)()
        assert {index for index, p in enumerate(model.parameters()) if p.grad is not None} == drawn
        assert {index for index, needed in enumerate(requires_grad(model)) if needed} == drawn
        # The draw is the same inside.
        assert {index for index, moved in enumerate(moved_by_perturb(model, optimizer)) if moved.any()} == drawn
    assert all(requires_grad(model))


@pytest.mark.parametrize("beta", [0.001, 0.5])
def test_ascent_pass_changes_no_bit(beta):
    model, twin = small_model(), small_model()
    kwargs = {"lr": 0.01, "rho": 0.5, "beta": beta, "beta_per": "tensor"}
    optimizer, other = FSAM(model.parameters(), **kwargs), FSAM(twin.parameters(), **kwargs)
    train(model, optimizer, 20)
    for step in range(20):
        closure_of(twin, other, step)()
        other.perturb()
        closure_of(twin, other, step)()
        other.step()
    assert_same_bits(model, twin)


class PassFails(Exception):
    """Raised by closures of the next tests."""


def test_requires_grad_is_put_back_when_the_closure_raises():
    model = small_model()
    model["norm"].requires_grad_(False)
    optimizer = FSAM(model.parameters(), rho=0.5, beta=0.3, beta_per="tensor")
    train(model, optimizer, 1)
    before, states = weights_of(model), []

    def failing():
        states.append(requires_grad(model))
        raise PassFails

    with pytest.raises(PassFails):
        optimizer.step(failing)
    expected = [True, True, False, False, True, True]
    assert sum(states[0]) < sum(expected)
    assert requires_grad(model) == expected
    assert_unchanged(model, before)


def test_ascent_pass_does_nothing_while_perturbed():
    model = small_model()
    optimizer = FSAM(model.parameters(), rho=0.5, beta=0.3, beta_per="tensor")
    train(model, optimizer, 1)
    closure_of(model, optimizer, 1)()
    optimizer.perturb()
    with optimizer.ascent_pass():
        assert all(requires_grad(model))
        Problem().loss(model.parameters(), 1).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_ascent_pass_does_nothing_at_steps_that_are_not_sharp():
    """Their gradients are the ones of the update."""
    model = small_model()
    schedule = Schedule(every=2)
    optimizer = FSAM(model.parameters(), rho=0.5, beta=0.01, beta_per="tensor", schedule=schedule)
    needed = []
    for step in range(4):
        closure = closure_of(model, optimizer, step)
        optimizer.step(lambda closure=closure: needed.append(sum(requires_grad(model))) or closure())
        assert all(optimizer.state[p]["step"] == step + 1 for p in model.parameters())
    # Two passes, one, two (of which the first leaves out all but one), one.
    assert needed == [6, 6, 6, 1, 6, 6]


def test_nothing_is_left_out_while_no_other_tensor_is_known_to_have_gradients():
    """A tensor that the loss does not depend on may be the only one drawn: backward would find nothing to do."""
    model = small_model()
    unused = nn.Parameter(torch.ones(3))
    optimizer = FSAM([*model.parameters(), unused], lr=0.01, rho=0.5, beta=0.01, beta_per="tensor")
    needed = []
    for step in range(30):
        closure = closure_of(model, optimizer, step)
        optimizer.step(lambda closure=closure: needed.append(sum(requires_grad(model))) or closure())
    first_passes = needed[2::2]
    # Only the unused one was drawn, and all are left to differentiate by; or one or a few of the others.
    assert 6 in first_passes
    assert any(0 < n < 6 for n in first_passes)


# -- a part of the tensors, by the mask --------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"flatten": True}], ids=str)
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("scores", ["fisher", "random"])
def test_tensors_that_the_mask_leaves_out_need_no_gradient_between_two_choices(scores, samples, kwargs):
    models = [small_model(), small_model()]
    computed = []
    for model, skipping in zip(models, (True, False), strict=True):
        mask = FisherMask(0.8, interval=4, exclude=(), unit="tensor", samples=samples, scores=scores)
        optimizer = FSAM(model.named_parameters(), lr=0.01, rho=0.5, mask=mask, mask_norm="masked", **kwargs)
        counts = [0] * 6
        for index, p in enumerate(model.parameters()):
            p.register_post_accumulate_grad_hook(
                lambda p, index=index, counts=counts: counts.__setitem__(index, counts[index] + 1)
            )
        for step in range(12):
            closure = closure_of(model, optimizer, step)
            if skipping:
                optimizer.step(closure)
                continue
            for finish in (optimizer.perturb, optimizer.step):
                closure()
                finish()
        computed.append(counts)
    assert_same_bits(*models)
    assert computed[1] == [24] * 6
    assert sum(computed[0]) < sum(computed[1])
    # Twelve second passes; a first one wherever a mask is chosen or its squares are added up.
    wanted = 12 + (3 if samples == 1 or scores == "random" else 3 + 2)
    assert all(wanted <= n <= 24 for n in computed[0])


def test_tensors_that_are_neither_drawn_nor_masked_leave_something_to_differentiate():
    """With excluded="never" one tensor of two may be perturbed, and often the other one is drawn."""
    model = small_model()
    mask = FisherMask(0.8, unit="tensor", excluded="never", interval=50)
    optimizer = FSAM(model.named_parameters(), rho=0.5, mask=mask, mask_norm="masked", beta=0.3, beta_per="tensor")
    train(model, optimizer, 30)
    assert all(p.isfinite().all() for p in model.parameters())
