"""The exact k largest magnitudes as a bit-packed mask on a CPU, in C++.

PyTorch counts no digits of floats without a tensor of them first, and packs no bits.
"""

import ctypes

import torch
from torch import Tensor

from .cpp import HEADER, TYPES, library, threads

_SOURCE = r"""
// Integers in the order of the magnitudes, as reference.magnitude_key: 31 bits, or 63.
template <typename Key, typename T>
struct KeyOf {
  static Key of(T x) {
    uint32_t key = magnitude(x);
    return int32_t(key & -uint32_t(key <= 0x7F800000u));
  }
};
template <typename T>
struct KeyOf<int64_t, T> {
  static int64_t of(T x) {
    uint32_t key = magnitude(x);
    return std::bit_cast<int64_t>(double(std::bit_cast<float>(key & -uint32_t(key <= 0x7F800000u))));
  }
};
template <>
struct KeyOf<int64_t, double> {
  static int64_t of(double x) {
    int64_t key = std::bit_cast<int64_t>(x) & 0x7FFFFFFFFFFFFFFF;
    return key & -int64_t(key <= 0x7FF0000000000000);
  }
};

// Elements that are looked at together: if none of them counts, that is found out at the speed of memory.
constexpr int64_t GROUP = 64;
// Elements a thread takes at a time.
constexpr int64_t BLOCK = 1 << 16;
// Counts of neighbours go to different tables: one cannot be added to again at once.
constexpr int TABLES = 8, BINS = 256;

template <typename Key, typename T>
void histogram(const T* values, int64_t n, int64_t prefix, int shift, int bits, int64_t* hist, int threads) {
  const Key above = Key(prefix >> shift >> bits), digits = (Key(1) << bits) - 1;
  #pragma omp parallel num_threads(threads)
  {
    // The last bin is for keys of another prefix.
    std::vector<int64_t> own(TABLES * (BINS + 1));
    #pragma omp for schedule(static)
    for (int64_t start = 0; start < n; start += GROUP) {
      int size = int(std::min(GROUP, n - start)), bins[GROUP], same = 0;
      for (int i = 0; i < size; i++) {
        Key key = KeyOf<Key, T>::of(values[start + i]);
        int agrees = (key >> shift >> bits) == above;
        same += agrees;
        bins[i] = BINS + agrees * (int((key >> shift) & digits) - BINS);
      }
      if (!same) continue;
      for (int i = 0; i < size; i++) own[i % TABLES * (BINS + 1) + bins[i]]++;
    }
    #pragma omp critical
    for (int i = 0; i < TABLES; i++)
      for (int bin = 0; bin < 1 << bits; bin++) hist[bin] += own[i * (BINS + 1) + bin];
  }
}

template <typename Key, typename T>
int64_t ties_of(const T* values, int64_t n, Key threshold) {
  int64_t ties = 0;
  for (int64_t i = 0; i < n; i++) ties += KeyOf<Key, T>::of(values[i]) == threshold;
  return ties;
}

// Eight bytes of 0 or 1 as the bits of one.
inline uint32_t packed(const uint8_t* flags) {
  uint64_t all;
  std::memcpy(&all, flags, 8);
  return uint32_t(all * 0x0102040810204080u >> 56);
}

template <typename Key, typename T>
void write_block(uint32_t* mask, const T* values, int64_t n, Key threshold, int64_t quota) {
  for (int64_t start = 0; start < n; start += 32) {
    int size = int(std::min<int64_t>(32, n - start)), ties = 0;
    uint8_t above[32] = {}, tie[32] = {};
    for (int i = 0; i < size; i++) {
      Key key = KeyOf<Key, T>::of(values[start + i]);
      above[i] = key > threshold;
      tie[i] = key == threshold;
      ties += tie[i];
    }
    if (ties)
      for (int i = 0; i < size && quota > 0; i++) {
        above[i] |= tie[i];
        quota -= tie[i];
      }
    mask[start / 32] = packed(above) | packed(above + 8) << 8 | packed(above + 16) << 16 | packed(above + 24) << 24;
  }
}

template <typename Key, typename T>
int64_t write_mask(uint32_t* mask, const T* values, int64_t n, int64_t threshold, int64_t quota, int threads) {
  int64_t blocks = (n + BLOCK - 1) / BLOCK, all = 0;
  std::vector<int64_t> before(blocks);
  #pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < blocks; b++)
    before[b] = ties_of<Key>(values + b * BLOCK, std::min(BLOCK, n - b * BLOCK), Key(threshold));
  for (int64_t& ties : before) {
    all += ties;
    ties = all - ties;
  }
  #pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < blocks; b++)
    write_block<Key>(mask + b * BLOCK / 32, values + b * BLOCK, std::min(BLOCK, n - b * BLOCK), Key(threshold),
                     std::max<int64_t>(quota - before[b], 0));
  return std::max<int64_t>(quota - all, 0);
}

#define EXPORT(T, KEY)                                                                                               \
  extern "C" void histogram_##T##_##KEY(int64_t values, int64_t n, int64_t prefix, int shift, int bits,          \
                                           int64_t hist, int threads) {                                              \
    histogram<KEY>(reinterpret_cast<const T*>(values), n, prefix, shift, bits, reinterpret_cast<int64_t*>(hist),    \
                   threads);                                                                                         \
  }                                                                                                                  \
  extern "C" int64_t write_mask_##T##_##KEY(int64_t mask, int64_t values, int64_t n, int64_t threshold,          \
                                               int64_t quota, int threads) {                                         \
    return write_mask<KEY>(reinterpret_cast<uint32_t*>(mask), reinterpret_cast<const T*>(values), n, threshold,     \
                           quota, threads);                                                                          \
  }
EXPORT(float, int32_t)
EXPORT(BF16, int32_t)
EXPORT(FP16, int32_t)
EXPORT(float, int64_t)
EXPORT(BF16, int64_t)
EXPORT(FP16, int64_t)
EXPORT(double, int64_t)
"""


def _function(kind: str, values: Tensor, wide: bool):
    function = getattr(library(HEADER + _SOURCE), f"{kind}_{TYPES[values.dtype]}_int{64 if wide else 32}_t")
    function.restype = ctypes.c_int64 if kind == "write_mask" else None
    return function


def digit_histogram(values: Tensor, prefix: Tensor, shift: int, bits: int, wide: bool) -> Tensor:
    """The same as `reference.digit_histogram`, for digits of up to 8 bits."""
    hist, n = torch.zeros(1 << bits, dtype=torch.int64), values.numel()
    of_values = (ctypes.c_int64(values.data_ptr()), ctypes.c_int64(n), ctypes.c_int64(int(prefix)))
    _function("histogram", values, wide)(*of_values, shift, bits, ctypes.c_int64(hist.data_ptr()), threads(n))
    return hist


def write_mask_(mask: Tensor, values: Tensor, threshold: Tensor, quota: Tensor, wide: bool) -> Tensor:
    """The same as `reference.write_mask_`."""
    n = values.numel()
    numbers = (mask.data_ptr(), values.data_ptr(), n, int(threshold), int(quota))
    left = _function("write_mask", values, wide)(*map(ctypes.c_int64, numbers), threads(n))
    return torch.tensor(left, dtype=torch.int64)
