// A weight with noise, made of random numbers that only a key and an element's place determine.
#pragma once

#include "numbers.h"
#include "segments.h"

// The bits of `reference.normals`; `x` as that of `random_bits`.
template <typename C>
inline C normal(uint32_t x) {
  uint32_t bits = random_bits(x);
  bits = (bits ^ bits >> 15) * MIX0;
  const uint32_t pairs = (bits & 0x00FF00FFu) + (bits >> 8 & 0x00FF00FFu);
  const C t = C(int32_t((pairs & 0xFFFFu) + (pairs >> 16)) - int32_t(NOISE_CENTRE));
  return t * (C(NOISE_LINEAR) + C(NOISE_CUBIC) * (t * t));
}

// out <- w + scale z, with z as `normal` makes it.
//
//   T, O, C: types of weights, of the result, and computed in
//   weight, out: [rows, columns], the latter written, or the same; scale: [columns] if BY_COLUMN, else [rows]
//
// Bytes an element: those of a weight and of a result.
template <typename T, typename O, typename C, bool BY_COLUMN>
void add_noise(int64_t rows, int64_t columns, int threads, const T* weight, const C* scale, uint32_t key, O* out) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * columns, threads))
  for (int64_t row = 0; row < rows; row++) {
    const T* from = weight + row * columns;
    O* to = out + row * columns;
    const C own = BY_COLUMN ? C(0) : scale[row];
    uint32_t place = uint32_t(row * columns) * WEYL + key;
    IN_ANY_ORDER
    for (int64_t i = 0; i < columns; i++, place += WEYL)
      store(to[i], C(widened(from[i])) + (BY_COLUMN ? scale[i] : own) * normal<C>(place));
  }
}
