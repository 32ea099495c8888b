// One step of an optimizer's rule from the clean weights, which also undoes a perturbation.
#pragma once

#include "codecs.h"
#include "rules.h"
#include "segments.h"

struct DescendOptions {
  int lanes;
  bool coded, steps, remainder, anchor, ema, other, orthogonal, stochastic;
};

// Where moments have codes, as many elements are worked on together as share a scale.
template <typename C>
struct Group {
  C state[3][GROUP];
  uint32_t bits[GROUP];
};

// Writes lane i of a group's new state as codes, and their scale.
template <typename S, typename C>
inline void store_codes(S* codes, BF16& scale, const Group<C>& group, int i, int size, bool stochastic) {
  uint32_t largest = 0;
  for (int j = 0; j < size; j++) {
    const uint32_t one = magnitude(float(group.state[i][j]));
    largest = one > largest ? one : largest;
  }
  const float wide = scale_of(largest), inverse = inverse_of(S(), wide);
  scale.bits = uint16_t(bits_of(wide) >> 16);
  IN_ANY_ORDER
  for (int j = 0; j < size; j++)
    encode(codes[j], float(group.state[i][j]), inverse,
           stochastic ? noise_of(group.bits[j], i) : TO_NEAREST);
}

// g <- factor * g + other * other_grad, w, state <- rule(w, g, state), ema <- ema + rate * (w - ema); see
// reference.descend_. A coordinate whose new state is not finite keeps its clean weight and its state.
//
//   RULE: of rules.h
//   T, G, S, U, R, C: types of weights, of gradients, of the first lane of the state and of the others, of remainders,
//   and computed in
//   state0, state1, state2, remainder, anchor, ema, orthogonal: lanes [size], all but `anchor` written
//   scale0, scale1, scale2: of states that are codes [size / 32]; steps: from the clean 16-bit weights [size]
//   coefficients, key: [count]
//
// Bytes an element: those of two weights, a gradient, twice the state and other lanes (AdamW in fp32: 28).
template <typename RULE, typename T, typename G, typename S, typename U, typename R, typename C, DescendOptions OPTIONS>
void descend(const Segment* segments, int64_t count, int threads, S* state0, U* state1, U* state2, BF16* scale0,
             BF16* scale1, BF16* scale2, const int8_t* steps, R* remainder, const T* anchor, C* ema, T* orthogonal,
             const typename RULE::template Coefficients<C>* coefficients, const uint32_t* key) {
  for_each_chunk(segments, count, threads, [=](int64_t s, int64_t start, int64_t stop) {
    const Segment& segment = segments[s];
    T* weight = at<T>(segment.weight);
    // Often the same memory as the weights.
    const T* clean = at<const T>(segment.clean);
    const G* grad = at<const G>(segment.grad);
    const G* other_grad = at<const G>(segment.other);
    S* const lane0 = state0 + segment.offset;
    U* const lane1 = state1 + segment.offset;
    U* const lane2 = state2 + segment.offset;
    BF16* const own_scale0 = scale0 + segment.offset / GROUP;
    BF16* const own_scale1 = scale1 + segment.offset / GROUP;
    BF16* const own_scale2 = scale2 + segment.offset / GROUP;
    const int8_t* const moved = steps + segment.offset;
    R* const lost = remainder + segment.offset;
    const T* const anchors = anchor + segment.offset;
    C* const average = ema + segment.offset;
    T* const kept = orthogonal + segment.offset;
    const auto c = coefficients[s];
    const uint32_t own_key = key[s];
    // Updates all of element i except the state, of which it is given the old one and leaves the new one.
    const auto update = [=](int64_t i, uint32_t bits, C* state) __attribute__((always_inline)) {
      T from = clean[i];
      if constexpr (OPTIONS.steps) from = unordered<T>(ordered(from) - moved[i]);
      C old_w;
      if constexpr (OPTIONS.remainder) old_w = combined(from, lost[i]);
      else old_w = widened(from);
      const C own = C(widened(grad[i]));
      C g = own * c.factor;
      if (OPTIONS.other) {
        const C second = c.other * C(widened(other_grad[i]));
        if (OPTIONS.orthogonal) store(kept[i], own - second);
        else g += choose(finite(second), second, C(0));
      }
      C w = old_w;
      const C old[3] = {state[0], state[1], state[2]};
      const C from_anchor = OPTIONS.anchor ? w - C(widened(anchors[i])) : w;
      const bool holds = RULE::template step<OPTIONS.anchor, OPTIONS.lanes>(c, w, g, from_anchor, state);
      w = choose(holds, w, old_w);
      for (int k = 0; k < 3; k++) state[k] = choose(holds, state[k], old[k]);
      if constexpr (OPTIONS.remainder) {
        split(w, weight[i], lost[i], OPTIONS.stochastic ? bits >> 24 : 0x80u);
      } else {
        T stored;
        if (OPTIONS.stochastic) store_stochastically(stored, w, high_half(bits));
        else store(stored, w);
        weight[i] = stored;
        w = widened(stored);
      }
      if (OPTIONS.ema) {
        const C change = c.rate * (w - average[i]);
        average[i] = choose(finite(change), average[i] + change, average[i]);
      }
    };
    uint32_t place = uint32_t(start) * WEYL + own_key;
    if constexpr (OPTIONS.coded) {
      for (int64_t first = start; first < stop; first += GROUP, place += GROUP * WEYL) {
        const int64_t row = first / GROUP;
        const float unit0 = unit_of(S(), widened(own_scale0[row]));
        const float unit1 = OPTIONS.lanes > 1 ? unit_of(U(), widened(own_scale1[row])) : 0;
        const float unit2 = OPTIONS.lanes > 2 ? unit_of(U(), widened(own_scale2[row])) : 0;
        Group<C> group;
        const auto element = [&](int j) __attribute__((always_inline)) {
          const int64_t i = first + j;
          const uint32_t bits = random_bits(place + j * WEYL);
          C state[3] = {C(decoded(lane0[i], unit0)), C(0), C(0)};
          if (OPTIONS.lanes > 1) state[1] = C(decoded(lane1[i], unit1));
          if (OPTIONS.lanes > 2) state[2] = C(decoded(lane2[i], unit2));
          update(i, bits, state);
          for (int k = 0; k < OPTIONS.lanes; k++) group.state[k][j] = state[k];
          group.bits[j] = bits;
        };
        const auto store_group = [&](int size) __attribute__((always_inline)) {
          store_codes(lane0 + first, own_scale0[row], group, 0, size, OPTIONS.stochastic);
          if (OPTIONS.lanes > 1) store_codes(lane1 + first, own_scale1[row], group, 1, size, OPTIONS.stochastic);
          // A maximum, which would creep upwards.
          if (OPTIONS.lanes > 2) store_codes(lane2 + first, own_scale2[row], group, 2, size, false);
        };
        if (first + GROUP <= stop) {
          IN_ANY_ORDER
          for (int j = 0; j < GROUP; j++) element(j);
          store_group(GROUP);
        } else {
          for (int j = 0; first + j < stop; j++) element(j);
          store_group(int(stop - first));
        }
      }
    } else {
      const auto store_second = [](U& to, C x, uint32_t bits) {
        // With decays near 1 updates of second moments are smaller than half a step.
        if (OPTIONS.stochastic) store_stochastically(to, x, low_half(bits));
        else store(to, x);
      };
      IN_ANY_ORDER
      for (int64_t i = start; i < stop; i++, place += WEYL) {
        const uint32_t bits = random_bits(place);
        C state[3] = {C(0), C(0), C(0)};
        if (OPTIONS.lanes > 0) state[0] = C(widened(lane0[i]));
        if (OPTIONS.lanes > 1) state[1] = C(widened(lane1[i]));
        if (OPTIONS.lanes > 2) state[2] = C(widened(lane2[i]));
        update(i, bits, state);
        if (OPTIONS.lanes > 0) store(lane0[i], state[0]);
        if (OPTIONS.lanes > 1) store_second(lane1[i], state[1], bits);
        if (OPTIONS.lanes > 2) store_second(lane2[i], state[2], bits);
      }
    }
  });
}
