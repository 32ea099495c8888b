"""The passes in plain PyTorch: the oracle of the kernels, and what torch.compile turns into the CPU backend.

Every tensor is flat; the element-wise passes also take whole words as rows, [n / 32, 32]. A mask is int32 words, bit
i % 32 of word i // 32 for element i.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 16384
# The generator's counters are 2**32 over the golden ratio apart, as in `rounding`; _WEYL is the same number, signed.
WEYL = 0x9E3779B1
_WEYL = WEYL - (1 << 32)
_MIX = 0x2C1B3C6D
# Row length of `noise_`, and how far its counter goes from row to row (mod 2**32, signed).
COLUMNS = 1024
_ROW_WEYL = (COLUMNS * _WEYL + (1 << 31)) % (1 << 32) - (1 << 31)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a pass computes in: fp64 for fp64 weights, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _as_int32(key: Tensor) -> Tensor:
    return key.to(torch.int64).to(torch.int32)


def _mix(x: Tensor) -> Tensor:
    x = x ^ ((x >> 15) & 0x1FFFF)
    return x * _MIX


def key_at(key: Tensor, offset: int | Tensor) -> Tensor:
    """The key, int64 in [0, 2**32), with which element 0 gets the numbers that element `offset` gets with `key`."""
    return (key.to(torch.int64) + offset * WEYL) & 0xFFFFFFFF


def counters(n: int, device: torch.device | None = None) -> Tensor:
    """The generator's counters of the first n elements, int32 [n]."""
    return torch.arange(n, dtype=torch.int32, device=device) * _WEYL


def random_bits(like: Tensor, key: Tensor) -> Tensor:
    """32 random bits for each element of `like`, as int32; see `rounding.random_bits`. key: scalar in [0, 2**32)."""
    return _mix(counters(like.numel(), key.device).view(like.shape) + _as_int32(key))


def high_half(bits: Tensor) -> Tensor:
    """Upper 16 of 32 random bits, as int32 in [-32768, 32768)."""
    return bits >> 16


def low_half(bits: Tensor) -> Tensor:
    """16 bits that do not depend on `high_half(bits)`, as int32 in [-32768, 32768)."""
    return ((bits ^ (bits >> 16)) << 16) >> 16


def uniform(rand: Tensor) -> Tensor:
    """Integers in [-32768, 32768) as fp32 in (-1/2, 1/2): odd multiples of 2**-16."""
    return (rand | 1).to(torch.float32) * 2.0**-16


