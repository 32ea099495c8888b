// The squared norm of a perturbation's direction; and sums, whose additions always have the same order.
#pragma once

#include "directions.h"
#include "segments.h"

// A chunk is summed up in so many lanes, several vector registers: an addition must wait for the last one to its lane.
constexpr int LANES = 64;

// Calls `add(i, lane, word)` for the elements of a chunk. `word` is the element's word of a mask: looked up for each
// element, words would be gathered one by one.
template <typename F>
inline void each_in_lanes(int64_t start, int64_t stop, const F& add) {
  for (; start + LANES <= stop; start += LANES)
    for (int row = 0; row < LANES; row += 32) {
      const int64_t word = (start + row) / 32;
      for (int lane = 0; lane < 32; lane++) add(start + row + lane, row + lane, word);
    }
  for (int lane = 0; start + lane < stop; lane++) add(start + lane, lane, (start + lane) / 32);
}

template <typename C>
inline double total(C* lanes) {
  for (int half = LANES / 2; half; half /= 2)
    for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// Adds up the sums of chunks [chunks, width], leaving out those of segments that take no part.
inline void add_up(const Segment* segments, int64_t count, const double* sums, int width, double* result) {
  for (int column = 0; column < width; column++) result[column] = 0;
  for (int64_t s = 0; s < count; s++)
    for (int64_t chunk = 0; chunk * CHUNK < segments[s].length; chunk++)
      for (int column = 0; column < width; column++)
        result[column] += sums[(segments[s].chunk + chunk) * width + column];
}

struct NormOptions {
  bool adaptive, masked, coded;
  // An index into spec.ALONG.
  int along;
};

// result <- sum of (s d)^2, s = |w| if adaptive, else 1, over the mask's coordinates if there is one; d is the gradient,
// or made of it and a lane.
//
//   T, G, L, C: types of weights, of gradients, of the lane, and computed in
//   mask, scales: [size / 32], the latter of gradients that are codes of a lane
//   lane, lane_scales, directions, grad_scale: [size], [size / 32], [count], [1]; as `directions.Along` has them, or null
//   sums: [chunks], for use inside; result: [1], written
//
// Bytes an element: those of a gradient, of a weight if adaptive, and of the lane.
template <typename T, typename G, typename L, typename C, NormOptions OPTIONS>
void norm_sq(const Segment* segments, int64_t count, int threads, const uint32_t* mask, const BF16* scales,
             const L* lane, const BF16* lane_scales, const coefficients::direction<C>* directions,
             const float* grad_scale, double* sums, double* result) {
  const C inverse = inverse_of_scale<C>(grad_scale);
  for_each_chunk(segments, count, threads, [=](int64_t s, int64_t start, int64_t stop) {
    const Segment& segment = segments[s];
    const G* grad = at<const G>(segment.grad);
    const T* weight = at<const T>(segment.weight);
    const uint32_t* words = mask + segment.offset / 32;
    const BF16* own_scales = scales + segment.offset / 32;
    const L* averages = lane + segment.offset;
    const BF16* units = lane_scales + segment.offset / 32;
    C lanes[LANES] = {};
    each_in_lanes(start, stop, [&](int64_t i, int lane, int64_t word) {
      C x;
      if constexpr (OPTIONS.coded) x = decoded(grad[i], unit_of(G(), widened(own_scales[word])));
      else x = widened(grad[i]);
      if constexpr (OPTIONS.along != 0) {
        C average = average_at<C>(averages, i, unit_of_lane(averages, units, word));
        x = steered<OPTIONS.along>(x * inverse, average, directions[s]);
      }
      if (OPTIONS.adaptive) x *= C(widened(weight[i]));
      // Zero times an inf or NaN is NaN: what is not finite shows, masked or not.
      if (OPTIONS.masked) x = choose(words[word] >> (lane % 32) & 1, x, x * C(0));
      lanes[lane] += x * x;
    });
    sums[segment.chunk + start / CHUNK] = total(lanes);
  });
  add_up(segments, count, sums, 1, result);
}
