"""The passes in plain PyTorch: the oracle of the kernels and of the C++, and what runs where no compiler is found.

Every tensor is flat. A mask is int32 words, bit i % 32 of word i // 32 for element i.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 16384
# The generator's counters are 2**32 over the golden ratio apart, as in `rounding`; _WEYL is the same number, signed.
WEYL = 0x9E3779B1
_WEYL = WEYL - (1 << 32)
_MIX = 0x2C1B3C6D


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a pass computes in: fp64 for fp64 weights, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def key_at(key: Tensor, offset: int | Tensor) -> Tensor:
    """The key, int64 in [0, 2**32), with which element 0 gets the numbers that element `offset` gets with `key`."""
    return (key.to(torch.int64) + offset * WEYL) & 0xFFFFFFFF


def random_bits(like: Tensor, key: Tensor) -> Tensor:
    """32 random bits for each element of `like`, as int32; see `rounding.random_bits`. key: scalar in [0, 2**32)."""
    counters = torch.arange(like.numel(), dtype=torch.int32, device=key.device) * _WEYL
    x = counters + key.to(torch.int64).to(torch.int32)
    x = x ^ ((x >> 15) & 0x1FFFF)
    return x * _MIX


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
    """fp32 `x` rounded stochastically to a value `dtype` (bf16 or fp16) can hold; see `rounding.stochastic_round`.

    Args:
        x: fp32.
        rand: int32 in [-32768, 32768).
        dtype: bf16 or fp16.
    """
    noise = ((rand >> 3) | 1).to(torch.float32) * 2.0**-13 if dtype == torch.float16 else uniform(rand)
    # The power of two below |x|, with the sign of x (Rump, "Error estimation of floating-point summation", alg. 3).
    q = x * float(2**23 + 1)
    binade = q - q * (1 - 2.0**-24)
    # bf16 has 7 bits after the leading one and fp16 10; subnormals have the step of the smallest normal number.
    digits, smallest = (7, 2.0**-133) if dtype == torch.bfloat16 else (10, 2.0**-24)
    step = (binade * 2.0**-digits).abs().clamp(min=smallest)
    shift = step * (1.5 * 2**23)
    y = (x + step * noise + shift) - shift
    if dtype == torch.float16:
        y = y.clamp(-65504.0, 65504.0)
    return torch.where(x.abs() < 2.0**100, y, x)


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Mask words as booleans, one for each element of `like` [n]."""
    lane = torch.arange(32, dtype=torch.int32, device=mask.device)
    return (((mask[:, None] >> lane) & 1) != 0).view(-1)[: like.numel()]


def pack_mask(bits: Tensor) -> Tensor:
    """Booleans as mask words; the inverse of `unpack_mask`, with zeros after the end."""
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 32)).view(-1, 32)
    lane = torch.arange(32, dtype=torch.int32, device=bits.device)
    return (bits.to(torch.int32) << lane).sum(1, dtype=torch.int32)


def grad_norm_sq(grad: Tensor, weight: Tensor | None, mask: Tensor | None) -> Tensor:
    """Sum of (s g)^2 with s = |w| (ASAM, arXiv 2102.11600) if weights are given, else 1.

    Args:
        grad: gradient, fp16/bf16/fp32/fp64 [n].
        weight: weights, same type [n], or None.
        mask: int32 [ceil(n / 32)], sum over these coordinates only, or None for all.

    Returns:
        fp64 scalar; inf or NaN if any element is, counted or not, or if the sum overflows fp32.
    """
    x = grad.to(compute_dtype(grad.dtype))
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


def surrogate_gap(first: Tensor, second: Tensor) -> Tensor:
    """`<a, b>`, `<a, a>` and `<b, b>`: what GSAM's decomposition needs (arXiv 2203.08065, eq. 8).

    Args:
        first: a, fp16/bf16/fp32/fp64 [n].
        second: b, fp16/bf16/fp32/fp64 [n].

    Returns:
        fp64 [3]; inf or NaN where a tensor holds one, or where a sum overflows fp32 (no tensor being fp64).
    """
    dtype = torch.promote_types(compute_dtype(first.dtype), compute_dtype(second.dtype))
    a, b = first.to(dtype), second.to(dtype)
    return torch.stack([_total(a * b), _total(a * a), _total(b * b)])


