"""The rules by which `descend` updates weights: a function of the elements, and one that makes its coefficients."""

import triton
import triton.language as tl

from . import spec
from .rounding import quotient

# The first columns are those of every rule.
_DECAY = tl.constexpr(spec.DESCEND["adamw"].index("decay"))
_LR = tl.constexpr(spec.NUMBERS["adamw"].index("lr"))


def _columns(columns: tuple[str, ...], *names: str) -> list[tl.constexpr]:
    return [tl.constexpr(columns.index(name)) for name in names]


# Of the coefficients.
_ADAMW_NEW1, _BETA2, _ADAMW_NEW2, _STEP_SIZE, _INV_SQRT_BIAS2, _EPS = _columns(
    spec.DESCEND["adamw"], "new1", "beta2", "new2", "step_size", "inv_sqrt_bias2", "eps"
)
_MOMENTUM, _NEW, _OF_GRAD, _OF_BUFFER, _SGD_LR = _columns(
    spec.DESCEND["sgd"], "momentum", "new", "of_grad", "of_buffer", "lr"
)
_BETA1, _LION_NEW1, _LION_NEW2, _LION_LR = _columns(spec.DESCEND["lion"], "beta1", "new1", "new2", "lr")
# Of the hyper-parameters that they are made of.
_FROM_BETA1, _FROM_BETA2, _FROM_EPS = _columns(spec.NUMBERS["adamw"], "beta1", "beta2", "eps")
_FROM_MOMENTUM, _FROM_NEW, _FROM_OF_GRAD, _FROM_OF_BUFFER = _columns(
    spec.NUMBERS["sgd"], "momentum", "new", "of_grad", "of_buffer"
)
_FROM_LION_BETA1, _FROM_LION_BETA2 = _columns(spec.NUMBERS["lion"], "beta1", "beta2")


@triton.jit
def adamw(coef_ptr, w, g, anchor, state):
    """AdamW (arXiv 1711.05101, algorithm 2), decaying to zero or to an anchor (L2-SP, 1802.01483).

    m <- m + new1 (g - m);  v <- beta2 v + new2 g^2;  top <- max(top, v)  (amsgrad; else top is v)
    w <- w - decay (w - anchor) - step_size m / (sqrt(top) inv_sqrt_bias2 + eps)

    where m / 0 is 0. The square root and the division are the device's fast ones (1 and 2 ulp in fp32).

    Args:
        coef_ptr: the segment's row of coefficients.
        w, g: clean weights and gradients.
        anchor: or None.
        state: m, v and, with amsgrad, top.

    Returns:
        New weights, new state, and where they hold: where they are finite.
    """
    m = state[0] + tl.load(coef_ptr + _ADAMW_NEW1) * (g - state[0])
    v = tl.load(coef_ptr + _BETA2) * state[1] + tl.load(coef_ptr + _ADAMW_NEW2) * (g * g)
    w = _decayed(coef_ptr, w, anchor)
    if len(state) == 3:
        top = tl.maximum(state[2], v, propagate_nan=tl.PropagateNan.ALL)
        new_state = (m, v, top)
    else:
        top = v
        new_state = (m, v)
    denom = tl.sqrt(top) * tl.load(coef_ptr + _INV_SQRT_BIAS2) + tl.load(coef_ptr + _EPS)
    w -= tl.load(coef_ptr + _STEP_SIZE) * quotient(m, denom)
    return w, new_state, v < float("inf")


@triton.jit
def sgd(coef_ptr, w, g, anchor, state):
    """SGD with momentum, as torch.optim.SGD has it: the decay is a part of the gradient.

    d = g + decay (w - anchor);  buffer <- momentum buffer + new d;  w <- w - lr (of_grad d + of_buffer buffer)

    Args and result as those of `adamw`. The state is the buffer, or empty: then w <- w - lr d.
    """
    d = g + tl.load(coef_ptr + _DECAY) * (w if anchor is None else w - anchor)
    lr = tl.load(coef_ptr + _SGD_LR)
    if len(state) == 0:
        return w - lr * d, state, tl.abs(d) < float("inf")
    else:
        buffer = tl.load(coef_ptr + _MOMENTUM) * state[0] + tl.load(coef_ptr + _NEW) * d
        step = tl.load(coef_ptr + _OF_GRAD) * d + tl.load(coef_ptr + _OF_BUFFER) * buffer
        return w - lr * step, (buffer,), tl.abs(buffer) < float("inf")


