// The products of two gradients from which GSAM decomposes one of them.
#pragma once

#include "norm.h"

// result <- <a, b>, <a, a>, <b, b>, a the other gradients, b the gradients.
//
//   G, C: types of both gradients, and computed in
//   sums: [chunks, 3], for use inside; result: [3], written
//
// Bytes an element: those of two gradients.
template <typename G, typename C>
void gap(const Segment* segments, int64_t count, int threads, double* sums, double* result) {
  for_each_chunk(segments, count, threads, [=](int64_t s, int64_t start, int64_t stop) {
    const Segment& segment = segments[s];
    const G* first = at<const G>(segment.other);
    const G* second = at<const G>(segment.grad);
    C dot[LANES] = {}, first_sq[LANES] = {}, second_sq[LANES] = {};
    each_in_lanes(start, stop, [&](int64_t i, int lane, int64_t) {
      const C a = widened(first[i]), b = widened(second[i]);
      dot[lane] += a * b;
      first_sq[lane] += a * a;
      second_sq[lane] += b * b;
    });
    double* own = sums + (segment.chunk + start / CHUNK) * 3;
    own[0] = total(dot);
    own[1] = total(first_sq);
    own[2] = total(second_sq);
  });
  add_up(segments, count, sums, 3, result);
}
