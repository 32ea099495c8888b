// What an optimizer does with one element: the new weight and state, and whether they may be kept.
//
// A rule has the name that it has in spec.DESCEND, from which the struct of its coefficients is generated. `prepare` makes
// its own ones of the numbers of its group and the count of updates, this one included. `step` makes the new weight and
// state of the clean weight `w`, the gradient `g`, and the lanes of the state, of which there are COUNT; `from_anchor` is
// w - anchor, or w where there is no anchor.
#pragma once

#include "numbers.h"

namespace rules {

// Decoupled decay to the anchor, or to zero.
template <bool ANCHORED, typename C>
inline C decayed(C w, C from_anchor, C decay) {
  return ANCHORED ? w - decay * from_anchor : w * (C(1) - decay);
}

// Algorithm 2 of arXiv 1711.05101; L2-SP, arXiv 1802.01483.
struct adamw {
  using Numbers = numbers::adamw;
  template <typename C>
  using Coefficients = coefficients::adamw<C>;

  static void prepare(const Numbers& n, double step, Coefficients<double>& c) {
    c.decay = n.lr * n.rate;
    c.new1 = 1 - n.beta1;
    c.beta2 = n.beta2;
    c.new2 = 1 - n.beta2;
    c.step_size = n.lr / (1 - __builtin_pow(n.beta1, step));
    c.inv_sqrt_bias2 = 1 / square_root(1 - __builtin_pow(n.beta2, step));
    c.eps = n.eps;
  }

  template <bool ANCHORED, int COUNT, typename C>
  static bool step(const Coefficients<C>& c, C& w, C g, C from_anchor, C* state) {
    const C m = state[0] + c.new1 * (g - state[0]), v = c.beta2 * state[1] + c.new2 * (g * g);
    w = decayed<ANCHORED>(w, from_anchor, c.decay);
    const C top = COUNT == 3 ? maximum(state[2], v) : v;
    const C denom = square_root(top) * c.inv_sqrt_bias2 + c.eps;
    w -= c.step_size * choose(denom > 0, m / denom, C(0));
    state[0] = m;
    state[1] = v;
    state[2] = top;
    return v < C(INF);
  }
};

// As torch.optim.SGD, whose decay is a part of the gradient.
struct sgd {
  using Numbers = numbers::sgd;
  template <typename C>
  using Coefficients = coefficients::sgd<C>;

  static void prepare(const Numbers& n, double step, Coefficients<double>& c) {
    // The first gradient is the first momentum, undampened.
    const bool first = step <= 1;
    c.decay = n.rate;
    c.momentum = first ? 0 : n.momentum;
    c.new_ = first ? 1 : n.new_;
    c.of_grad = n.of_grad;
    c.of_buffer = n.of_buffer;
    c.lr = n.lr;
  }

  template <bool ANCHORED, int COUNT, typename C>
  static bool step(const Coefficients<C>& c, C& w, C g, C from_anchor, C* state) {
    const C d = g + c.decay * from_anchor;
    if (COUNT == 0) {
      w -= c.lr * d;
      return finite(d);
    }
    state[0] = c.momentum * state[0] + c.new_ * d;
    w -= c.lr * (c.of_grad * d + c.of_buffer * state[0]);
    return finite(state[0]);
  }
};

// Algorithm 2 of arXiv 2302.06675.
struct lion {
  using Numbers = numbers::lion;
  template <typename C>
  using Coefficients = coefficients::lion<C>;

  static void prepare(const Numbers& n, double, Coefficients<double>& c) {
    c.decay = n.lr * n.rate;
    c.beta1 = n.beta1;
    c.new1 = 1 - n.beta1;
    c.new2 = 1 - n.beta2;
    c.lr = n.lr;
  }

  template <bool ANCHORED, int COUNT, typename C>
  static bool step(const Coefficients<C>& c, C& w, C g, C from_anchor, C* state) {
    const C u = c.beta1 * state[0] + c.new1 * g;
    state[0] = state[0] + c.new2 * (g - state[0]);
    w = decayed<ANCHORED>(w, from_anchor, c.decay) - c.lr * sign(u);
    return finite(state[0]);
  }
};

}  // namespace rules
