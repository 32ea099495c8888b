// The coefficients of the passes: a few numbers for each segment, from hyper-parameters, counts of updates and norms.
//
// In double; `formulas` has the same arithmetic with its sources. The structs are generated from `spec`.
#pragma once

#include "rules.h"

// The bits of `formulas.keys`.
inline uint32_t key_of(float step, const Member& member, uint32_t purpose) {
  uint32_t key = uint32_t(int64_t(step)) * STEP + uint32_t(member.salt) + purpose;
  key = (key ^ key >> 15) * MIX0;
  key = (key ^ key >> 15) * MIX1;
  return (key ^ key >> 16) + uint32_t(member.start) * WEYL;
}

// The gradients of an update, as multiples of what is there; `norm_sq` is the squared norm of their combination.
struct Direction {
  double own, other, norm_sq;
};

// GSAM, arXiv 2203.08065.
inline Direction decomposition(const double* dots, double alpha, double ratio) {
  const double dot = ratio * dots[0], first_sq = ratio * ratio * dots[1], second_sq = dots[2];
  if (!(finite(dot) && finite(first_sq) && second_sq > 0)) return {1, 0, second_sq};
  double vertical_sq = first_sq - dot * dot / second_sq;
  if (vertical_sq < 0) vertical_sq = 0;
  return {1 + alpha * dot / second_sq, -alpha * ratio, second_sq + alpha * alpha * vertical_sq};
}

// LookSAM's component, arXiv 2203.02714.
inline Direction orthogonal_part(const double* dots) {
  const bool usable = finite(dots[0]) && dots[1] > 0;
  return {1, usable ? dots[0] / dots[1] : 0, dots[2]};
}

// LookSAM between two sharpness-aware steps.
inline Direction reuse(const double* dots, double alpha) {
  const double dot = dots[0], kept_sq = dots[1], sq = dots[2];
  if (!(finite(kept_sq) && kept_sq > 0 && finite(sq))) return {1, 0, sq};
  const double factor = alpha * square_root(sq / kept_sq);
  return {1, factor, sq + 2 * factor * dot + factor * factor * kept_sq};
}

//   numbers: [groups]; members, steps, coefficients, key: [count], the last two written
//   norm_sq, scale: [1], the latter or null
template <typename C>
void climb_coefficients(const numbers::climb* numbers, const Member* members, int64_t count, const float* steps,
                        uint32_t purpose, const double* norm_sq, const float* scale,
                        coefficients::perturb<C>* coefficients, uint32_t* key) {
  const double inverse = scale ? 1 / double(*scale) : 1;
  const double norm = square_root(*norm_sq) * inverse;
  for (int64_t s = 0; s < count; s++) {
    const numbers::climb& n = numbers[members[s].group];
    coefficients[s].scale = C(norm < INF ? n.rho / (norm + 1e-12) * inverse : 0);
    coefficients[s].chance = C(n.chance);
    key[s] = key_of(steps[s], members[s], purpose);
  }
}

// The sign of the difference of the two norms of a pair; see `formulas.balanced`.
inline double larger_of_pair(const double* squares, const int64_t* pair) {
  const double more = squares[pair[0]] - squares[pair[1]];
  return finite(more) ? sign(more) : 0;
}

// As `climb_coefficients`; `steps` are written, too.
//
//   active: [count], or null; measured: [1], [3], or null; scale, other_scale, overflow: [1], or null
//   squares: [any], pairs: [count, 2], or both null; combined: an index into spec.COMBINED
template <typename RULE, typename C>
void descend_coefficients(const typename RULE::Numbers* numbers, const Member* members, int64_t count, float* steps,
                          const bool* active, int combined, uint32_t purpose, const double* measured,
                          const float* scale, const float* other_scale, const float* overflow, const double* squares,
                          const int64_t* pairs, typename RULE::template Coefficients<C>* coefficients, uint32_t* key) {
  const double inverse = scale ? 1 / double(*scale) : 1, alpha = numbers->alpha, max_norm = numbers->max_norm;
  Direction direction = {1, 0, measured ? *measured : 0};
  if (combined == COMBINED_DECOMPOSED)
    direction = decomposition(measured, alpha, other_scale ? (scale ? double(*scale) : 1) / double(*other_scale) : 1);
  else if (combined == COMBINED_KEPT) direction = orthogonal_part(measured);
  else if (combined == COMBINED_REUSED) direction = reuse(measured, alpha);
  bool skip = overflow && *overflow != 0;
  double factor = inverse;
  if (measured && max_norm < INF) {
    const double norm = square_root(direction.norm_sq) * inverse, clip = max_norm / (norm + 1e-6);
    skip |= !finite(norm);
    factor *= clip > 1 ? 1 : clip;
  }
  const double own = skip ? __builtin_nan("") : direction.own * factor;
  for (int64_t s = 0; s < count; s++) {
    typename RULE::Numbers n = numbers[members[s].group];
    if (pairs) n.rate -= n.balance * larger_of_pair(squares, pairs + 2 * s) * (1 - n.lr * n.rate);
    steps[s] += float(!skip && (!active || active[s]));
    typename RULE::template Coefficients<double> c;
    c.factor = n.sign * own;
    c.other = combined == COMBINED_KEPT ? direction.other : n.sign * (direction.other * factor);
    c.rate = n.average + 0 * c.factor;
    RULE::prepare(n, steps[s], c);
    const double* wide = reinterpret_cast<const double*>(&c);
    C* narrow = reinterpret_cast<C*>(coefficients + s);
    for (unsigned i = 0; i < sizeof(c) / sizeof(double); i++) narrow[i] = C(wide[i]);
    key[s] = key_of(steps[s], members[s], purpose);
  }
}
