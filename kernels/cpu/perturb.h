// The ascent: weights move along their gradients, and are backed up.
#pragma once

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "directions.h"
#include "segments.h"

struct PerturbOptions {
  bool adaptive, masked, coded, stochastic, random, streamed;
  // An index into spec.ALONG.
  int along;
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

// backup <- w, w <- round(w + scale s d), s = w^2 if adaptive, else 1; where that is not finite, outside the mask, or
// not drawn, the weight stays. d is the gradient, or made of it and a lane.
//
//   T, G, B, L, C: types of weights, of gradients, of the backup, of the lane, and computed in
//   backup: [size], written; of int8_t, weights move by at most 127 steps, which are what is kept
//   mask, scales: [size / 32], the latter of gradients that are codes of a lane; coefficients, key: [count]
//   lane, lane_scales, directions, grad_scale: as `norm_sq`; the lane is written if it has averages of gradients
//
// Bytes an element: those of a gradient and of three weights (16 in fp32); of another weight unless streamed; of the
// lane, twice if it is written.
template <typename T, typename G, typename B, typename L, typename C, PerturbOptions OPTIONS>
void perturb(const Segment* segments, int64_t count, int threads, B* backup, const uint32_t* mask,
             const BF16* scales, L* lane, const BF16* lane_scales, const coefficients::direction<C>* directions,
             const float* grad_scale, const coefficients::perturb<C>* coefficients, const uint32_t* key) {
  constexpr bool AVERAGES = OPTIONS.along == ALONG_LESS_AVERAGE, BY_WORDS = OPTIONS.masked || OPTIONS.coded || sizeof(L) == 1;
  const C inverse = inverse_of_scale<C>(grad_scale);
  for_each_chunk(segments, count, threads, [=](int64_t s, int64_t start, int64_t stop) {
    const Segment& segment = segments[s];
    T* weight = at<T>(segment.weight);
    const G* grad = at<const G>(segment.grad);
    B* kept = backup + segment.offset;
    const uint32_t* words = mask + segment.offset / 32;
    const BF16* own_scales = scales + segment.offset / 32;
    L* averages = lane + segment.offset;
    const BF16* units = lane_scales + segment.offset / 32;
    coefficients::direction<C> towards;
    if constexpr (OPTIONS.along != 0) towards = directions[s];
    const C scale = coefficients[s].scale;
    const float chance = float(coefficients[s].chance);
    const uint32_t own_key = key[s];
    const auto move = [=](int64_t i, uint32_t word, float of_codes, float unit, int bit, uint32_t place)
        __attribute__((always_inline)) {
      const T old = weight[i];
      C w = widened(old), d;
      if constexpr (OPTIONS.coded) d = decoded(grad[i], of_codes);
      else d = widened(grad[i]);
      if constexpr (OPTIONS.along != 0) {
        const C before = average_at<C>(averages, i, unit);
        C average = before;
        d = steered<OPTIONS.along>(d * inverse, average, towards);
        if constexpr (AVERAGES) store(averages[i], choose(bool(finite(average) & (scale != 0)), average, before));
      }
      C eps = scale * d;
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
      if constexpr (BY_WORDS) {
        // A word or a scale after the other: with their length known, loops take half the time.
        for (int64_t i = start; i < end; i += 32, place += 32 * WEYL) {
          const uint32_t word = OPTIONS.masked ? words[i / 32] : 0;
          float of_codes = 0;
          if constexpr (OPTIONS.coded) of_codes = unit_of(G(), widened(own_scales[i / 32]));
          const float unit = unit_of_lane(averages, units, i / 32);
          if (i + 32 <= end) {
            IN_ANY_ORDER
            for (int bit = 0; bit < 32; bit++) move(i + bit, word, of_codes, unit, bit, place + bit * WEYL);
          } else {
            for (int bit = 0; i + bit < end; bit++) move(i + bit, word, of_codes, unit, bit, place + bit * WEYL);
          }
        }
      } else {
        IN_ANY_ORDER
        for (int64_t i = start; i < end; i++, place += WEYL) move(i, 0, 0, 0, 0, place);
      }
    }
  });
}
