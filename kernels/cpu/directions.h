// Directions of a perturbation that are made of the gradient and an average; see directions.py for what they mean.
#pragma once

#include "codecs.h"

// Of a lane whose averages are codes, the unit of a group of 32; see `average_at`.
template <typename L>
inline float unit_of_lane(const L*, const BF16* scales, int64_t group) {
  if constexpr (sizeof(L) == 1) return unit_of(L(), widened(scales[group]));
  else return 0;
}

template <typename C, typename L>
inline C average_at(const L* lane, int64_t i, float unit) {
  if constexpr (sizeof(L) == 1) return decoded(lane[i], unit);
  else return widened(lane[i]);
}

// The direction for an unscaled gradient, which the average takes in.
template <int ALONG, typename C>
inline C steered(C g, C& average, const coefficients::direction<C>& c) {
  if constexpr (ALONG == ALONG_LESS_AVERAGE) {
    average = average + c.rate * (g - average);
    return g - c.factor * average;
  } else {
    average = average + c.rate * (g * g - average);
    const C root = square_root(average) + c.factor;
    return choose(average < C(INF), choose(root > 0, g / root, C(0)), C(__builtin_nan("")));
  }
}

// What to multiply gradients with, where they were multiplied with `grad_scale`; that may be null.
template <typename C>
inline C inverse_of_scale(const float* grad_scale) {
  return grad_scale ? C(1) / C(*grad_scale) : C(1);
}
