"""The dense passes on a CPU, in C++: the same arithmetic as the kernels', with the bits of `reference`.

A pass is compiled for each combination of types and options, as the kernels are.
"""

import ctypes
import functools

import torch
from torch import Tensor

from .cpp import HEADER, TYPES, library, threads
from .reference import CHUNK

_COMMON = r"""
constexpr int64_t CHUNK = 16384;

#define IN_PARALLEL _Pragma("omp parallel for schedule(static) num_threads(threads)")
// No element depends on another; with so many arrays the compiler would not find out.
#define IN_ANY_ORDER _Pragma("GCC ivdep")

template <typename T>
inline T* at(const int64_t* pointers, int which) { return reinterpret_cast<T*>(pointers[which]); }
"""

# The sums of a chunk are kept in as many lanes as two vector registers have, so that their order is always the same.
_SUMS = r"""
constexpr int LANES = 64;

// `add` is given the element's word of a mask, too: looked up for each element, words would be gathered one by one.
template <typename F>
inline void each(int64_t start, int64_t stop, const F& add) {
  for (; start + LANES <= stop; start += LANES)
    for (int row = 0; row < LANES; row += 32) {
      const int64_t word = (start + row) / 32;
      for (int lane = 0; lane < 32; lane++) add(start + row + lane, row + lane, word);
    }
  for (int lane = 0; start + lane < stop; lane++) add(start + lane, lane, (start + lane) / 32);
}

inline double total(const C* lanes) {
  C sums[LANES];
  std::copy(lanes, lanes + LANES, sums);
  for (int half = LANES / 2; half; half /= 2)
    for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
  return sums[0];
}
"""

_GRAD_NORM = r"""
extern "C" void grad_norm(const int64_t* pointers, int64_t n, int threads) {
  const T* grad = at<T>(pointers, 0);
  const T* weight = at<T>(pointers, 1);
  const uint32_t* mask = at<uint32_t>(pointers, 2);
  double* sums = at<double>(pointers, 3);
  IN_PARALLEL
  for (int64_t start = 0; start < n; start += CHUNK) {
    C lanes[LANES] = {};
    each(start, std::min(start + CHUNK, n), [&](int64_t i, int lane, int64_t word) {
      C x = widened(grad[i]);
      if (ADAPTIVE) x *= widened(weight[i]);
      // Zero times an inf or NaN is NaN: what is not finite shows, masked or not.
      if (MASKED) x = choose(mask[word] >> (lane % 32) & 1, x, x * C(0));
      lanes[lane] += x * x;
    });
    sums[start / CHUNK] = total(lanes);
  }
}
"""

_SURROGATE_GAP = r"""
extern "C" void surrogate_gap(const int64_t* pointers, int64_t n, int threads) {
  const T* first = at<T>(pointers, 0);
  const OTHER* second = at<OTHER>(pointers, 1);
  double* sums = at<double>(pointers, 2);
  IN_PARALLEL
  for (int64_t start = 0; start < n; start += CHUNK) {
    C dot[LANES] = {}, first_sq[LANES] = {}, second_sq[LANES] = {};
    each(start, std::min(start + CHUNK, n), [&](int64_t i, int lane, int64_t) {
      C a = widened(first[i]), b = widened(second[i]);
      dot[lane] += a * b;
      first_sq[lane] += a * a;
      second_sq[lane] += b * b;
    });
    double* own = sums + start / CHUNK * 3;
    own[0] = total(dot);
    own[1] = total(first_sq);
    own[2] = total(second_sq);
  }
}
"""

