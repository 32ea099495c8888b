"""Balanced LoRA pairs (BAR): algorithms 2 and 3 of arXiv 2410.14802 by hand in fp64, and what is refused."""

import copy
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fsam_triton import FSAM, SAM, AdamWL2SP, ArgumentError, FishMask, MomentumSAM
from fsam_triton.optim.balance import partner_of
from fsam_triton.optim.optimizer import FusedOptimizer

pytestmark = pytest.mark.usefixtures("one_thread")

A, B = "layer.lora_A.default.weight", "layer.lora_B.default.weight"
EMBEDDING_A, EMBEDDING_B = "tokens.lora_embedding_A.default", "tokens.lora_embedding_B.default"
SHAPES = {A: (3, 32), EMBEDDING_A: (2, 9), "head.weight": (4, 6), B: (6, 3), EMBEDDING_B: (8, 2)}
LR = 0.02


class Net(nn.Module):
    """A low-rank layer, a low-rank embedding and a head; its parameters have the names that peft gives."""

    def __init__(self, dtype=torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draws = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
        draws[B].zero_()
        self.weights = {name: nn.Parameter((0.3 * draw).to(dtype)) for name, draw in draws.items()}

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.weights.items())

    def loss(self, step: int) -> Tensor:
        return loss_of(self.weights, step)


def loss_of(weights: dict[str, Tensor], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(5, n, generator=generator, dtype=torch.float64).to(weights[A].dtype) for n in (32, 4))
    tokens = torch.randint(9, (5,), generator=generator)
    hidden = x @ weights[A].T @ weights[B].T + (weights[EMBEDDING_A].T[tokens] @ weights[EMBEDDING_B].T)[:, :6]
    return (hidden.tanh() @ weights["head.weight"].T - y).square().mean()


def factor(alpha: float, lr: float, own: Tensor, other: Tensor) -> float:
    more = float(own.norm()) - float(other.norm())
    return 1 + alpha * lr * math.copysign(1, more) if more else 1.0


class ByHand:
    """nBAR and oBAR over AdamW, SGD or Lion, a loop over parameters as the paper has it."""

    def __init__(self, net: Net, by: str, alpha: float, rule="adamw", lr=None, weight_decay=0.1, max_norm=None) -> None:
        self.weights = {name: p.detach().double().clone() for name, p in net.named()}
        self.by, self.alpha, self.rule, self.max_norm = by, alpha, rule, max_norm
        self.lr, self.decay, self.count = lr or dict.fromkeys(SHAPES, LR), weight_decay, 0
        self.m, self.v = ({name: torch.zeros_like(w) for name, w in self.weights.items()} for _ in range(2))

    def gradients(self, step: int) -> dict[str, Tensor]:
        leaves = {name: w.clone().requires_grad_() for name, w in self.weights.items()}
        return dict(zip(leaves, torch.autograd.grad(loss_of(leaves, step), list(leaves.values())), strict=True))

    def step(self, grads: dict[str, Tensor]) -> None:
        self.count += 1
        factors = dict.fromkeys(self.weights, 1.0)
        for one, other in ((A, B), (EMBEDDING_A, EMBEDDING_B)):
            first, second = (one, other) if self.by == "gradients" else (other, one)
            measured = grads if self.by == "gradients" else self.weights
            factors[first] = factor(self.alpha, self.lr[first], measured[one], measured[other])
            factors[second] = factor(self.alpha, self.lr[second], measured[other], measured[one])
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        clip = 1.0 if self.max_norm is None else min(1.0, self.max_norm / (norm + 1e-6))
        for name, w in self.weights.items():
            self.weights[name] = self.updated(name, factors[name] * w, clip * grads[name])

    def updated(self, name: str, w: Tensor, g: Tensor) -> Tensor:
        lr, m, v = self.lr[name], self.m, self.v
        w = w * (1 - lr * self.decay)
        if self.rule == "sgd":
            return w - lr * g
        if self.rule == "lion":
            sign = (0.9 * m[name] + (1 - 0.9) * g).sign()
            m[name] = 0.99 * m[name] + (1 - 0.99) * g
            return w - lr * sign
        m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g * g
        denominator = (v[name] / (1 - 0.999**self.count)).sqrt() + 1e-8
        return w - lr * (m[name] / (1 - 0.9**self.count)) / denominator


def train(net: Net, optimizer, steps: int, start: int = 0, scale: float = 1.0) -> None:
    for step in range(start, start + steps):
        optimizer.zero_grad()
        (net.loss(step) * scale).backward()
        optimizer.step()


def assert_close(net: Net, by_hand: ByHand, steps: int = 50) -> None:
    """fp64: a few roundings a step, which the loss feeds back by less than it takes Adam to forget them."""
    for name, p in net.named():
        torch.testing.assert_close(p.detach(), by_hand.weights[name], rtol=0, atol=steps * 1e-12, msg=name)


every_way = pytest.mark.parametrize("by", ["gradients", "weights"])


