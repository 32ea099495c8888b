"""FisherMask: exactly k coordinates, the largest squared gradients, ties to the lower index, refreshed on time."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, FisherMask
from tests.fp64_optimizers import ReferenceFSAM, ReferenceMask, top_k_mask
from tests.masks.choosing import SHAPES, distinct, expected_mask, flat, parameters_like, perturb, selected
from tests.problem import Problem, small_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("keep_ratio", [0.002, 0.1, 1 / 3, 0.5, 0.999, 1.0])
def test_mask_has_exactly_k_ones_and_they_are_the_largest(keep_ratio):
    gradients = distinct(*SHAPES)
    mask = flat(selected(gradients, FisherMask(keep_ratio)))
    k = int(keep_ratio * mask.numel())
    assert mask.dtype == torch.bool
    assert mask.sum() == k
    assert set(mask.nonzero().flatten().tolist()) == set(flat(gradients).abs().topk(k).indices.tolist())


def test_mask_of_a_large_tensor_is_the_set_of_torch_topk():
    gradient = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    mask = selected([gradient], FisherMask(0.1))[0]
    kth = gradient.abs().flatten().topk(26214).values[-1]
    assert mask.sum() == 26214
    assert mask[gradient.abs() > kth].all()
    assert not mask[gradient.abs() < kth].any()


def test_mask_has_the_parameters_shape_for_every_layout():
    gradient = distinct((4, 3, 2, 2))[0]
    for layout in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(torch.ones(4, 3, 2, 2).to(memory_format=layout))
        optimizer = FSAM([parameter], mask=FisherMask(0.25))
        perturb(optimizer, [parameter], [gradient])
        mask = optimizer.mask_of(parameter)
        assert mask.shape == parameter.shape
        assert torch.equal(mask, gradient.abs() > 36)


@dataclass(frozen=True)
class Tied:
    """Gradients with equal magnitudes, and a cut that goes through them."""

    name: str
    gradients: list[Tensor]
    keep_ratio: float


def levels(*shapes: tuple[int, ...], count: int, seed: int = 1) -> list[Tensor]:
    """Gradients with `count` magnitudes 0, 1, ... and random signs."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = [torch.randint(0, count, shape, generator=generator) for shape in shapes]
    return [(m * (torch.randint(0, 2, m.shape, generator=generator) * 2 - 1)).float() for m in magnitudes]