_ROUNDING = r"""
// Of an element, `index * STRIDE + key`. Loops add up the products, or their index counts from the start of a row: a
// multiplication of each element's own index would be their slowest instruction.
constexpr uint32_t STRIDE = 0x9E3779B1u;
inline uint32_t random_bits(uint32_t x) {
  x ^= x >> 15;
  return x * 0x2C1B3C6Du;
}
inline int32_t high_half(uint32_t bits) { return int32_t(bits) >> 16; }
inline int32_t low_half(uint32_t bits) { return int32_t((bits ^ (bits >> 16)) << 16) >> 16; }
inline float uniform(int32_t rand) { return float(rand | 1) * (1.0f / 65536); }

// See rounding.stochastic_round. The noise is an odd integer below 1 / `unit`, and all factors are powers of two: what
// they are multiplied by is exact, in any order. From 2 ** 100 on x stays as it is.
inline float nudged(float x, int32_t noise, float unit, float ulp, float smallest) {
  uint32_t binade = bits_of(x) & 0x7F800000u, small = bits_of(smallest * unit);
  uint32_t step = bits_of(float_of(binade) * (ulp * unit));
  // Of positive numbers the larger one has the larger bits.
  step = step > small ? step : small;
  float grain = float_of(step & -uint32_t(binade < bits_of(0x1p100f))), shift = grain * (12582912.0f / unit);
  return (x + grain * float(noise) + shift) - shift;
}
inline float stochastic(float x, int32_t rand, BF16) {
  return nudged(x, rand | 1, 1.0f / 65536, 1.0f / 128, float_of(0x00010000u));
}
inline float stochastic(float x, int32_t rand, FP16) {
  float y = nudged(x, (rand >> 3) | 1, 1.0f / 8192, 1.0f / 1024, 1.0f / 16777216);
  // What is too large to be nudged must become an infinity, not the largest number.
  y = choose(y > 65504.0f, 65504.0f, choose(y < -65504.0f, -65504.0f, y));
  return choose(std::fabs(x) < 0x1p100f, y, x);
}
template <typename C>
inline C stochastic(C x, int32_t, C) { return x; }
inline uint32_t key_of(double coef) { return uint32_t(int64_t(coef)); }

// Elements after one another that a thread takes; those of a word if there is a mask.
constexpr int ROW = MASKED ? 32 : 4096;
"""

_PERTURB = r"""
extern "C" void perturb(const int64_t* pointers, int64_t n, int threads) {
  T* weight = at<T>(pointers, 0);
  T* grad = at<T>(pointers, 1);
  T* backup = at<T>(pointers, 2);
  const uint32_t* mask = at<uint32_t>(pointers, 3);
  const double* coef = at<double>(pointers, 4);
  const C scale = C(coef[0]);
  const uint32_t key = key_of(coef[1]);
  const float probability = RANDOM ? float(coef[2]) : 0;
  const auto move = [=](int64_t i, uint32_t word, int bit, uint32_t place) __attribute__((always_inline)) {
    const T old = weight[i];
    if (BACKUP) backup[i] = old;
    C w = widened(old), eps = scale * widened(grad[i]);
    if (ADAPTIVE) eps *= w * w;
    uint32_t moved = finite(eps);
    if (MASKED) moved &= word >> bit & 1;
    const uint32_t bits = random_bits(place + key);
    if (RANDOM) moved &= uint32_t(uniform(low_half(bits)) < probability);
    w += choose(moved, eps, C(0));
    if (STOCHASTIC) w = stochastic(w, high_half(bits), T{});
    store_narrow(weight[i], w);
    if (ZERO_GRAD) store(grad[i], C(0));
  };
  IN_PARALLEL
  for (int64_t start = 0; start < n; start += ROW) {
    const uint32_t word = MASKED ? mask[start / 32] : 0, place = uint32_t(start) * STRIDE;
    // The last row may be shorter. With the length of all others known, those of 32 take half the time.
    if (n - start >= ROW) {
      IN_ANY_ORDER
      for (int k = 0; k < ROW; k++) move(start + k, word, k, place + k * STRIDE);
    } else {
      IN_ANY_ORDER
      for (int k = 0; k < n - start; k++) move(start + k, word, k, place + k * STRIDE);
    }
  }
}
"""