def dither(rand: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers in [-32768, 32768) as fp32 noise in (-1/2, 1/2): `uniform` (bf16) or odd multiples of 2**-13 (fp16)."""
    return ((rand >> 3) | 1).to(torch.float32) * 2.0**-13 if dtype == torch.float16 else uniform(rand)


def stochastic_round(x: Tensor, rand: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 `x` rounded stochastically to a value `dtype` (bf16 or fp16) can hold; see `rounding.stochastic_round`.

    Float operations alone: under torch.compile on CPU a look at the bits of a computed value costs several times more.

    Args:
        x: fp32.
        rand: int32 in [-32768, 32768), or the noise that `dither` made of it.
        dtype: bf16 or fp16.
    """
    noise = rand if rand.is_floating_point() else dither(rand, dtype)
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


def noise_(first: Tensor | None, second: Tensor | None, key: Tensor, columns: Tensor, dtypes: list) -> None:
    """Fill fp32 [rows, COLUMNS] with noise of as many elements: `first` with that of the upper halves of the bits.

    The same numbers as `dither(high_half(random_bits(...)))` and of the low half, apart from the passes because,
    compiled for CPU, counting and the way from integers to floats are several times faster in a loop of this shape.

    Args:
        first, second: written, or None.
        key: scalar in [0, 2**32).
        columns: `counters(COLUMNS)`.
        dtypes: what each is the noise for: bf16 (or anything else that wants `uniform`), or fp16.
    """
    row = torch.arange(len(second if first is None else first), dtype=torch.int32, device=columns.device)
    bits = _mix(columns + (row * _ROW_WEYL + _as_int32(key))[:, None])
    if first is not None:
        first.copy_(dither(high_half(bits), dtypes[0]))
    if second is not None:
        second.copy_(dither(low_half(bits), dtypes[1]))


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Mask words as booleans in the shape of `like`: [n], or the same elements as [..., 32] for words [...]."""
    lane = torch.arange(32, dtype=torch.int32, device=mask.device)
    bits = ((mask[..., None] >> lane) & 1) != 0
    return bits if like.dim() > 1 else bits.view(-1)[: like.numel()]


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
    whole = grad.numel() // CHUNK * CHUNK
    total = torch.zeros((), dtype=torch.float64, device=grad.device)
    for start, stop in ((0, whole), (whole, grad.numel())):
        if start < stop:
            total += chunk_sums(*chunk_views(grad, weight, mask, start, stop)).sum(dtype=torch.float64)
    return total


def chunk_views(
    grad: Tensor, weight: Tensor | None, mask: Tensor | None, start: int, stop: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Elements start to stop as `chunk_sums` takes them: whole chunks as rows, anything else as one row."""
    rows = 1 if (stop - start) % CHUNK else (stop - start) // CHUNK
    columns = (stop - start) // rows
    words = (rows, (columns + 31) // 32)
    shape = (rows, columns) if mask is None or columns % 32 else (*words, 32)
    return (
        grad[start:stop].view(shape),
        None if weight is None else weight[start:stop].view(shape),
        None if mask is None else mask[start // 32 : (stop + 31) // 32].view(words),
    )


def chunk_sums(grad: Tensor, weight: Tensor | None, mask: Tensor | None) -> Tensor:
    """Row sums of (s g)^2 where the mask is set: [rows, columns], or [rows, words, 32] and a mask [rows, words]."""
    x = grad.to(compute_dtype(grad.dtype))
    if weight is not None:
        x = x * weight.to(x.dtype)
    if mask is not None:
        bits = unpack_mask(mask, grad) if grad.dim() > 2 else unpack_mask(mask[0], grad[0])[None]
        # Zero times an inf or NaN is NaN: what is not finite shows, masked or not.
        x = torch.where(bits, x, x * 0.0)
    return (x * x).flatten(1).sum(1)


def surrogate_gap(first: Tensor, second: Tensor) -> Tensor:
    """<a, b>, <a, a> and <b, b>: what GSAM's decomposition needs (arXiv 2203.08065, eq. 8).

    Args:
        first: a, fp16/bf16/fp32/fp64 [n].
        second: b, fp16/bf16/fp32/fp64 [n].

    Returns:
        fp64 [3]; inf or NaN where a tensor holds one, or where a sum overflows fp32 (no tensor being fp64).
    """
    whole = first.numel() // CHUNK * CHUNK
    total = torch.zeros(3, dtype=torch.float64, device=first.device)
    for start, stop in ((0, whole), (whole, first.numel())):
        if start < stop:
            rows = 1 if (stop - start) % CHUNK else (stop - start) // CHUNK
            parts = dot_sums(first[start:stop].view(rows, -1), second[start:stop].view(rows, -1))
            total += torch.stack([part.sum(dtype=torch.float64) for part in parts])
    return total


def dot_sums(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row sums of a b, a^2 and b^2: [rows] each, of tensors [rows, columns]."""
    dtype = torch.promote_types(compute_dtype(first.dtype), compute_dtype(second.dtype))
    a, b = first.to(dtype), second.to(dtype)
    return (a * b).sum(1), (a * a).sum(1), (b * b).sum(1)


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
    noise: Tensor | None = None,
    choice: Tensor | None = None,
) -> None:
    """w <- round(w + scale * s * g), s = w^2 (ASAM, arXiv 2102.11600 eq. 9) or 1 (SAM, arXiv 2010.01412 eq. 2).

    A scale of zero leaves the weights as they are, whatever the gradient holds. With `random` each coordinate moves
    with a probability of its own draw only (ESAM's stochastic weight perturbation, arXiv 2110.03141, section 3.1).

    Args:
        weight: weights [n]; written.
        grad: gradient, same type [n]; set to zero if zero_grad.
        backup: same type [n], gets the clean weights, or None (where master weights are the backup).
        mask: int32 [ceil(n / 32)], only these coordinates move, or None for all.
        coef: fp64 [2]: scale = rho / norm, key of the random numbers in [0, 2**32); with `random` [3]: the probability
            minus 1/2, a multiple of 2**-15.
        adaptive: ASAM's scaling.
        stochastic: round 16-bit weights stochastically.
        zero_grad: whether to clear the gradient.
        random: move a random part of the coordinates.
        noise, choice: fp32 [n] from `noise_`, if they were made before.
    """
    if backup is not None:
        # Must stand first: torch.compile writes mutated inputs back in the order of their first use, and after the
        # weights this would copy the perturbed ones.
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
        if choice is None:
            choice = uniform(low_half(random_bits(weight, coef[1])))
        moved = moved & (choice < coef[2].to(torch.float32))
    w = w + torch.where(moved, eps, 0.0)
    if stochastic and weight.element_size() == 2:
        rand = high_half(random_bits(weight, coef[1])) if noise is None else noise
        w = stochastic_round(w, rand, weight.dtype)
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
    w_noise: Tensor | None = None,
    v_noise: Tensor | None = None,
) -> None:
    """AdamW (arXiv 1711.05101, alg. 2) from the clean weights, decaying to zero or to an anchor (L2-SP, 1802.01483).

    g <- factor * g + other * other_grad  (GSAM, arXiv 2203.08065; LookSAM, 2203.02714; the last term if there is one)
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
        w_noise, v_noise: fp32 [n] from `noise_`, if they were made before.
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
        if w_noise is None:
            bits = random_bits(weight, coef[8])
            w_noise, v_noise = high_half(bits), low_half(bits)
        w = stochastic_round(w, w_noise, weight.dtype)
        if exp_avg_sq.element_size() == 2:
            v = stochastic_round(v, v_noise, exp_avg_sq.dtype)
            top = stochastic_round(top, v_noise, exp_avg_sq.dtype)
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


def shift_(
    weight: Tensor, clean: Tensor, exp_avg: Tensor, coef: Tensor, stochastic: bool, noise: Tensor | None = None
) -> None:
    """w <- round(clean + scale * m): the end of `adamw_l2sp_` with `perturb`, from what that has stored.

    Compiled together, the casts of 16-bit clean weights and moments would be dropped, and the perturbation could not be
    made again from what is stored.

    Args:
        weight: weights [n]; written.
        clean: clean weights, the weights' type [n], or fp32 master weights.
        exp_avg: first moments, a float type [n].
        coef: as for `adamw_l2sp_`.
        stochastic: round 16-bit weights stochastically, unless `clean` is a master.
        noise: fp32 [n] from `noise_`, if it was made before.
    """
    c = coef.to(compute_dtype(weight.dtype))
    eps = c[10] * exp_avg.to(c.dtype)
    w = clean.to(c.dtype) + torch.where(eps.abs() < float("inf"), eps, 0.0)
    if stochastic and clean.element_size() == 2:
        rand = high_half(random_bits(weight, coef[11])) if noise is None else noise
        w = stochastic_round(w, rand, weight.dtype)
    weight.copy_(w)


def average_(ema: Tensor, clean: Tensor, coef: Tensor) -> None:
    """ema <- ema + rate * (clean - ema) where that is a finite change: the end of `adamw_l2sp_` with `ema`.

    From what that has stored, and for 16-bit weights apart from it, for the reason that `shift_` is.

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