def mostly_zero(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [gradient * (gradient.abs() % 10 == 0) for gradient in distinct(*shapes)]


TIED = [
    Tied("all_equal", [torch.full(shape, -2.0) for shape in SHAPES], 0.3),
    Tied("all_equal_cut_in_the_second_tensor", [torch.ones(shape) for shape in SHAPES], 0.8),
    Tied("all_zero", [torch.zeros(shape) for shape in SHAPES], 0.3),
    Tied("all_zero_all_kept", [torch.zeros(shape) for shape in SHAPES], 1.0),
    Tied("k_beyond_the_nonzeros", mostly_zero(*SHAPES), 0.4),
    Tied("k_below_the_nonzeros", mostly_zero(*SHAPES), 0.05),
    Tied("two_levels", levels(*SHAPES, count=2), 0.3),
    Tied("five_levels", levels(*SHAPES, count=5), 0.45),
    Tied("negative_zeros", [-torch.zeros(8, 16), torch.zeros(24, 16)], 0.5),
    Tied("subnormal", [gradient * 2.0**-149 for gradient in levels(*SHAPES, count=4)], 0.4),
    Tied("bf16", [g.bfloat16() for g in levels(*SHAPES, count=100)], 0.3),
    Tied("fp16", [g.half() for g in levels(*SHAPES, count=100)], 0.3),
    Tied("fp64", [g.double() for g in levels(*SHAPES, count=5)], 0.3),
]


@pytest.mark.parametrize("case", TIED, ids=lambda case: case.name)
def test_ties_go_to_the_lower_index(case):
    mask = flat(selected(case.gradients, FisherMask(case.keep_ratio)))
    assert torch.equal(mask, expected_mask(case.gradients, case.keep_ratio))


def test_ties_go_to_the_lower_index_in_a_large_tensor():
    gradients = levels((512, 512), (100, 100), count=3)
    mask = flat(selected(gradients, FisherMask(0.5)))
    scores = flat(gradients).abs()
    order = scores.sort(descending=True, stable=True).indices[: int(0.5 * scores.numel())]
    assert mask.sum() == order.numel()
    assert mask[order].all()


@pytest.mark.parametrize("gradients", [distinct(*SHAPES), levels(*SHAPES, count=3)], ids=["distinct", "tied"])
def test_groups_are_selected_together(gradients):
    parameters = parameters_like(gradients)
    groups = [{"params": [parameter], "lr": 10.0**-i} for i, parameter in enumerate(parameters)]
    optimizer = FSAM(groups, mask=FisherMask(0.3))
    perturb(optimizer, parameters, gradients)
    assert torch.equal(flat([optimizer.mask_of(p) for p in parameters]), expected_mask(gradients, 0.3))


@pytest.mark.parametrize("master_weights", [False, True], ids=["rounded", "master"])
def test_dtypes_are_selected_together(master_weights):
    """Magnitudes up to 256 are exact in bf16, so all comparisons across dtypes are of distinct exact numbers."""
    first, second, third = distinct((12, 8), (10, 12), (4, 10))
    gradients = [first, second.bfloat16(), third]
    mask = flat(selected(gradients, FisherMask(0.3), master_weights=master_weights))
    assert torch.equal(mask, expected_mask(gradients, 0.3))


def test_ties_across_dtypes_go_to_the_lower_index():
    gradients = [levels((12, 8), count=3)[0], levels((10, 12), count=3)[0].bfloat16()]
    assert torch.equal(flat(selected(gradients, FisherMask(0.4))), expected_mask(gradients, 0.4))


def test_parameter_without_a_gradient_counts_as_zeros():
    gradients = distinct(*SHAPES)
    parameters = parameters_like(gradients)
    optimizer = FSAM(parameters, mask=FisherMask(0.9))
    perturb(optimizer, parameters, [None, *gradients[1:]])
    scores = [torch.zeros(24, 16), *gradients[1:]]
    assert torch.equal(flat([optimizer.mask_of(p) for p in parameters]), expected_mask(scores, 0.9))


def masks_over_steps(mask: FisherMask, steps: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The mask after each of `steps` perturbations, and the gradients they had."""
    history = [distinct(*SHAPES, seed=step) for step in range(steps)]
    parameters = parameters_like(history[0])
    optimizer, masks = FSAM(parameters, mask=mask), []
    for gradients in history:
        perturb(optimizer, parameters, gradients)
        masks.append(flat([optimizer.mask_of(parameter) for parameter in parameters]))
    return masks, history


@pytest.mark.parametrize("interval", [1, 3])
def test_mask_is_refreshed_at_every_interval_beginning_with_the_first(interval):
    masks, history = masks_over_steps(FisherMask(0.3, interval=interval), 7)
    for step, mask in enumerate(masks):
        assert torch.equal(mask, expected_mask(history[step - step % interval], 0.3))


@pytest.mark.parametrize("samples", [2, 3])
def test_fisher_is_the_mean_square_of_the_last_samples_gradients(samples):
    masks, history = masks_over_steps(FisherMask(0.3, interval=3, samples=samples), 7)
    for step in (0, 3, 6):
        squares = [flat(gradients).double() ** 2 for gradients in history[max(0, step + 1 - samples) : step + 1]]
        fisher = torch.stack(squares).mean(0)
        assert torch.equal(masks[step], top_k_mask(fisher, int(0.3 * fisher.numel())))


def test_steps_between_do_not_disturb_the_mask():
    model = small_model()
    optimizer = FSAM(model.named_parameters(), mask=FisherMask(0.3, interval=4))
    weight, masks = model["dense"].weight, []
    for step in range(4):
        Problem().loss(model.parameters(), step).backward()
        optimizer.perturb()
        masks.append(optimizer.mask_of(weight).clone())
        Problem().loss(model.parameters(), step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_masks_of_a_training_run_equal_the_references():
    model, problem = small_model(torch.float64), Problem(sparse=True)
    expected = ReferenceMask(0.2, interval=2, samples=2, is_excluded=lambda e: "bias" in e.name or "norm" in e.name)
    reference = ReferenceFSAM(model.named_parameters(), mask=expected, lr=0.01)
    optimizer = FSAM(model.named_parameters(), mask=FisherMask(0.2, interval=2, samples=2), lr=0.01)
    for step in range(8):
        reference.step(lambda weights, step=step: problem.gradients(weights, step))
        for finish in (optimizer.perturb, optimizer.step):
            problem.loss(model.parameters(), step).backward()
            finish()
            optimizer.zero_grad()
        for parameter, entry in zip(model.parameters(), reference.entries, strict=True):
            assert torch.equal(optimizer.mask_of(parameter), entry.mask)
