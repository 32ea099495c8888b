"""The passes in plain PyTorch: the oracle for the kernels and the C++, and the fallback without a compiler.

The functions of a pass work on one segment, in flat tensors; `norm_sq`, `gap`, `perturb_` and `descend_` at the end run
them over all segments of a launch. A mask is int32 words: bit i % 32 of word i // 32 belongs to element i.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from . import spec
from .directions import Along, direction
from .formats import combine, decode, displace, encode, replace, split
from .formulas import climb_coefficients as climb_coefficients
from .formulas import descend_coefficients as descend_coefficients
from .formulas import key_at as key_at
from .segments import Segments
from .spec import CHUNK

# The same number, signed.
_WEYL = spec.WEYL - (1 << 32)
# Of a rule: the new weight, the new state, and where both are finite.
Updated = tuple[Tensor, tuple[Tensor, ...], Tensor]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a pass computes in: fp64 for fp64 weights, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_bits(like: Tensor, key: Tensor) -> Tensor:
    """32 random bits for each element of `like`, as int32; see `rounding.random_bits`. key: scalar in [0, 2**32)."""
    counters = torch.arange(like.numel(), dtype=torch.int32, device=key.device) * _WEYL
    x = counters + key.to(torch.int64).to(torch.int32)
    x = x ^ ((x >> 15) & 0x1FFFF)
    return x * spec.MIX


def normals(like: Tensor, key: Tensor) -> Tensor:
    """A nearly Gaussian number for each element of `like`, fp32 or fp64 according to its compute type.

    It is a cubic polynomial of the sum of four bytes, which are uniform over the generator's whole cycle of 2**32
    numbers. Over the cycle, mean and skewness are 0, the variance is 1 and the kurtosis 3, as for a Gaussian, to six
    digits; the distribution function is within 0.0021 of a Gaussian's, the sixth moment is 14.46 instead of 15, and no
    number is larger than 4.05. Another key gives the numbers from another place in the same cycle.

    Args:
        like: of any shape, taken in the order of memory if it is dense.
        key: scalar in [0, 2**32).
    """
    bits = random_bits(like, key)
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * spec.MIXES[0]
    pairs = (bits & 0x00FF00FF) + ((bits >> 8) & 0x00FF00FF)
    t = ((pairs & 0xFFFF) + (pairs >> 16) - spec.NOISE_CENTRE).to(compute_dtype(like.dtype))
    return t * (spec.NOISE_LINEAR + spec.NOISE_CUBIC * (t * t))


def add_noise_(out: Tensor, weight: Tensor, scale: Tensor, key: int, by_column: bool) -> None:
    """out <- weight + scale z, with nearly Gaussian z (see `normals`) that depend only on the key and the place.

    Args:
        out: [rows, columns], contiguous, of any float type; may be the weight itself; written.
        weight: [rows, columns], contiguous.
        scale: of the noise, [rows], or [columns] if `by_column`, in the type that the weight is computed in.
        key: of the random numbers, in [0, 2**32).
        by_column: each column has its own scale, instead of each row.
    """
    z = normals(weight.view(-1), torch.tensor(key, device=weight.device)).view_as(weight)
    out.copy_(weight.to(z.dtype) + (scale if by_column else scale[:, None]) * z)


def high_half(bits: Tensor) -> Tensor:
    """Upper 16 of 32 random bits, as int32 in [-32768, 32768)."""
    return bits >> 16


def low_half(bits: Tensor) -> Tensor:
    """16 bits that do not depend on `high_half(bits)`, as int32 in [-32768, 32768)."""
    return ((bits ^ (bits >> 16)) << 16) >> 16


def uniform(rand: Tensor) -> Tensor:
    """Integers in [-32768, 32768) as fp32 in (-1/2, 1/2): odd multiples of 2**-16."""
    return (rand | 1).to(torch.float32) * 2.0**-16


def stochastic_round(x: Tensor, rand: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 `x` rounded to one of its two neighbours in `dtype`, so that the mean over `rand` is `x`.

    bf16 numbers are the upper halves of fp32 ones: a random number is added to the bits and the lower half cut off,
    which rounds away from zero with a probability of exactly the lower half's share. fp16: `round(x + (U - 1/2) step)`,
    U uniform on odd multiples of 2**-13. A value that `dtype` can hold stays as it is, and a finite one stays finite.

    Args:
        x: fp32.
        rand: int32 in [-32768, 32768).
        dtype: bf16 or fp16.

    Returns:
        fp32 values that `dtype` can hold, where abs(x) < 2**100; others are left as they are.
    """
    if dtype == torch.bfloat16:
        y = ((x.view(torch.int32) + (rand & 0xFFFF)) & -0x10000).view(torch.float32)
        return torch.where(x.abs() < spec.LARGE, y, x)
    # The power of two below |x|, with the sign of x (Rump, "Error estimation of floating-point summation", alg. 3).
    q = x * float(2**23 + 1)
    binade = q - q * (1 - 2.0**-24)
    # fp16 has 10 bits after the leading one; subnormals have the step of the smallest normal number.
    step = (binade * 2.0**-10).abs().clamp(min=2.0**-24)
    shift = step * (1.5 * 2**23)
    y = (x + step * (((rand >> 3) | 1).to(torch.float32) * 2.0**-13) + shift) - shift
    return torch.where(x.abs() < spec.LARGE, y.clamp(-65504.0, 65504.0), x)


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Mask words as booleans, one for each element of `like` [n]."""
    lane = torch.arange(32, dtype=torch.int32, device=mask.device)
    return (((mask[:, None] >> lane) & 1) != 0).view(-1)[: like.numel()]


def pack_mask(bits: Tensor) -> Tensor:
    """Booleans as mask words; the inverse of `unpack_mask`, with zeros after the end."""
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 32)).view(-1, 32)
    lane = torch.arange(32, dtype=torch.int32, device=bits.device)
    return (bits.to(torch.int32) << lane).sum(1, dtype=torch.int32)


def _decoded(lane: Tensor, scale: Tensor | None) -> Tensor:
    return lane.to(compute_dtype(lane.dtype)) if scale is None else decode(lane, scale)


def _direction(segments: Segments, i: int, scale: Tensor | None, along: Along | None) -> tuple[Tensor, Tensor | None]:
    """What segment i goes along, and the average that it is made with, if any."""
    grad = _decoded(segments.flat("grad", i), None if scale is None else segments.plan.words(scale, i))
    if along is None:
        return grad, None
    codes = None if along.scale is None else segments.plan.words(along.scale, i)
    average = _decoded(segments.plan.part(along.lane, i), codes).to(grad.dtype)
    return direction(along.kind, grad, average, along.coef[i], along.grad_scale)


def _norm_sq(x: Tensor, weight: Tensor | None, mask: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * weight.to(x.dtype)
    if mask is not None:
        # Zero times an inf or NaN is NaN: what is not finite shows, masked or not.
        x = torch.where(unpack_mask(mask, x), x, x * 0.0)
    return _total(x * x)


def _total(x: Tensor) -> Tensor:
    """The sum of x, in fp64 over chunks."""
    whole = x.numel() // CHUNK * CHUNK
    return x[:whole].view(-1, CHUNK).sum(1).sum(dtype=torch.float64) + x[whole:].sum().to(torch.float64)


def _gap(first: Tensor, second: Tensor) -> Tensor:
    a, b = first.to(compute_dtype(first.dtype)), second.to(compute_dtype(second.dtype))
    return torch.stack([_total(a * b), _total(a * a), _total(b * b)])


def _perturb_(
    weight: Tensor,
    along: Tensor,
    backup: Tensor,
    mask: Tensor | None,
    coef: Tensor,
    key: Tensor,
    adaptive: bool,
    stochastic: bool,
    random: bool,
) -> None:
    c = _named(spec.PERTURB, coef)
    w = weight.to(coef.dtype)
    eps = c.scale * along.to(coef.dtype)
    if adaptive:
        eps = eps * (w * w)
    moved = eps.abs() < float("inf")
    if mask is not None:
        moved = moved & unpack_mask(mask, weight)
    if random:
        moved = moved & (uniform(low_half(random_bits(weight, key))) < c.chance.to(torch.float32))
    w = w + torch.where(moved, eps, 0.0)
    if stochastic and weight.element_size() == 2:
        w = stochastic_round(w, high_half(random_bits(weight, key)), weight.dtype)
    if backup.dtype == torch.int8:
        displace(weight, w.to(weight.dtype), backup)
    else:
        backup.copy_(weight)
        weight.copy_(w)


def _adamw(c: SimpleNamespace, w: Tensor, g: Tensor, anchor: Tensor | None, state: Sequence[Tensor]) -> Updated:
    """Algorithm 2 of arXiv 1711.05101; L2-SP, arXiv 1802.01483."""
    m = state[0] + c.new1 * (g - state[0])
    v = c.beta2 * state[1] + c.new2 * (g * g)
    w = w * (1.0 - c.decay) if anchor is None else w - c.decay * (w - anchor)
    top = torch.maximum(state[2], v) if len(state) == 3 else v
    denom = top.sqrt() * c.inv_sqrt_bias2 + c.eps
    w = w - c.step_size * torch.where(denom > 0, m / denom, 0.0)
    return w, (m, v, top)[: len(state)], v < float("inf")


def _sgd(c: SimpleNamespace, w: Tensor, g: Tensor, anchor: Tensor | None, state: Sequence[Tensor]) -> Updated:
    """As torch.optim.SGD, whose decay is a part of the gradient."""
    d = g + c.decay * (w if anchor is None else w - anchor)
    if not state:
        return w - c.lr * d, (), d.abs() < float("inf")
    buffer = c.momentum * state[0] + c.new * d
    return w - c.lr * (c.of_grad * d + c.of_buffer * buffer), (buffer,), buffer.abs() < float("inf")


def _lion(c: SimpleNamespace, w: Tensor, g: Tensor, anchor: Tensor | None, state: Sequence[Tensor]) -> Updated:
    """Algorithm 2 of arXiv 2302.06675."""
    u = c.beta1 * state[0] + c.new1 * g
    m = state[0] + c.new2 * (g - state[0])
    w = w * (1.0 - c.decay) if anchor is None else w - c.decay * (w - anchor)
    return w - c.lr * torch.sign(u), (m,), m.abs() < float("inf")


_RULES = {"adamw": _adamw, "sgd": _sgd, "lion": _lion}


def _descend_(
    weight: Tensor,
    clean: Tensor,
    grad: Tensor,
    other: Tensor | None,
    state: Sequence[Tensor],
    scales: Sequence[Tensor],
    steps: Tensor | None,
    remainder: Tensor | None,
    anchor: Tensor | None,
    ema: Tensor | None,
    orthogonal: Tensor | None,
    coef: Tensor,
    key: Tensor,
    rule: str,
    stochastic: bool,
) -> None:
    c, compute = _named(spec.DESCEND[rule], coef), coef.dtype
    if steps is not None:
        clean = replace(clean, steps)
    old_w = clean.to(compute) if remainder is None else combine(clean, remainder)
    own = grad.to(compute)
    g = own * c.factor
    if other is not None:
        second = c.other * other.to(compute)
        if orthogonal is not None:
            orthogonal.copy_(own - second)
        else:
            g = g + torch.where(second.abs() < float("inf"), second, 0.0)
    old_state = list(map(decode, state, scales)) if scales else [lane.to(compute) for lane in state]
    wide_anchor = None if anchor is None else anchor.to(compute)
    w, new_state, update = _RULES[rule](c, old_w, g, wide_anchor, old_state)
    w = torch.where(update, w, old_w)
    narrow = weight.element_size() == 2 or bool(scales) or any(lane.element_size() == 2 for lane in state)
    bits = random_bits(weight, key) if stochastic and narrow else None
    for i, (lane, new, old) in enumerate(zip(state, new_state, old_state, strict=True)):
        new = torch.where(update, new, old)
        if scales:
            codes, scale = encode(new, lane.dtype == torch.int8, _byte(bits, i + 1))
            lane.copy_(codes)
            scales[i].copy_(scale)
            continue
        if bits is not None and lane.element_size() == 2 and rule == "adamw" and i > 0:
            new = stochastic_round(new, low_half(bits), lane.dtype)
        lane.copy_(new)
    if remainder is not None:
        split(w, weight, remainder, _byte(bits, 0))
    else:
        if bits is not None and weight.element_size() == 2:
            w = stochastic_round(w, high_half(bits), weight.dtype)
        weight.copy_(w)
        w = weight.to(compute)
    if ema is not None:
        change = c.rate * (w - ema)
        ema.copy_(torch.where(change.abs() < float("inf"), ema + change, ema))


def _byte(bits: Tensor | None, i: int) -> Tensor | None:
    """8 of 32 random bits: the first of 24-bit master weights, others of the first two lanes in codes.

    The third lane, a maximum, is rounded to nearest: it would creep upwards.
    """
    return None if bits is None or i > 2 else bits >> 24 - 8 * i & 0xFF


def _named(columns: Sequence[str], coef: Tensor) -> SimpleNamespace:
    return SimpleNamespace(**dict(zip(columns, coef, strict=True)))


def _active(segments: Segments) -> Iterator[int]:
    return (i for i, active in enumerate(segments.active) if active and segments.plan.lengths[i])


def norm_sq(
    segments: Segments,
    adaptive: bool,
    mask: Tensor | None,
    scale: Tensor | None = None,
    along: Along | None = None,
) -> Tensor:
    """Sum of (s d)^2 over all segments, with s = abs(w) (ASAM, arXiv 2102.11600) if adaptive, else 1.

    Args:
        segments: gradients in any float type, or codes of a lane in 8 bits; and weights.
        adaptive: scale by the weights.
        mask: int32 [size / 32], sum over these coordinates only; None for all.
        scale: bf16 [size / 32], for gradients that are codes; otherwise None.
        along: the tensors from which d is computed; None for the gradient.

    Returns:
        fp64 scalar; inf or NaN if any element is, counted or not, or if the sum of a chunk overflows the compute type.
    """
    total = torch.zeros((), dtype=torch.float64, device=segments.plan.device)
    for i in _active(segments):
        words = None if mask is None else segments.plan.words(mask, i)
        weight = segments.flat("weight", i) if adaptive else None
        total = total + _norm_sq(_direction(segments, i, scale, along)[0], weight, words)
    return total


def norms_sq(segments: Segments) -> Tensor:
    """Sum of g^2 over each segment, in one pass over all of them.

    Args:
        segments: gradients in any float type.

    Returns:
        fp64 [segments]; 0 for a segment that takes no part, inf or NaN as for `norm_sq`.
    """
    total = torch.zeros(len(segments.active), dtype=torch.float64, device=segments.plan.device)
    for i in _active(segments):
        total[i] = _norm_sq(_direction(segments, i, None, None)[0], None, None)
    return total


def gap(segments: Segments) -> Tensor:
    """`<a, b>`, `<a, a>` and `<b, b>`, a the other gradients, b the gradients: GSAM's terms (arXiv 2203.08065, eq. 8).

    Returns:
        fp64 [3]; inf or NaN where a tensor holds one, or where the sum of a chunk overflows the compute type.
    """
    total = torch.zeros(3, dtype=torch.float64, device=segments.plan.device)
    for i in _active(segments):
        other = segments.flat("other", i)
        assert other is not None
        total = total + _gap(other, segments.flat("grad", i))
    return total


def perturb_(
    segments: Segments,
    backup: Tensor,
    mask: Tensor | None,
    coef: Tensor,
    key: Tensor,
    adaptive: bool,
    stochastic: bool,
    random: bool,
    scale: Tensor | None = None,
    along: Along | None = None,
) -> None:
    """backup <- w, w <- round(w + scale s d), s = w^2 (ASAM, arXiv 2102.11600 eq. 9) or 1 (SAM, 2010.01412 eq. 2).

    A weight whose eps is not finite stays. With `random`, each coordinate moves only with a probability of its own draw
    (ESAM's stochastic weight perturbation, arXiv 2110.03141, section 3.1).

    Args:
        segments: weights, written; gradients in any float type, or codes of a lane in 8 bits.
        backup: lane in the weights' type [size]; written. Or int8 for 16-bit weights: weights move by at most 127 steps
            of their type, and the lane keeps the number of steps; see `formats.displace`.
        mask: int32 [size / 32], only these coordinates move; None for all.
        coef: [segments, len(spec.PERTURB)], fp64 for fp64 weights, else fp32.
        key: of the random numbers, int32 [segments].
        adaptive: ASAM's scaling.
        stochastic: round 16-bit weights stochastically.
        random: move a random part of the coordinates.
        scale: bf16 [size / 32], for gradients that are codes; otherwise None.
        along: the tensors from which d is computed; None for the gradient. "less_average" writes the average, except
            where it is not finite, and except for segments whose scale is 0.
    """
    for i in _active(segments):
        words = None if mask is None else segments.plan.words(mask, i)
        d, average = _direction(segments, i, scale, along)
        part = segments.plan.part(backup, i)
        _perturb_(segments.flat("weight", i), d, part, words, coef[i], key[i], adaptive, stochastic, random)
        if along is not None and average is not None and along.kind == "less_average":
            lane, scale_of = segments.plan.part(along.lane, i), coef[i][spec.PERTURB.index("scale")]
            lane.copy_(torch.where((scale_of != 0) & (average.abs() < float("inf")), average, lane.to(average.dtype)))


def descend_(
    segments: Segments,
    state: Sequence[Tensor],
    remainder: Tensor | None,
    anchor: Tensor | None,
    ema: Tensor | None,
    orthogonal: Tensor | None,
    coef: Tensor,
    key: Tensor,
    rule: str,
    stochastic: bool,
    scales: Sequence[Tensor] = (),
    steps: Tensor | None = None,
) -> None:
    """One step of an optimizer's rule from the clean weights, which also undoes a perturbation.

        g <- factor * g + other * other_grad  (GSAM, arXiv 2203.08065; LookSAM, 2203.02714; last term if there is one)
        w, state <- rule(w, g, state)         (see `_adamw`, `_sgd`, `_lion`)
        ema <- ema + rate * (w - ema)         (of the new clean weights as they are stored; where that change is finite)

    A coordinate whose new state is not finite keeps its clean weight and its state; a factor of NaN skips the update.

    Args:
        segments: weights, written; gradients and second gradients in the weights' type; the places of the clean
            weights.
        state: the rule's lanes (`spec.STATE`), one float type [size]; written. Or codes, see `formats.encode`.
        remainder: of master weights, int16 or int8 (bf16) or int32 (fp16) [size]; written; see `formats.combine`. None
            without them.
        anchor: in the weights' type [size]; None to decay to zero.
        ema: average of the clean weights, in the compute type [size]; written; or None.
        orthogonal: in the weights' type [size]: receives `grad - other * other_grad` (LookSAM's component, to be used
            again), and the other gradients are not added; or None.
        coef: [segments, len(spec.DESCEND[rule])], fp64 for fp64 weights, else fp32: the compute type.
        key: of the random numbers, int32 [segments].
        rule: a name in `spec.DESCEND`.
        stochastic: round 16-bit weights without a remainder, 16-bit second moments, codes and 24-bit master weights
            stochastically.
        scales: the scales of codes, bf16 [size / 32], one for each lane of the state; written. Empty for floats.
        steps: int8 [size], how far 16-bit weights have moved from the clean ones, see `formats.displace`; or None.
    """
    for i in _active(segments):
        _descend_(
            segments.flat("weight", i),
            segments.flat("clean", i),
            segments.flat("grad", i),
            segments.flat("other", i),
            [segments.plan.part(lane, i) for lane in state],
            [segments.plan.words(scale, i) for scale in scales],
            _part(segments, steps, i),
            _part(segments, remainder, i),
            _part(segments, anchor, i),
            _part(segments, ema, i),
            _part(segments, orthogonal, i),
            coef[i],
            key[i],
            rule,
            stochastic,
        )


def _part(segments: Segments, lane: Tensor | None, i: int) -> Tensor | None:
    return None if lane is None else segments.plan.part(lane, i)


def magnitude_key(values: Tensor, wide: bool) -> Tensor:
    """Integers in the order of |values|: the bits as fp32 (int32) or, if wide, fp64 (int64); a NaN is smallest."""
    if wide:
        key = values.double().view(torch.int64) & 0x7FFFFFFFFFFFFFFF
        return torch.where(key > 0x7FF0000000000000, 0, key)
    if values.dtype == torch.bfloat16:
        key = (values.view(torch.int16).to(torch.int32) & 0x7FFF) << 16
    else:
        key = values.float().view(torch.int32) & 0x7FFFFFFF
    return torch.where(key > 0x7F800000, 0, key)


def digit_histogram(values: Tensor, prefix: Tensor, shift: int, bits: int, wide: bool) -> Tensor:
    """The number of keys that agree with `prefix` above the digit, for each value of the digit.

    Args:
        values: floats [n]; their keys are `magnitude_key(values, wide)`.
        prefix: int64 scalar, the digits of the wanted key found so far.
        shift: position of the digit's lowest bit.
        bits: width of the digit.
        wide: whether keys have 63 bits instead of 31.

    Returns:
        int64 [2**bits].
    """
    hist = torch.zeros(1 << bits, dtype=torch.int64, device=values.device)
    for chunk in values.split(1 << 20):
        key = magnitude_key(chunk, wide)
        same = (key >> (shift + bits)) == (prefix >> (shift + bits))
        hist += torch.bincount((key[same] >> shift) & ((1 << bits) - 1), minlength=1 << bits)
    return hist


def write_mask_(mask: Tensor, values: Tensor, threshold: Tensor, quota: Tensor, wide: bool) -> Tensor:
    """Bit i of the mask = key_i > threshold, or key_i == threshold and one of the first `quota` such elements.

    Args:
        mask: int32 [ceil(n / 32)]; written, bits past n as zero.
        values: floats [n].
        threshold: int64 scalar, a key.
        quota: int64 scalar, how many ties may be taken.
        wide: whether keys have 63 bits instead of 31.

    Returns:
        int64 scalar, the quota that is left.
    """
    for i in range(0, values.numel(), 1 << 20):
        key = magnitude_key(values[i : i + (1 << 20)], wide)
        tie = key == threshold
        taken = tie & (tie.cumsum(0) <= quota)
        words = pack_mask(taken | (key > threshold))
        mask[i // 32 : i // 32 + words.numel()] = words
        quota = (quota - tie.sum()).clamp(min=0)
    return quota.clone()


def gather_(
    out: Tensor, sources: Sequence[Tensor], index: Tensor, offsets: Sequence[int], counts: Sequence[int]
) -> None:
    """out[j] <- source_i[index[j]] for offsets[i] <= j < offsets[i] + counts[i]: the selected gradients.

    Args:
        out: the sources' type [n]; written in these places.
        sources: tensors of one type, dense in memory; positions count in their memory, whatever the strides.
        index: int32 or int64 [n].
        offsets, counts: one for each source.
    """
    for source, offset, count in zip(sources, offsets, counts, strict=True):
        # On CPU ten times faster than to index, and without a temporary.
        torch.index_select(_in_memory(source), 0, index[offset : offset + count], out=out[offset : offset + count])


def scatter_(
    targets: Sequence[Tensor], index: Tensor, source: Tensor, offsets: Sequence[int], counts: Sequence[int]
) -> None:
    """target_i[index[j]] <- source[j] for offsets[i] <= j < offsets[i] + counts[i]: back to their places.

    Args:
        targets: tensors of one type, dense in memory; written.
        index: int32 or int64 [n], in each target no two alike.
        source: the targets' type [n].
        offsets, counts: one for each target.
    """
    for target, offset, count in zip(targets, offsets, counts, strict=True):
        _in_memory(target).index_copy_(0, index[offset : offset + count].long(), source[offset : offset + count])


def _in_memory(tensor: Tensor) -> Tensor:
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def linear_fisher_(fisher: Tensor, inputs: Tensor, output_grads: Tensor, absolute: bool) -> None:
    """fisher <- fisher + sum_b (D_b^T A_b)^2: a linear layer's part of the Fisher information (2111.09839, eq. 6).

    Only one sample's gradient is in memory at a time, or 2**16 elements of several, which stay in the cache.

    Args:
        fisher: fp32 [out, in], or fp64 for fp64 inputs; written.
        inputs: A, the layer's inputs, fp32/bf16/fp16/fp64 [batch, positions, in].
        output_grads: D, gradients of each sample's loss by the layer's outputs, same type [batch, positions, out].
        absolute: sum |D_b^T A_b| instead of squares.
    """
    if inputs.shape[1] == 1:
        # One product is no sum: its square is the product of squares, and the sum over samples a matrix product.
        statistic = torch.abs if absolute else torch.square
        d, a = (statistic(factor[:, 0].to(fisher.dtype)) for factor in (output_grads, inputs))
        fisher.addmm_(d.T, a)
        return
    samples = max(1, (1 << 16) // max(1, fisher.numel()))
    memory = fisher.new_empty(samples, *fisher.shape)
    for d, a in zip(output_grads.split(samples), inputs.split(samples), strict=True):
        grads = torch.bmm(d.transpose(1, 2).to(fisher.dtype), a.to(fisher.dtype), out=memory[: len(d)])
        if absolute:
            fisher += grads.abs_()[0] if samples == 1 else grads.abs_().sum(0)
        elif samples == 1:
            fisher.addcmul_(grads[0], grads[0])
        else:
            fisher += grads.square_().sum(0)
