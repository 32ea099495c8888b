"""The passes in C++ against the reference, to the bit."""

import pytest
import torch
from torch import Tensor

from fsam_triton.kernels import build, cpu, reference
from fsam_triton.kernels.segments import Plan, Segments
from tests.kernels.cases import assert_same_bits, bits, label, ordinary, with_specials
from tests.kernels.launches import (
    ABSENT,
    DESCEND,
    HYPER,
    PERTURB,
    assert_as_the_reference,
    descend,
    descend_launch,
    flat_weights,
    keys,
    perturb,
    perturb_launch,
)

pytestmark = pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")


@pytest.mark.parametrize("make", [ordinary, with_specials], ids=["ordinary", "special"])
@pytest.mark.parametrize("case", PERTURB, ids=label)
def test_perturbation_equals_the_reference_to_the_bit(case, make):
    assert_as_the_reference(perturb, perturb_launch(**case, make=make), cpu)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_backups_past_the_caches_are_the_same(dtype, masked, monkeypatch):
    monkeypatch.setattr(cpu, "_STREAMED", 0)
    assert_as_the_reference(perturb, perturb_launch(dtype, masked=masked), cpu)
    large = [(3 * (1 << 19) + 7,), (1,), (1,), (1,), (1,), (2, 3)]
    monkeypatch.undo()
    assert_as_the_reference(perturb, perturb_launch(dtype, masked=masked, shapes=large), cpu)


@pytest.fixture
def threads():
    """`threads(n)` sets the number of PyTorch's threads, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_many_small_tensors_are_perturbed_once_each_with_any_number_of_threads(threads):
    sizes = torch.randint(0, 900, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    for n in (1, 2, 5):
        threads(n)
        launch = perturb_launch("bf16", shapes=[*[(size,) for size in sizes], (4, 3)])
        assert_as_the_reference(perturb, launch, cpu)


@pytest.mark.parametrize("first", [19999, 20000, 20001, 20002])
def test_no_chunk_is_left_out_where_one_threads_share_ends(first, threads):
    threads(2)
    shapes = [(first,), (0,), (40002 - 6 - first,), (0,), (1,), (2, 3)]
    launch = assert_as_the_reference(perturb, perturb_launch("fp32", shapes=shapes), cpu)
    assert sum(launch.plan.lengths) - launch.plan.lengths[ABSENT] == 2 * 20001


def test_stochastic_numbers_do_not_depend_on_the_number_of_threads(threads):
    results = []
    for n in (1, 2, 5):
        threads(n)
        launch = perturb_launch("bf16", random=True)
        perturb(cpu, launch)
        results.append(launch)
    for launch in results[1:]:
        for one, other in zip(flat_weights(launch), flat_weights(results[0]), strict=True):
            assert_same_bits(one, other)


def test_parts_of_a_tensor_with_keys_of_their_own_draw_what_the_whole_draws():
    """Shards do, so that they move as the whole tensor does."""
    weight, grad, key = ordinary(40000, torch.bfloat16, 1), ordinary(40000, torch.bfloat16, 2), keys(1)[0]
    results = []
    for cuts in ([], [1, 64, 20001]):
        parts, grads = (tensor.clone().tensor_split(cuts) for tensor in (weight, grad))
        plan = Plan([len(part) for part in parts], weight.device)
        own = torch.stack([reference.key_at(key, start) for start in [0, *cuts]]).to(torch.int32)
        coef, backup = torch.tensor([[0.1, -0.25]]).repeat(len(parts), 1), torch.zeros(plan.size, dtype=weight.dtype)
        cpu.perturb_(Segments(plan, parts, grads), backup, None, coef, own, False, True, True)
        results.append(torch.cat(parts))
    assert_same_bits(*results)
    assert 0 < int((results[0] != weight).sum()) < len(weight) / 2


def test_nothing_happens_where_no_segment_takes_part():
    plan = Plan([5, 40], torch.device("cpu"))
    weights = [torch.ones(5), torch.ones(40)]
    nobody = Segments(plan, weights, [None, None])
    assert not nobody
    assert cpu.norm_sq(nobody, False, None) == 0
    assert cpu.gap(nobody).tolist() == [0, 0, 0]
    backup, coef = torch.zeros(plan.size), torch.ones(2, 2)
    cpu.perturb_(nobody, backup, None, coef, keys(2), False, False, False)
    assert not backup.any()
    assert all((w == 1).all() for w in weights)


@pytest.mark.parametrize("make", [ordinary, with_specials], ids=["ordinary", "special"])
@pytest.mark.parametrize("case", DESCEND, ids=label)
def test_update_equals_the_reference_to_the_bit(case, make):
    assert_as_the_reference(descend, descend_launch(**case, make=make), cpu)


def test_a_nan_in_the_largest_second_moment_stays():
    """As with torch.maximum, which torch.optim's amsgrad uses."""
    launch = descend_launch(lanes="all")
    launch.plan.part(launch.lanes["max_exp_avg_sq"], 3)[::5] = float("nan")
    after = assert_as_the_reference(descend, launch, cpu)
    assert after.plan.part(after.lanes["max_exp_avg_sq"], 3)[::5].isnan().all()


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_nan_stays_one_whatever_is_in_its_lower_half(stochastic):
    """Rounded as a number it would become a zero."""
    launch = descend_launch(dtype="bf16", state="fp32", stochastic=stochastic)
    launch.plan.part(launch.lanes["exp_avg"], 3).view(torch.int32)[::5] = 0x7FFFFFFF
    after = assert_as_the_reference(descend, launch, cpu)
    assert flat_weights(after)[3][::5].isnan().all()


# -- 16-bit numbers ----------------------------------------------------------------------------------------------------


def every_number(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """All 65,536 bit patterns in some order, again and again."""
    order = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(seed)).to(torch.int16)
    return order.repeat(n // len(order) + 1)[:n].view(dtype)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_all_16_bit_numbers_are_rounded_as_the_reference_rounds_them(dtype, stochastic):
    """Weights, gradients and moments are every number there is, infinities and NaN with all their bits too."""
    shapes = [(1 << 16,), (1,), (2,), (1,), (1,), (1,), (2, 3)]
    for seed, scale in enumerate((1e-6, 0.3, 300.0)):
        more = {"shapes": shapes, "make": every_number, "seed": seed, "stochastic": stochastic}
        launch = perturb_launch(dtype, **more)
        launch.rest["scale"] = scale
        assert_as_the_reference(perturb, launch, cpu)
        hyper = {**HYPER, "factor": scale, "step_size": scale}
        assert_as_the_reference(descend, descend_launch("adamw", dtype, dtype, hyper=hyper, **more), cpu)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_master_weights_survive_an_update_that_changes_nothing(dtype):
    """Whatever fp32 number was split comes back, but for half a step upwards, of which bf16 keeps one bit less."""
    launch = descend_launch("sgd", dtype, "fp32", remainder="32bit", hyper={**HYPER, "lr": 0.0, "factor": 1.0})
    before = []
    for i, weight in enumerate(flat_weights(launch)):
        master = ordinary(len(weight), torch.float32, seed=i)
        reference.split(master, weight, launch.plan.part(launch.lanes["remainder"], i))
        before.append(reference.combine(weight, launch.plan.part(launch.lanes["remainder"], i)))
        assert int((bits(before[-1]) != bits(master)).sum()) <= len(master) / 2**14
    descend(cpu, launch)
    for i, weight in enumerate(flat_weights(launch)):
        assert_same_bits(reference.combine(weight, launch.plan.part(launch.lanes["remainder"], i)), before[i])