@triton.jit
def lion(coef_ptr, w, g, anchor, state):
    """Lion (arXiv 2302.06675, algorithm 2), decaying like AdamW.

    w <- w - decay (w - anchor) - lr sign(beta1 m + new1 g);  m <- m + new2 (g - m)

    Args and result as those of `adamw`; the state is m.
    """
    u = tl.load(coef_ptr + _BETA1) * state[0] + tl.load(coef_ptr + _LION_NEW1) * g
    m = state[0] + tl.load(coef_ptr + _LION_NEW2) * (g - state[0])
    sign = tl.where(u > 0, 1.0, tl.where(u < 0, -1.0, 0.0)).to(w.dtype)
    w = _decayed(coef_ptr, w, anchor) - tl.load(coef_ptr + _LION_LR) * sign
    return w, (m,), tl.abs(m) < float("inf")


@triton.jit
def _decayed(coef_ptr, w, anchor):
    decay = tl.load(coef_ptr + _DECAY)
    return w * (1.0 - decay) if anchor is None else w - decay * (w - anchor)


@triton.jit
def _power(base, exponent):
    """base ** exponent for whole numbers below 2**24, fp64: exact for 1, and rounded once for 2."""
    left = exponent.to(tl.int32)
    result = tl.full(base.shape, 1.0, tl.float64)
    for _ in range(24):
        result = tl.where(left & 1 != 0, result * base, result)
        base = base * base
        left = left >> 1
    return result


@triton.jit
def adamw_row(coef_ptr, numbers_ptr, rate, step, inside):
    """AdamW's coefficients, with the bias corrections of each segment's step.

    Args:
        coef_ptr: to segments' rows of coefficients; the rule's own columns, and the decay, are written.
        numbers_ptr: to their groups' rows of hyper-parameters, fp64.
        rate: of decay.
        step: updates including this one.
        inside: which segments there are.
    """
    lr = tl.load(numbers_ptr + _LR, mask=inside)
    beta1, beta2 = tl.load(numbers_ptr + _FROM_BETA1, mask=inside), tl.load(numbers_ptr + _FROM_BETA2, mask=inside)
    tl.store(coef_ptr + _DECAY, lr * rate, mask=inside)
    tl.store(coef_ptr + _ADAMW_NEW1, 1 - beta1, mask=inside)
    tl.store(coef_ptr + _BETA2, beta2, mask=inside)
    tl.store(coef_ptr + _ADAMW_NEW2, 1 - beta2, mask=inside)
    tl.store(coef_ptr + _STEP_SIZE, lr / (1 - _power(beta1, step)), mask=inside)
    tl.store(coef_ptr + _INV_SQRT_BIAS2, 1.0 / tl.sqrt(1 - _power(beta2, step)), mask=inside)
    tl.store(coef_ptr + _EPS, tl.load(numbers_ptr + _FROM_EPS, mask=inside), mask=inside)


@triton.jit
def sgd_row(coef_ptr, numbers_ptr, rate, step, inside):
    """SGD's coefficients: the first gradient is the first momentum, undampened. Args as those of `adamw_row`."""
    first = step <= 1
    momentum, new = tl.load(numbers_ptr + _FROM_MOMENTUM, mask=inside), tl.load(numbers_ptr + _FROM_NEW, mask=inside)
    tl.store(coef_ptr + _DECAY, rate, mask=inside)
    tl.store(coef_ptr + _MOMENTUM, tl.where(first, 0.0, momentum), mask=inside)
    tl.store(coef_ptr + _NEW, tl.where(first, 1.0, new), mask=inside)
    tl.store(coef_ptr + _OF_GRAD, tl.load(numbers_ptr + _FROM_OF_GRAD, mask=inside), mask=inside)
    tl.store(coef_ptr + _OF_BUFFER, tl.load(numbers_ptr + _FROM_OF_BUFFER, mask=inside), mask=inside)
    tl.store(coef_ptr + _SGD_LR, tl.load(numbers_ptr + _LR, mask=inside), mask=inside)


@triton.jit
def lion_row(coef_ptr, numbers_ptr, rate, step, inside):
    """Lion's coefficients. Args as those of `adamw_row`."""
    lr = tl.load(numbers_ptr + _LR, mask=inside)
    beta1 = tl.load(numbers_ptr + _FROM_LION_BETA1, mask=inside)
    beta2 = tl.load(numbers_ptr + _FROM_LION_BETA2, mask=inside)
    tl.store(coef_ptr + _DECAY, lr * rate, mask=inside)
    tl.store(coef_ptr + _BETA1, beta1, mask=inside)
    tl.store(coef_ptr + _LION_NEW1, 1 - beta1, mask=inside)
    tl.store(coef_ptr + _LION_NEW2, 1 - beta2, mask=inside)
    tl.store(coef_ptr + _LION_LR, lr, mask=inside)