_ADAMW_L2SP = r"""
extern "C" void adamw_l2sp(const int64_t* pointers, int64_t n, int threads) {
  T* weight = at<T>(pointers, 0);
  T* grad = at<T>(pointers, 1);
  STATE* exp_avg = at<STATE>(pointers, 2);
  STATE* exp_avg_sq = at<STATE>(pointers, 3);
  STATE* max_exp_avg_sq = at<STATE>(pointers, 4);
  T* backup = at<T>(pointers, 5);
  float* master = at<float>(pointers, 6);
  const T* anchor = at<T>(pointers, 7);
  T* other_grad = at<T>(pointers, 8);
  C* ema = at<C>(pointers, 9);
  const double* coef = at<double>(pointers, 10);
  const C factor = C(coef[0]), decay = C(coef[1]), one_minus_beta1 = C(coef[2]), beta2 = C(coef[3]);
  const C one_minus_beta2 = C(coef[4]), step_size = C(coef[5]), inv_sqrt_bias2 = C(coef[6]), eps = C(coef[7]);
  const uint32_t key = STOCHASTIC ? key_of(coef[8]) : 0, next_key = PERTURB ? key_of(coef[11]) : 0;
  const C other_factor = OTHER ? C(coef[9]) : 0, scale = PERTURB ? C(coef[10]) : 0, rate = EMA ? C(coef[12]) : 0;
  IN_PARALLEL
  for (int64_t start = 0; start < n; start += ROW) {
    const int64_t stop = std::min(start + ROW, n);
    uint32_t place = uint32_t(start) * STRIDE;
    IN_ANY_ORDER
    for (int64_t i = start; i < stop; i++, place += STRIDE) {
      const C old_w = MASTER ? C(master[i]) : C(widened(BACKUP ? backup[i] : weight[i]));
      const C own = widened(grad[i]);
      C g = own * factor;
      if (OTHER) {
        const C other = other_factor * widened(other_grad[i]);
        if (KEEP_ORTHOGONAL) store(other_grad[i], own - other);
        else g += choose(finite(other), other, C(0));
      }
      const C old_m = widened(exp_avg[i]), old_v = widened(exp_avg_sq[i]);
      C m = old_m + one_minus_beta1 * (g - old_m), v = beta2 * old_v + one_minus_beta2 * (g * g);
      const bool update = v < C(INFINITY);
      C w = ANCHOR ? old_w - decay * (old_w - C(widened(anchor[i]))) : old_w * (C(1) - decay);
      const C old_top = AMSGRAD ? C(widened(max_exp_avg_sq[i])) : v;
      C top = choose(v > old_top, v, old_top);
      const C denom = std::sqrt(top) * inv_sqrt_bias2 + eps;
      w -= step_size * choose(denom > 0, m / denom, C(0));

      w = choose(update, w, old_w);
      m = choose(update, m, old_m);
      v = choose(update, v, old_v);
      top = choose(update, top, old_top);
      store_narrow(exp_avg[i], m);
      const uint32_t bits = random_bits(place + key);
      if (MASTER) master[i] = float(w);
      if (STOCHASTIC) {
        w = stochastic(w, high_half(bits), T{});
        v = stochastic(v, low_half(bits), STATE{});
        top = stochastic(top, low_half(bits), STATE{});
      }
      store_narrow(exp_avg_sq[i], v);
      if (AMSGRAD) store_narrow(max_exp_avg_sq[i], top);
      T stored;
      if (MASTER || !std::is_same_v<T, STATE>) store(stored, w);
      else store_narrow(stored, w);
      const C clean = MASTER ? w : C(widened(stored));
      if (PERTURB) {
        if (BACKUP) backup[i] = stored;
        // The stored moment, not the exact one: so the perturbation can be made again from it.
        const C shift = scale * C(widened(exp_avg[i]));
        C next = clean + choose(finite(shift), shift, C(0));
        if (STOCHASTIC) next = stochastic(next, high_half(random_bits(place + next_key)), T{});
        store(weight[i], next);
      } else {
        weight[i] = stored;
      }
      if (EMA) {
        const C change = rate * (clean - ema[i]);
        ema[i] = choose(finite(change), ema[i] + change, ema[i]);
      }
      if (ZERO_GRAD) store(grad[i], C(0));
    }
  }
}
"""


