"""The rules by which `descend` updates weights, one function each, in the compute type."""

import triton
import triton.language as tl

from . import spec
from .rounding import quotient

# The first columns are those of every rule.
_DECAY = tl.constexpr(spec.DESCEND["adamw"].index("decay"))


def _columns(rule: str, *names: str) -> list[tl.constexpr]:
    return [tl.constexpr(spec.DESCEND[rule].index(name)) for name in names]


_ADAMW_NEW1, _BETA2, _ADAMW_NEW2, _STEP_SIZE, _INV_SQRT_BIAS2, _EPS = _columns(
    "adamw", "new1", "beta2", "new2", "step_size", "inv_sqrt_bias2", "eps"
)
_MOMENTUM, _NEW, _OF_GRAD, _OF_BUFFER, _SGD_LR = _columns("sgd", "momentum", "new", "of_grad", "of_buffer", "lr")
_BETA1, _LION_NEW1, _LION_NEW2, _LION_LR = _columns("lion", "beta1", "new1", "new2", "lr")


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
