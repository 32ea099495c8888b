"""State of 8 or 16 bits, and master weights of 24: what a step makes of them, how they are saved, shown and edited."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fsam_triton import FSAM, AdamWL2SP, FishMask, MomentumSAM
from fsam_triton.errors import ArgumentError
from fsam_triton.kernels import formats, spec

pytestmark = pytest.mark.usefixtures("one_thread")
BF16, FP32 = torch.bfloat16, torch.float32
EIGHT = {"state_format": "8bit"}
SMALL = {"state_format": "8bit", "master_weights": "24bit"}


def make_model(dtype: torch.dtype = FP32) -> nn.Module:
    torch.manual_seed(0)
    # The last weight's rows are no whole groups.
    model = nn.Sequential(nn.Conv2d(2, 8, 4), nn.Flatten(), nn.Linear(128, 24), nn.Tanh(), nn.Linear(24, 3))
    return model.to(dtype)


def give(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        scale = torch.exp2(-8 * torch.rand(p.shape, generator=generator))
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int = 0, stop: int = 5) -> None:
    for step in range(start, stop):
        if isinstance(optimizer, FSAM):
            give(model, 1000 + step)
            optimizer.perturb()
        if isinstance(optimizer, MomentumSAM):
            optimizer.perturb()
        give(model, step)
        optimizer.step()


def floats(optimizer: torch.optim.Optimizer, p: Tensor, name: str) -> Tensor:
    state = optimizer.state[p]
    if f"{name}_scale" not in state:
        return state[name].double()
    codes = state[name].as_strided((p.numel(),), (1,))
    return formats.decode(codes, state[f"{name}_scale"].flatten()).double().view_as(p)


# -- what a step does --------------------------------------------------------------------------------------------------


def adamw_in_fp64(w: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    denom = (v / (1 - 0.999**step)).sqrt() + 1e-8
    return w * (1 - 1e-2 * 0.01) - 1e-2 * (m / (1 - 0.9**step)) / denom, m, v


@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
def test_step_is_adamws_in_fp64_on_the_stored_moments_which_are_rounded_afterwards(stochastic):
    model = make_model()
    optimizer = AdamWL2SP(model.parameters(), lr=1e-2, stochastic_rounding=stochastic, **EIGHT)
    for step in range(1, 8):
        before = {}
        for p in model.parameters():
            new = torch.zeros_like(p, dtype=torch.float64)
            moments = [floats(optimizer, p, n) if optimizer.state else new for n in ("exp_avg", "exp_avg_sq")]
            before[p] = (p.detach().double().clone(), *moments)
        give(model, step)
        optimizer.step()
        for p, (w, m, v) in before.items():
            w, m, v = adamw_in_fp64(w, p.grad.double(), m, v, step)
            torch.testing.assert_close(p.detach().double(), w, rtol=1e-6, atol=2e-7)
            for name, exact, power, levels in (("exp_avg", m, 2, 127), ("exp_avg_sq", v, 4, 255)):
                kept = floats(optimizer, p, name)
                if f"{name}_scale" not in optimizer.state[p]:
                    torch.testing.assert_close(kept, exact, rtol=1e-5, atol=1e-9)
                    continue
                scale = optimizer.state[p][f"{name}_scale"].double().flatten().repeat_interleave(spec.GROUP)
                root = (exact.abs().flatten() / scale) ** (1 / power)
                stored = (kept.abs().flatten() / scale) ** (1 / power)
                same_sign = (kept.sign() * exact.sign()).flatten() >= 0
                bound = (1.001 if stochastic else 0.501) / levels
                low = (root < 1 / levels) & (power == 4)
                assert same_sign.all()
                assert ((stored - root).abs() <= bound)[~low].all()
                assert (stored <= 1.001 / levels)[low].all()


@pytest.mark.parametrize("rule", ["sgd", "lion"])
def test_other_rules_have_their_momentum_in_8_bits(rule):
    """Over some steps it is what it is in fp32, to within the rounding of codes."""
    momentum = {"momentum": 0.9} if rule == "sgd" else {}
    models = [make_model(), make_model()]
    optimizers = [
        FSAM(model.parameters(), rule=rule, lr=1e-3, **momentum, **more)
        for model, more in zip(models, ({}, EIGHT), strict=True)
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer)
    name = spec.STATE[rule][0]
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        exact, kept = floats(optimizers[0], p, name), floats(optimizers[1], q, name)
        if p.dim() > 1 and p[0].numel() % spec.GROUP == 0:
            assert optimizers[1].state[q][name].dtype == torch.int8
            assert 0 < (kept - exact).norm() < 0.04 * exact.norm()
        else:
            assert (kept - exact).norm() <= 1e-5 * exact.norm()


def test_moments_die_out_without_gradients():
    """With rounding to nearest second moments would stay as they are: a step takes less than half a code from them."""
    p = nn.Parameter(torch.ones(8, 32))
    optimizer = AdamWL2SP([p], lr=0.0, **EIGHT)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = torch.zeros_like(p)
    # One element keeps its second moment, and so its group the scale.
    p.grad[:, 0] = 0.001**0.5
    start = floats(optimizer, p, "exp_avg_sq")[:, 1:].mean()
    for _ in range(700):
        optimizer.step()
    left = floats(optimizer, p, "exp_avg_sq")[:, 1:]
    assert float(left.mean() / start) == pytest.approx(0.999**700, rel=0.05)
    assert not floats(optimizer, p, "exp_avg")[:, 1:].any()


def test_24_bit_master_weights_are_followed_by_the_weights_and_lose_nothing_on_the_average():
    """Steps of a thousandth of the last bit of bf16."""
    p = nn.Parameter(torch.ones(64, 64, dtype=BF16))
    optimizer = AdamWL2SP([p], lr=4e-6, weight_decay=0.0, master_weights="24bit")
    for _ in range(500):
        p.grad = torch.ones_like(p)
        optimizer.step()
    master = optimizer.master_weight(p)
    assert float(1 - master.mean()) == pytest.approx(500 * 4e-6, rel=0.01)
    assert (p.detach().float() - master).abs().max() <= 2.0**-9
    assert optimizer.state[p]["remainder"].dtype == torch.int8


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16])
def test_formats_of_16_and_32_bits(dtype):
    for state_format, expected in (("bf16", BF16), ("fp32", FP32)):
        model = make_model(dtype)
        optimizer = AdamWL2SP(model.parameters(), lr=1e-3, state_format=state_format)
        train(model, optimizer)
        assert {optimizer.state[p]["exp_avg"].dtype for p in model.parameters()} == {expected}


def test_bf16_moments_of_fp32_weights_are_close_to_fp32_ones():
    results = []
    for state_format in (None, "bf16"):
        model = make_model()
        train(model, AdamWL2SP(model.parameters(), lr=1e-3, state_format=state_format), stop=20)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    moved = (results[0] - torch.cat([p.detach().flatten() for p in make_model().parameters()])).norm()
    assert 0 < (results[1] - results[0]).norm() < 0.02 * moved


# -- which tensors, and how many bytes ---------------------------------------------------------------------------------


def test_whole_rows_of_groups_are_coded_and_no_other_tensor():
    model = make_model()
    optimizer = AdamWL2SP(model.parameters(), **EIGHT)
    train(model, optimizer, stop=1)
    kinds = {name: optimizer.state[p]["exp_avg"].dtype for name, p in model.named_parameters()}
    coded = {"0.weight", "2.weight"}
    assert {name for name, dtype in kinds.items() if dtype == torch.int8} == coded
    assert {dtype for name, dtype in kinds.items() if name not in coded} == {FP32}


@pytest.mark.parametrize("kind", [FSAM, MomentumSAM])
def test_everything_takes_eight_bytes_and_an_eighth(kind):
    p = nn.Parameter(torch.ones(64, 64, dtype=BF16))
    optimizer = kind([p], backup_format="8bit", **SMALL)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.perturb()
        p.grad = torch.ones_like(p)
        optimizer.step()
    own = sum(lane.nbytes for lanes in optimizer.ledger for lane in lanes.lanes.values())
    assert p.nbytes + p.grad.nbytes + own == 8.125 * p.numel()


def test_groups_have_formats_of_their_own():
    model = make_model(BF16)
    groups = [{"params": model[2].parameters(), **EIGHT}, {"params": model[4].parameters()}]
    optimizer = AdamWL2SP(groups, lr=1e-3)
    train(model, optimizer)
    assert optimizer.state[model[2].weight]["exp_avg"].dtype == torch.int8
    assert optimizer.state[model[4].weight]["exp_avg"].dtype == BF16


# -- the state is the truth --------------------------------------------------------------------------------------------


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("kind", [AdamWL2SP, FSAM, MomentumSAM])
def test_training_resumes_to_the_bit(kind, tmp_path):
    more = {} if kind is AdamWL2SP else {"backup_format": "8bit"}
    model = make_model(BF16)
    optimizer = kind(model.parameters(), lr=1e-2, amsgrad=True, **SMALL, **more)
    train(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    train(model, optimizer, 5, 9)
    other = make_model(BF16)
    resumed = kind(other.parameters(), lr=1e-2, amsgrad=True, **SMALL, **more)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, 5, 9)
    assert_same(weights(model), weights(other))
    third = copy.deepcopy((model, optimizer))
    train(model, optimizer, 9, 11)
    train(*third, 9, 11)
    assert_same(weights(model), weights(third[0]))


def test_state_of_torchs_adamw_is_coded_and_given_back_as_floats():
    model = make_model()
    plain = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, plain)
    coded = AdamWL2SP(model.parameters(), lr=1e-2, **EIGHT)
    coded.load_state_dict(plain.state_dict())
    names = ("exp_avg", "exp_avg_sq")
    for p in model.parameters():
        for name in names:
            kept, exact = floats(coded, p, name), plain.state[p][name].double()
            assert (kept - exact).norm() <= (0.03 if p.dim() > 1 else 1e-6) * exact.norm()
    again = torch.optim.AdamW(model.parameters(), lr=1e-2)
    again.load_state_dict(coded.float_state_dict())
    for p in model.parameters():
        assert again.state[p].keys() == {"step", *names}
        for name in names:
            assert torch.equal(again.state[p][name].double(), floats(coded, p, name))
    train(model, again, 5, 7)


def test_codes_are_loaded_as_floats_where_there_are_to_be_none_and_the_format_stays():
    model = make_model(BF16)
    coded = AdamWL2SP(model.parameters(), lr=1e-2, **SMALL)
    train(model, coded)
    plain = AdamWL2SP(model.parameters(), lr=1e-2, master_weights="32bit")
    plain.load_state_dict(coded.state_dict())
    assert plain.param_groups[0]["state_format"] is None
    for p in model.parameters():
        assert plain.state[p].keys() == {"step", "exp_avg", "exp_avg_sq", "remainder"}
        assert torch.equal(floats(plain, p, "exp_avg"), floats(coded, p, "exp_avg"))
        # 32 bits hold what 24 bits hold.
        assert torch.equal(plain.master_weight(p), coded.master_weight(p))
    train(model, plain, 5, 7)
    back = AdamWL2SP(model.parameters(), lr=1e-2, **SMALL)
    back.load_state_dict(plain.state_dict())
    for p in model.parameters():
        # To nearest, except that half a step of bf16 upwards is one step less.
        exact = plain.master_weight(p)
        assert ((back.master_weight(p) - exact).abs() <= exact.abs() * 2.0**-15).all()


def test_entries_may_be_replaced_by_floats_or_codes_reset_and_deleted():
    model = make_model()
    optimizer = AdamWL2SP(model.parameters(), lr=1e-2, **EIGHT)
    train(model, optimizer)
    p = model[2].weight
    state = optimizer.state[p]
    state["exp_avg"] = torch.full_like(p, 0.5)
    state["exp_avg_sq"].zero_()
    before, steps = p.detach().double().clone(), int(state["step"])
    give(model, 5)
    optimizer.step()
    state = optimizer.state[p]
    assert state["exp_avg"].dtype == torch.int8
    zeros, halves = torch.zeros_like(before), torch.full_like(before, 0.5)
    expected, _, _ = adamw_in_fp64(before, p.grad.double(), halves, zeros, steps + 1)
    torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-5)
    del optimizer.state[p]
    before = p.detach().double().clone()
    optimizer.step()
    expected, _, _ = adamw_in_fp64(before, p.grad.double(), zeros, zeros, 1)
    torch.testing.assert_close(p.detach().double(), expected, rtol=1e-6, atol=2e-7)
    assert optimizer.state[p].keys() == state.keys()


def test_parameters_in_other_orders_of_memory():
    """Groups of elements follow memory, where a convolution's weight may have its channels last."""
    results = []
    for memory in (torch.contiguous_format, torch.channels_last):
        model = make_model()
        model[0].weight.data = model[0].weight.data.contiguous(memory_format=memory)
        optimizer = AdamWL2SP(model.parameters(), lr=1e-2, stochastic_rounding=False, **EIGHT)
        train(model, optimizer)
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        train(model, optimizer, 5, 7)
        results.append(model[0].weight.detach().contiguous())
    assert (results[0] - results[1]).norm() < 0.05 * (results[0] - make_model()[0].weight).norm()


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "arguments", "name"),
    [
        (FP32, {"state_format": "4bit"}, "state_format"),
        (FP32, {"master_weights": "16bit"}, "master_weights"),
        (torch.float64, {"state_format": "8bit"}, "state_format"),
        (torch.float16, {"master_weights": "24bit"}, "master_weights"),
    ],
)
def test_formats_that_cannot_be_are_refused(dtype, arguments, name):
    with pytest.raises(ArgumentError) as info:
        AdamWL2SP(make_model(dtype).parameters(), **arguments)
    assert info.value.name == name


def test_selected_weights_have_no_codes():
    model = make_model()
    mask = FishMask.from_scores({name: torch.rand(p.shape) for name, p in model.named_parameters()}, 0.1)
    with pytest.raises(ArgumentError, match="state_format"):
        AdamWL2SP(model.named_parameters(), trainable=mask, **EIGHT)


@pytest.mark.parametrize("kind", [FSAM, MomentumSAM])
def test_backups_of_other_formats_are_refused(kind):
    with pytest.raises(ArgumentError, match="backup_format"):
        kind(make_model().parameters(), backup_format="16bit")