@every_way
@pytest.mark.parametrize("rule", ["adamw", "sgd", "lion"])
def test_fifty_steps_are_those_by_hand(rule, by):
    net = Net()
    by_hand = ByHand(net, by, 2.0, rule)
    optimizer = FusedOptimizer(net.named(), rule, LR, weight_decay=0.1, balance=2.0, balance_by=by)
    for step in range(50):
        train(net, optimizer, 1, step)
        by_hand.step(by_hand.gradients(step))
    assert_close(net, by_hand)


@every_way
def test_pairs_in_groups_of_their_own_have_their_own_learning_rates(by):
    """LoRA+ (arXiv 2402.12354); the matrices are in the groups in another order than in the model."""
    net, weights = Net(), dict(Net().named())
    rates = {name: 4 * LR if "_B." in name else LR for name in weights}
    by_hand = ByHand(net, by, 1.5, lr=rates)
    named = net.named()
    groups = [
        {"params": [pair for pair in reversed(named) if rates[pair[0]] == rate], "lr": rate} for rate in (4 * LR, LR)
    ]
    optimizer = AdamWL2SP(groups, weight_decay=0.1, balance=1.5, balance_by=by)
    for step in range(20):
        train(net, optimizer, 1, step)
        by_hand.step(by_hand.gradients(step))
    assert_close(net, by_hand)


@every_way
def test_clipping_uses_the_norm_of_all_gradients(by):
    net = Net()
    by_hand = ByHand(net, by, 1.0, max_norm=0.2)
    optimizer = AdamWL2SP(net.named(), LR, weight_decay=0.1, balance=1.0, balance_by=by, max_grad_norm=0.2)
    for step in range(20):
        train(net, optimizer, 1, step)
        by_hand.step(by_hand.gradients(step))
    assert_close(net, by_hand)


@pytest.mark.parametrize("kind", [FSAM, MomentumSAM, SAM], ids=lambda kind: kind.__name__)
@every_way
def test_descent_of_sam_is_balanced_by_its_gradient_and_its_clean_weights(kind, by):
    net = Net()
    by_hand = ByHand(net, by, 2.0)
    options = {"weight_decay": 0.1, "balance": 2.0, "balance_by": by}
    if kind is SAM:
        optimizer = SAM(AdamWL2SP(net.named(), LR, **options), rho=0.3)
    else:
        optimizer = kind(net.named(), lr=LR, rho=0.3, **options)
    for step in range(10):
        optimizer.zero_grad()
        if kind is MomentumSAM:
            optimizer.perturb()
        else:
            net.loss(step).backward()
            optimizer.perturb()
        net.loss(step).backward()
        grads = {name: p.grad.clone() for name, p in net.named()}
        optimizer.step()
        by_hand.step(grads)
        assert_close(net, by_hand)


def test_scale_of_a_grad_scaler_cancels_to_the_bit():
    plain, scaled = Net(torch.float32), Net(torch.float32)
    one, other = (AdamWL2SP(net.named(), LR, balance=2.0) for net in (plain, scaled))
    train(plain, one, 5)
    other.grad_scale, other.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    train(scaled, other, 5, scale=1024.0)
    for (name, p), (_, q) in zip(plain.named(), scaled.named(), strict=True):
        assert torch.equal(p, q), name


def test_skipped_step_balances_nothing():
    net = Net(torch.float32)
    optimizer = AdamWL2SP(net.named(), LR, balance=2.0)
    train(net, optimizer, 1)
    before = copy.deepcopy(net.weights)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    train(net, optimizer, 1, 1)
    assert all(torch.equal(p, before[name]) for name, p in net.named())


@every_way
def test_pair_of_which_one_has_no_gradient_is_left_as_without(by):
    net, plain = Net(), Net()
    pairs = [(net, AdamWL2SP(net.named(), LR, balance=2.0, balance_by=by)), (plain, AdamWL2SP(plain.named(), LR))]
    for one, optimizer in pairs:
        one.loss(0).backward()
        one.weights[B].grad = one.weights[EMBEDDING_B].grad = None
        optimizer.step()
    assert all(torch.equal(p, plain.weights[name]) for name, p in net.named())


def test_gradient_that_is_not_finite_balances_nothing():
    net, plain = Net(), Net()
    for one, optimizer in [(net, AdamWL2SP(net.named(), LR, balance=2.0)), (plain, AdamWL2SP(plain.named(), LR))]:
        one.loss(0).backward()
        one.weights[A].grad[0, 0] = math.inf
        one.weights[EMBEDDING_A].grad.fill_(math.nan)
        optimizer.step()
    assert all(torch.equal(p, plain.weights[name]) for name, p in net.named())