def perturb_(
    weight: Tensor,
    grad: Tensor,
    backup: Tensor | None,
    mask: Tensor | None,
    coef: Tensor,
    adaptive: bool,
    stochastic: bool,
    zero_grad: bool,
    random: bool = False,
) -> None:
    """w <- round(w + scale * s * g), s = w^2 (ASAM, arXiv 2102.11600 eq. 9) or 1 (SAM, arXiv 2010.01412 eq. 2).

    A scale of zero leaves the weights as they are, whatever the gradient holds. With `random` each coordinate moves
    with a probability of its own draw only (ESAM's stochastic weight perturbation, arXiv 2110.03141, section 3.1).

    Args:
        weight: weights [n]; written.
        grad: gradient, same type [n]; set to zero if zero_grad.
        backup: same type [n], gets the clean weights, or None (where master weights are the backup).
        mask: int32 [ceil(n / 32)], only these coordinates move, or None for all.
        coef: fp64 [2]: scale = rho / norm, key of the random numbers, in ``[0, 2**32)``; with `random` [3]: the
            probability minus 1/2, a multiple of 2**-15.
        adaptive: ASAM's scaling.
        stochastic: round 16-bit weights stochastically.
        zero_grad: whether to clear the gradient.
        random: move a random part of the coordinates.
    """
    if backup is not None:
        backup.copy_(weight)
    w = weight.to(compute_dtype(weight.dtype))
    scale = coef[0].to(w.dtype)
    eps = scale * grad.to(w.dtype)
    if adaptive:
        eps = eps * (w * w)
    moved = eps.abs() < float("inf")
    if mask is not None:
        moved = moved & unpack_mask(mask, weight)
    if random:
        moved = moved & (uniform(low_half(random_bits(weight, coef[1]))) < coef[2].to(torch.float32))
    w = w + torch.where(moved, eps, 0.0)
    if stochastic and weight.element_size() == 2:
        w = stochastic_round(w, high_half(random_bits(weight, coef[1])), weight.dtype)
    weight.copy_(w)
    if zero_grad:
        grad.zero_()