@functools.cache
def _pass(name: str, **definitions: str | bool):
    """The pass for these types and options."""
    bodies = {
        "grad_norm": _SUMS + _GRAD_NORM,
        "surrogate_gap": _SUMS + _SURROGATE_GAP,
        "perturb": _ROUNDING + _PERTURB,
        "adamw_l2sp": _ROUNDING + _ADAMW_L2SP,
    }
    defined = "".join(
        f"constexpr bool {key} = {str(value).lower()};\n" if isinstance(value, bool) else f"using {key} = {value};\n"
        for key, value in definitions.items()
    )
    return getattr(library(HEADER + defined + _COMMON + bodies[name]), name)


def _run(function, n: int, *tensors: Tensor | None) -> None:
    pointers = (ctypes.c_int64 * len(tensors))(*[0 if tensor is None else tensor.data_ptr() for tensor in tensors])
    function(pointers, ctypes.c_int64(n), threads(n))


def _compute(*tensors: Tensor) -> str:
    return "double" if any(tensor.dtype == torch.float64 for tensor in tensors) else "float"


def grad_norm_sq(grad: Tensor, weight: Tensor | None, mask: Tensor | None) -> Tensor:
    """The same as `reference.grad_norm_sq`, but for the order of additions."""
    sums = torch.empty(-(-grad.numel() // CHUNK), dtype=torch.float64)
    options = {"ADAPTIVE": weight is not None, "MASKED": mask is not None}
    function = _pass("grad_norm", T=TYPES[grad.dtype], C=_compute(grad), **options)
    _run(function, grad.numel(), grad, weight, mask, sums)
    return sums.sum()


def surrogate_gap(first: Tensor, second: Tensor) -> Tensor:
    """The same as `reference.surrogate_gap`, but for the order of additions."""
    sums = torch.empty(-(-first.numel() // CHUNK), 3, dtype=torch.float64)
    types = {"T": TYPES[first.dtype], "OTHER": TYPES[second.dtype], "C": _compute(first, second)}
    _run(_pass("surrogate_gap", **types), first.numel(), first, second, sums)
    return sums.sum(0)


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
    """The same as `reference.perturb_`."""
    function = _pass(
        "perturb",
        T=TYPES[weight.dtype],
        C=_compute(weight),
        ADAPTIVE=adaptive,
        MASKED=mask is not None,
        BACKUP=backup is not None,
        STOCHASTIC=stochastic and weight.element_size() == 2,
        ZERO_GRAD=zero_grad,
        RANDOM=random,
    )
    _run(function, weight.numel(), weight, grad, backup, mask, coef)


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
    """The same as `reference.adamw_l2sp_`."""
    function = _pass(
        "adamw_l2sp",
        T=TYPES[weight.dtype],
        STATE=TYPES[exp_avg.dtype],
        C=_compute(weight),
        MASKED=False,
        AMSGRAD=max_exp_avg_sq is not None,
        BACKUP=backup is not None,
        MASTER=master is not None,
        ANCHOR=anchor is not None,
        STOCHASTIC=stochastic and master is None and weight.element_size() == 2,
        ZERO_GRAD=zero_grad,
        OTHER=other_grad is not None,
        KEEP_ORTHOGONAL=keep_orthogonal,
        PERTURB=perturb,
        EMA=ema is not None,
    )
    flat = (weight, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, backup, master, anchor, other_grad, ema)
    _run(function, weight.numel(), *flat, coef)
