// The ascent: weights move along their gradients, and are backed up.
#pragma once

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "codecs.h"
#include "segments.h"

struct PerturbOptions {
  bool adaptive, masked, coded, stochastic, random, streamed;
};

// to <- from [n], past the caches. Memory that is written in the ordinary way is read first.
template <typename T>
inline void stream(T* to, const T* from, int64_t n) {
#ifdef __SSE2__
  constexpr int64_t LINE = 64 / sizeof(T), PART = LINE / 4;
  for (; n && reinterpret_cast<uintptr_t>(to) % 64; n--) *to++ = *from++;
  for (; n >= LINE; n -= LINE, to += LINE, from += LINE)
    for (int64_t k = 0; k < LINE; k += PART)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + k), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k)));
  // Before any other thread looks.
  _mm_sfence();
#endif
  __builtin_memcpy(to, from, n * sizeof(T));
}

// backup <- w, w <- round(w + scale s g), s = w^2 if adaptive, else 1; where that is not finite, outside the mask, or
// not drawn, the weight stays.
//
//   T, G, B, C: types of weights, of gradients, of the backup, and computed in
//   backup: [size], written; of int8_t, weights move by at most 127 steps, which are what is kept
//   mask, scales: [size / 32], the latter of gradients that are codes of a lane; coefficients, key: [count]
//
// Bytes an element: those of a gradient and of three weights (16 in fp32); of another weight unless streamed.
template <typename T, typename G, typename B, typename C, PerturbOptions OPTIONS>
void perturb(const Segment* segments, int64_t count, int threads, B* backup, const uint32_t* mask,
             const BF16* scales, const coefficients::perturb<C>* coefficients, const uint32_t* key) {
  for_each_chunk(segments, count, threads, [=](int64_t s, int64_t start, int64_t stop) {
    const Segment& segment = segments[s];
    T* weight = at<T>(segment.weight);
    const G* grad = at<const G>(segment.grad);
    B* kept = backup + segment.offset;
    const uint32_t* words = mask + segment.offset / 32;
    const BF16* own_scales = scales + segment.offset / 32;
    const C scale = coefficients[s].scale;
    const float chance = float(coefficients[s].chance);
    const uint32_t own_key = key[s];
    const auto move = [=](int64_t i, uint32_t word, float of_codes, int bit, uint32_t place)
        __attribute__((always_inline)) {
      const T old = weight[i];
      C w = widened(old), eps;
      if constexpr (OPTIONS.coded) eps = scale * C(decoded(grad[i], of_codes));
      else eps = scale * C(widened(grad[i]));
      if (OPTIONS.adaptive) eps *= w * w;
      uint32_t moved = finite(eps);
      if (OPTIONS.masked) moved &= word >> bit & 1;
      const uint32_t bits = random_bits(place + own_key);
      if (OPTIONS.random) moved &= uint32_t(uniform(low_half(bits)) < chance);
      w += choose(moved, eps, C(0));
      T moved_to;
      if (OPTIONS.stochastic) store_stochastically(moved_to, w, high_half(bits));
      else store(moved_to, w);
      if constexpr (sizeof(B) < sizeof(T)) {
        T place = old;
        kept[i] = displace(place, moved_to);
        weight[i] = place;
      } else {
        if (!OPTIONS.streamed) kept[i] = old;
        weight[i] = moved_to;
      }
    };
    // What is streamed in one go must stay in the first cache until it is moved.
    constexpr int64_t PART = OPTIONS.streamed ? 8192 / sizeof(T) : CHUNK;
    for (int64_t end; start < stop; start = end) {
      end = smaller(stop, start + PART);
      if constexpr (OPTIONS.streamed) stream(kept + start, weight + start, end - start);
      uint32_t place = uint32_t(start) * WEYL;
      if constexpr (OPTIONS.masked || OPTIONS.coded) {
        // A word or a scale after the other: with their length known, loops take half the time.
        for (int64_t i = start; i < end; i += 32, place += 32 * WEYL) {
          const uint32_t word = OPTIONS.masked ? words[i / 32] : 0;
          float of_codes = 0;
          if constexpr (OPTIONS.coded) of_codes = unit_of(G(), widened(own_scales[i / 32]));
          if (i + 32 <= end) {
            IN_ANY_ORDER
            for (int bit = 0; bit < 32; bit++) move(i + bit, word, of_codes, bit, place + bit * WEYL);
          } else {
            for (int bit = 0; i + bit < end; bit++) move(i + bit, word, of_codes, bit, place + bit * WEYL);
          }
        }
      } else {
        IN_ANY_ORDER
        for (int64_t i = start; i < end; i++, place += WEYL) move(i, 0, 0, 0, place);
      }
    }
  });
}
