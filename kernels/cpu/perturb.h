// The ascent: weights move along their gradients, and are backed up.
#pragma once

#include "numbers.h"
#include "segments.h"

struct PerturbOptions {
  bool adaptive, masked, stochastic, random;
};

// backup <- w, w <- round(w + scale s g), s = w^2 if adaptive, else 1; where that is not finite, outside the mask, or
// not drawn, the weight stays.
//
//   T, G, C: types of weights, of gradients, and computed in
//   backup: [size], written; mask: [size / 32]; coefficients, key: [count]
template <typename T, typename G, typename C, PerturbOptions OPTIONS>
void perturb(const Segment* segments, int64_t count, int threads, T* backup, const uint32_t* mask,
             const coefficients::perturb<C>* coefficients, const uint32_t* key) {
  for_each_chunk(segments, count, threads, [=](int64_t s, int64_t start, int64_t stop) {
    const Segment& segment = segments[s];
    T* weight = at<T>(segment.weight);
    const G* grad = at<const G>(segment.grad);
    T* kept = backup + segment.offset;
    const uint32_t* words = mask + segment.offset / 32;
    const C scale = coefficients[s].scale;
    const float chance = float(coefficients[s].chance);
    const uint32_t own_key = key[s];
    const auto move = [=](int64_t i, uint32_t word, int bit, uint32_t place) __attribute__((always_inline)) {
      const T old = weight[i];
      kept[i] = old;
      C w = widened(old), eps = scale * C(widened(grad[i]));
      if (OPTIONS.adaptive) eps *= w * w;
      uint32_t moved = finite(eps);
      if (OPTIONS.masked) moved &= word >> bit & 1;
      const uint32_t bits = random_bits(place + own_key);
      if (OPTIONS.random) moved &= uint32_t(uniform(low_half(bits)) < chance);
      w += choose(moved, eps, C(0));
      if (OPTIONS.stochastic) store_stochastically(weight[i], w, high_half(bits));
      else store(weight[i], w);
    };
    if constexpr (OPTIONS.masked) {
      // A word after the other: with their length known, loops take half the time.
      for (; start < stop; start += 32) {
        const uint32_t word = words[start / 32], place = uint32_t(start) * WEYL;
        if (stop - start >= 32) {
          IN_ANY_ORDER
          for (int bit = 0; bit < 32; bit++) move(start + bit, word, bit, place + bit * WEYL);
        } else {
          IN_ANY_ORDER
          for (int bit = 0; bit < stop - start; bit++) move(start + bit, word, bit, place + bit * WEYL);
        }
      }
    } else {
      uint32_t place = uint32_t(start) * WEYL;
      IN_ANY_ORDER
      for (int64_t i = start; i < stop; i++, place += WEYL) move(i, 0, 0, place);
    }
  });
}