def test_pair_whose_matrices_are_kept_in_different_formats_is_balanced():
    """Rows of 32 elements have codes of 8 bits, others have floats: two launches."""
    net = Net(torch.float32)
    options = {"weight_decay": 0.0, "balance": 2.0, "state_format": "8bit"}
    optimizer = AdamWL2SP(net.named(), LR, **options)
    net.loss(0).backward()
    first, second = (net.weights[name].grad.clone() for name in (A, B))
    before = {name: net.weights[name].detach().double().clone() for name in (A, B)}
    optimizer.step()
    assert [len(lanes) for lanes in optimizer.ledger] == [1, 4]
    for name, own, other in ((A, first, second), (B, second, first)):
        # The first step of Adam is lr sign(g), for gradients far above eps.
        expected = before[name] * factor(2.0, LR, own, other) - LR * own.double() / (own.double().abs() + 1e-8)
        torch.testing.assert_close(net.weights[name].detach().double(), expected, rtol=2e-6, atol=2e-6)


def test_strength_may_change_during_training():
    net, plain = Net(), Net()
    optimizer, other = AdamWL2SP(net.named(), LR, balance=2.0), AdamWL2SP(plain.named(), LR)
    optimizer.param_groups[0]["balance"] = 0.0
    train(net, optimizer, 3)
    train(plain, other, 3)
    assert all(torch.equal(p, plain.weights[name]) for name, p in net.named())
    optimizer.param_groups[0]["balance"] = 1.0
    train(net, optimizer, 1, 3)
    train(plain, other, 1, 3)
    assert not torch.equal(net.weights[A], plain.weights[A])
    assert torch.equal(net.weights["head.weight"], plain.weights["head.weight"])


@every_way
def test_resumed_run_has_the_bits_of_one_that_was_not_interrupted(by):
    whole = Net(torch.bfloat16)
    options = {"balance": 2.0, "balance_by": by, "master_weights": True}
    optimizer = AdamWL2SP(whole.named(), LR, **options)
    train(whole, optimizer, 3)
    half, state = copy.deepcopy(whole), copy.deepcopy(optimizer.state_dict())
    train(whole, optimizer, 3, 3)
    resumed = AdamWL2SP(half.named(), LR, **{**options, "balance": 0.0})
    resumed.load_state_dict(state)
    train(half, resumed, 3, 3)
    assert all(torch.equal(p, half.weights[name]) for name, p in whole.named())


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copied_optimizer_balances_its_own_parameters(again):
    net = Net()
    optimizer = AdamWL2SP(net.named(), LR, balance=2.0)
    train(net, optimizer, 2)
    other, copied = again((net, optimizer))
    train(net, optimizer, 2, 2)
    train(other, copied, 2, 2)
    assert all(torch.equal(p, other.weights[name]) for name, p in net.named())


def test_names_of_pairs():
    assert partner_of("base_model.model.lm_head.lora_B.other.weight") == "base_model.model.lm_head.lora_A.other.weight"
    assert partner_of("wte.lora_embedding_B.default") == "wte.lora_embedding_A.default"
    assert partner_of("model.layers.0.mlp.up_proj.weight") is None


WRONG = {
    "names": ("balance", lambda net: {"params": list(net.weights.values())}),
    "pairs": ("balance", lambda net: {"params": [pair for pair in net.named() if "_B" not in pair[0]]}),
    "frozen": ("balance", lambda net: {"params": [(n, p.requires_grad_("_A" not in n)) for n, p in net.named()]}),
    "negative": ("balance", lambda net: {"params": net.named(), "balance": -1.0}),
    "not finite": ("balance", lambda net: {"params": net.named(), "balance": math.inf}),
    "by": ("balance_by", lambda net: {"params": net.named(), "balance_by": "norms"}),
    "l2-sp": ("l2_sp", lambda net: {"params": net.named(), "l2_sp": 0.1}),
    "mask": ("trainable", lambda net: {"params": net.named(), "trainable": FishMask({}, {})}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_balanced_is_refused(wrong):
    name, make = WRONG[wrong]
    with pytest.raises(ArgumentError) as error:
        AdamWL2SP(**{"lr": LR, "balance": 1.0, **make(Net())})
    assert error.value.name == name


def test_momentum_of_sgd_is_refused():
    """Its decay is a part of the gradient, which the momentum would add up."""
    with pytest.raises(ArgumentError, match="momentum"):
        FSAM(Net().named(), rule="sgd", momentum=0.9, balance=1.0)


def test_sharded_adapters_are_refused():
    """A norm of a shard is not that of the matrix."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        named = [(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))) for name, p in Net().named()]
        with pytest.raises(ArgumentError, match="is sharded"):
            AdamWL2SP(named, LR, balance=1.0)
        AdamWL2SP(named, LR)
    finally:
        dist.destroy_process_group()


def test_released_gradients_are_refused():
    with pytest.raises(ArgumentError, match="balance"):
        AdamWL2SP(Net().named(), LR, balance=1.0).release_gradients()


def test_weights_cannot_be_compared_while_only_their_steps_are_known():
    net = Net(torch.bfloat16)
    optimizer = FSAM(net.named(), lr=LR, balance=1.0, balance_by="weights", backup_format="8bit")
    net.loss(0).backward()
    optimizer.perturb()
    net.loss(0).backward()
    with pytest.raises(ArgumentError, match="balance_by"):
        optimizer.step()
    assert not optimizer.perturbed
