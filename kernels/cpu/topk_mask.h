// The exact k largest magnitudes as a bit-packed mask: a radix select's counts of digits, and the mask itself.
#pragma once

#include "numbers.h"
#include "segments.h"

// Integers in the order of the magnitudes, as reference.magnitude_key: 31 bits, or 63.
template <typename Key, typename T>
struct KeyOf {
  static Key of(T x) {
    const uint32_t key = magnitude(x);
    return int32_t(key & -uint32_t(key <= 0x7F800000u));
  }
};
template <typename T>
struct KeyOf<int64_t, T> {
  static int64_t of(T x) {
    const uint32_t key = magnitude(x);
    return int64_t(bits_of(double(float_of(key & -uint32_t(key <= 0x7F800000u)))));
  }
};
template <>
struct KeyOf<int64_t, double> {
  static int64_t of(double x) {
    const int64_t key = int64_t(bits_of(x)) & 0x7FFFFFFFFFFFFFFF;
    return key & -int64_t(key <= 0x7FF0000000000000);
  }
};

// Elements that are looked at together: if none of them counts, that is found out at the speed of memory.
constexpr int64_t TOGETHER = 64;
// Counts of neighbours go to different tables: one cannot be added to again at once.
constexpr int TABLES = 8, BINS = 256;

// hist <- how many keys of `values` [n] agree with `prefix` above the digit, by the digit's value, of up to 8 bits.
template <typename T, typename Key>
void digit_histogram(const T* values, int64_t n, int64_t prefix, int shift, int bits, int64_t* hist, int threads) {
  const Key above = Key(prefix >> shift >> bits), digits = (Key(1) << bits) - 1;
#pragma omp parallel num_threads(threads_for(n, threads))
  {
    // The last bin is for keys of another prefix.
    int64_t own[TABLES * (BINS + 1)] = {};
#pragma omp for schedule(static)
    for (int64_t start = 0; start < n; start += TOGETHER) {
      const int size = int(smaller(TOGETHER, n - start));
      int bins[TOGETHER], same = 0;
      for (int i = 0; i < size; i++) {
        const Key key = KeyOf<Key, T>::of(values[start + i]);
        const int agrees = (key >> shift >> bits) == above;
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

// Elements a thread takes at a time.
constexpr int64_t PART = 1 << 16;

template <typename Key, typename T>
int64_t ties_of(const T* values, int64_t n, Key threshold) {
  int64_t ties = 0;
  for (int64_t i = 0; i < n; i++) ties += KeyOf<Key, T>::of(values[i]) == threshold;
  return ties;
}

// Eight bytes of 0 or 1 as the bits of one.
inline uint32_t packed(const uint8_t* flags) {
  uint64_t all;
  __builtin_memcpy(&all, flags, 8);
  return uint32_t(all * 0x0102040810204080u >> 56);
}

template <typename Key, typename T>
void write_part(uint32_t* mask, const T* values, int64_t n, Key threshold, int64_t quota) {
  for (int64_t start = 0; start < n; start += 32) {
    const int size = int(smaller(32, n - start));
    int ties = 0;
    uint8_t above[32] = {}, tie[32] = {};
    for (int i = 0; i < size; i++) {
      const Key key = KeyOf<Key, T>::of(values[start + i]);
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

// Bit i of `mask` [ceil(n / 32)] <- key i is above the threshold, or one of the first `quota` that equal it. Returns
// the quota that is left.
template <typename T, typename Key>
int64_t write_mask(uint32_t* mask, const T* values, int64_t n, int64_t threshold, int64_t quota, int threads) {
  const int64_t parts = (n + PART - 1) / PART;
  int64_t all = 0;
  int64_t* const before = new int64_t[parts];
#pragma omp parallel for schedule(static) num_threads(threads_for(n, threads))
  for (int64_t p = 0; p < parts; p++)
    before[p] = ties_of<Key>(values + p * PART, smaller(PART, n - p * PART), Key(threshold));
  for (int64_t p = 0; p < parts; p++) {
    all += before[p];
    before[p] = all - before[p];
  }
#pragma omp parallel for schedule(static) num_threads(threads_for(n, threads))
  for (int64_t p = 0; p < parts; p++)
    write_part<Key>(mask + p * PART / 32, values + p * PART, smaller(PART, n - p * PART), Key(threshold),
                    quota - before[p]);
  delete[] before;
  return quota > all ? quota - all : 0;
}
