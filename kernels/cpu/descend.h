// One step of an optimizer's rule from the clean weights, which also undoes a perturbation.
#pragma once

#include "numbers.h"
#include "rules.h"
#include "segments.h"

struct DescendOptions {
  int lanes;
  bool remainder, anchor, ema, other, orthogonal, stochastic;
};

// g <- factor * g + other * other_grad, w, state <- rule(w, g, state), ema <- ema + rate * (w - ema); see
// reference.descend_. A coordinate whose new state is not finite keeps its clean weight and its state.
//
//   RULE: of rules.h
//   T, G, S, R, C: types of weights, of gradients, of the state, of remainders, and computed in
//   state0, state1, state2, remainder, anchor, ema, orthogonal: lanes [size], all but `anchor` written
//   coefficients, key: [count]
//
// Bytes an element: those of two weights, a gradient, twice the state and other lanes (AdamW in fp32: 28).
template <typename RULE, typename T, typename G, typename S, typename R, typename C, DescendOptions OPTIONS>
void descend(const Segment* segments, int64_t count, int threads, S* state0, S* state1, S* state2, R* remainder,
             const T* anchor, C* ema, T* orthogonal, const typename RULE::template Coefficients<C>* coefficients,
             const uint32_t* key) {
  for_each_chunk(segments, count, threads, [=](int64_t s, int64_t start, int64_t stop) {
    const Segment& segment = segments[s];
    T* weight = at<T>(segment.weight);
    // Often the same memory as the weights.
    const T* clean = at<const T>(segment.clean);
    const G* grad = at<const G>(segment.grad);
    const G* other_grad = at<const G>(segment.other);
    S* const lane0 = state0 + segment.offset;
    S* const lane1 = state1 + segment.offset;
    S* const lane2 = state2 + segment.offset;
    R* const lost = remainder + segment.offset;
    const T* const anchors = anchor + segment.offset;
    C* const average = ema + segment.offset;
    T* const kept = orthogonal + segment.offset;
    const auto c = coefficients[s];
    const uint32_t own_key = key[s];
    const auto store_lane = [](S& to, C x, C old, bool update, uint32_t bits, bool stochastic) {
      x = choose(update, x, old);
      if (stochastic) store_stochastically(to, x, low_half(bits));
      else store(to, x);
    };
    uint32_t place = uint32_t(start) * WEYL;
    IN_ANY_ORDER
    for (int64_t i = start; i < stop; i++, place += WEYL) {
      C old_w;
      if constexpr (OPTIONS.remainder) old_w = combined(clean[i], lost[i]);
      else old_w = widened(clean[i]);
      const C own = C(widened(grad[i]));
      C g = own * c.factor;
      if (OPTIONS.other) {
        const C second = c.other * C(widened(other_grad[i]));
        if (OPTIONS.orthogonal) store(kept[i], own - second);
        else g += choose(finite(second), second, C(0));
      }
      const C old0 = OPTIONS.lanes > 0 ? C(widened(lane0[i])) : C(0);
      const C old1 = OPTIONS.lanes > 1 ? C(widened(lane1[i])) : C(0);
      const C old2 = OPTIONS.lanes > 2 ? C(widened(lane2[i])) : C(0);
      C w = old_w, state[3] = {old0, old1, old2};
      const C from_anchor = OPTIONS.anchor ? w - C(widened(anchors[i])) : w;
      const bool update = RULE::template step<OPTIONS.anchor, OPTIONS.lanes>(c, w, g, from_anchor, state);

      w = choose(update, w, old_w);
      const uint32_t bits = random_bits(place + own_key);
      // Lanes after the first are second moments: with decays near 1 their updates are smaller than half a step.
      if (OPTIONS.lanes > 0) store_lane(lane0[i], state[0], old0, update, bits, false);
      if (OPTIONS.lanes > 1) store_lane(lane1[i], state[1], old1, update, bits, OPTIONS.stochastic);
      if (OPTIONS.lanes > 2) store_lane(lane2[i], state[2], old2, update, bits, OPTIONS.stochastic);
      if constexpr (OPTIONS.remainder) {
        split(w, weight[i], lost[i]);
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
    }
  });
}