def adamw_l2sp_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    backup: Tensor | None,
    master: Tensor | None,
    anchor: Tensor | None,
    coef: Tensor,
    stochastic: bool,
    zero_grad: bool,
    other_grad: Tensor | None = None,
    keep_orthogonal: bool = False,
    perturb: bool = False,
    ema: Tensor | None = None,
) -> None:
    """AdamW (arXiv 1711.05101, alg. 2) from the clean weights, decaying to zero or to an anchor (L2-SP, 1802.01483).

        g <- factor * g + other * other_grad  (GSAM, arXiv 2203.08065; LookSAM, 2203.02714; last term if there is one)
        m <- m + (1 - beta1) (g - m);  v <- beta2 v + (1 - beta2) g^2
        w <- w - decay (w - anchor) - step_size * m / (sqrt(v) * inv_sqrt_bias2 + eps)

    A coordinate whose scaled gradient or its square is not finite is only restored; a factor of NaN skips the whole
    update. With `perturb` the clean weights go to the backup or the master, and the weights get w + scale * m, the
    perturbation of the next step (Momentum-SAM, arXiv 2401.12033). With `ema` the average follows the new clean
    weights, see `average_`.

    Args:
        weight: weights [n]; written, and read unless a backup or a master is given.
        grad: gradient, same type [n]; set to zero if zero_grad.
        exp_avg, exp_avg_sq: moments, one float type [n]; written.
        max_exp_avg_sq: running maximum of exp_avg_sq, same type [n] (AMSGrad), or None.
        backup: clean weights, the weights' type [n], or None; written if perturb.
        master: fp32 clean weights [n]; written; or None.
        anchor: anchors, the weights' type [n], or None to decay to zero.
        coef: fp64 [9]: factor, decay, 1 - beta1, beta2, 1 - beta2, step_size, inv_sqrt_bias2, eps, key; if needed
            [12]: other, scale of the next perturbation, its key; with `ema` [13]: see `average_`.
        stochastic: round 16-bit weights and second moments stochastically, where there is no master.
        zero_grad: whether to clear the gradient.
        other_grad: a second gradient, the weights' type [n], or None.
        keep_orthogonal: do not add `other_grad` but write grad - other * other_grad over it (LookSAM's orthogonal
            component, to be used again).
        perturb: leave the weights perturbed along the new first moment; needs a backup or a master.
        ema: average of the clean weights, fp32 (fp64 for fp64 weights) [n]; written; or None.
    """
    c = coef.to(compute_dtype(weight.dtype))
    old_w = (master if master is not None else backup if backup is not None else weight).to(c.dtype)
    g = grad.to(c.dtype) * c[0]
    if other_grad is not None:
        other = c[9] * other_grad.to(c.dtype)
        if keep_orthogonal:
            other_grad.copy_(grad.to(c.dtype) - other)
        else:
            g = g + torch.where(other.abs() < float("inf"), other, 0.0)
    old_m, old_v = exp_avg.to(c.dtype), exp_avg_sq.to(c.dtype)

    m = old_m + c[2] * (g - old_m)
    v = c[3] * old_v + c[4] * (g * g)
    update = v < float("inf")
    w = old_w * (1.0 - c[1]) if anchor is None else old_w - c[1] * (old_w - anchor.to(c.dtype))
    top = v if max_exp_avg_sq is None else torch.maximum(max_exp_avg_sq.to(c.dtype), v)
    denom = top.sqrt() * c[6] + c[7]
    w = w - c[5] * torch.where(denom > 0, m / denom, 0.0)

    w = torch.where(update, w, old_w)
    v = torch.where(update, v, old_v)
    m = torch.where(update, m, old_m)
    exp_avg.copy_(m)
    if max_exp_avg_sq is not None:
        top = torch.where(update, top, max_exp_avg_sq.to(c.dtype))
    if master is not None:
        master.copy_(w)
    elif stochastic and weight.element_size() == 2:
        bits = random_bits(weight, coef[8])
        w = stochastic_round(w, high_half(bits), weight.dtype)
        if exp_avg_sq.element_size() == 2:
            v = stochastic_round(v, low_half(bits), exp_avg_sq.dtype)
            top = stochastic_round(top, low_half(bits), exp_avg_sq.dtype)
    exp_avg_sq.copy_(v)
    if max_exp_avg_sq is not None:
        max_exp_avg_sq.copy_(top)
    if perturb:
        clean = backup if master is None else master
        clean.copy_(w)
        shift_(weight, clean, exp_avg, coef, stochastic)
    else:
        weight.copy_(w)
        clean = weight if master is None else master
    if ema is not None:
        average_(ema, clean, coef)
    if zero_grad:
        grad.zero_()


def shift_(weight: Tensor, clean: Tensor, exp_avg: Tensor, coef: Tensor, stochastic: bool) -> None:
    """w <- round(clean + scale * m): the end of `adamw_l2sp_` with `perturb`, from what that has stored.

    Args:
        weight: weights [n]; written.
        clean: clean weights, the weights' type [n], or fp32 master weights.
        exp_avg: first moments, a float type [n].
        coef: as for `adamw_l2sp_`.
        stochastic: round 16-bit weights stochastically, unless `clean` is a master.
    """
    c = coef.to(compute_dtype(weight.dtype))
    eps = c[10] * exp_avg.to(c.dtype)
    w = clean.to(c.dtype) + torch.where(eps.abs() < float("inf"), eps, 0.0)
    if stochastic and clean.element_size() == 2:
        w = stochastic_round(w, high_half(random_bits(weight, coef[11])), weight.dtype)
    weight.copy_(w)


def average_(ema: Tensor, clean: Tensor, coef: Tensor) -> None:
    """ema <- ema + rate * (clean - ema) where that is a finite change: the end of `adamw_l2sp_` with `ema`.

    From what that has stored.

    Args:
        ema: fp32 (fp64 for fp64 weights) [n]; written.
        clean: clean weights, the weights' type [n], or fp32 master weights.
        coef: as for `adamw_l2sp_`; [12] is the rate, or NaN to leave the average as it is.
    """
    change = coef[12].to(ema.dtype) * (clean.to(ema.dtype) - ema)
    ema.copy_(torch.where(change.abs() < float("inf"), ema + change, ema))


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
    """How many keys agree with `prefix` above the digit, by the value of the digit.

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

    One sample's gradient is in memory at a time, or 2**16 elements of several: what stays in the cache.

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
