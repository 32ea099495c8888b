// Number types, how they are converted and rounded, and random numbers: the bits of reference.py.
#pragma once

#include <cstdint>

struct BF16 {
  uint16_t bits;
};
struct FP16 {
  uint16_t bits;
};

// Of <bit> and <cmath>, which take longer to compile than a pass.
inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
inline uint64_t bits_of(double x) { return __builtin_bit_cast(uint64_t, x); }
inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline float absolute(float x) { return __builtin_fabsf(x); }
inline double absolute(double x) { return __builtin_fabs(x); }
inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }
constexpr float INF = __builtin_inff();

// In the compiler's eyes a choice between two numbers is a branch, and it hardly vectorises a loop with branches.
inline uint32_t choose(bool first, uint32_t a, uint32_t b) { return (a & -uint32_t(first)) | (b & ~-uint32_t(first)); }
inline float choose(bool first, float a, float b) { return float_of(choose(first, bits_of(a), bits_of(b))); }
inline double choose(bool first, double a, double b) { return first ? a : b; }

template <typename C>
inline bool finite(C x) {
  return absolute(x) < C(INF);
}

// As torch.maximum, NaN if one of them is.
template <typename C>
inline C maximum(C a, C b) {
  return choose((a > b) | (a != a), a, b);
}

// As torch.sign: 0 for NaN.
template <typename C>
inline C sign(C x) {
  return C(int(x > C(0)) - int(x < C(0)));
}

// -- conversions ----------------------------------------------------------------------------------------------------

// The bits of the fp32 number with the same magnitude.
inline uint32_t magnitude(float x) { return bits_of(x) & 0x7FFFFFFFu; }
inline uint32_t magnitude(BF16 x) { return uint32_t(x.bits & 0x7FFFu) << 16; }
inline uint32_t magnitude(FP16 x) {
  const uint32_t half = x.bits & 0x7FFFu;
  const uint32_t normal = (half << 13) + ((112u + 112u * (half >= 0x7C00u)) << 23);
  return choose(half >= 0x400u, normal, bits_of(float(int(half)) * 0x1p-24f));
}

inline double widened(double x) { return x; }
inline float widened(float x) { return x; }
inline float widened(BF16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float widened(FP16 x) { return float_of(magnitude(x) | uint32_t(x.bits & 0x8000u) << 16); }

// Store a number, rounded to nearest even.
inline void store(double& to, double x) { to = x; }
template <typename C>
inline void store(float& to, C x) {
  to = float(x);
}
template <typename C>
inline void store(BF16& to, C x) {
  const uint32_t bits = bits_of(float(x));
  // A NaN that arithmetic has made is one without its lower half, too. Rounded, it might overflow into a zero.
  const uint32_t half = (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0 : ((bits >> 16) & 1) + 0x7FFFu;
  to.bits = uint16_t((bits + half) >> 16);
}
template <typename C>
inline void store(FP16& to, C x) {
  const uint32_t bits = bits_of(float(x)), size = bits & 0x7FFFFFFFu;
  const uint32_t normal = (size + 0xFFFu + ((size >> 13) & 1) - (112u << 23)) >> 13;
  const uint32_t subnormal = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
  uint32_t half = choose(size < 0x38800000u, subnormal, normal);
  half = choose(size >= 0x477FF000u, uint32_t(0x7C00u), half);
  half = choose(size > 0x7F800000u, uint32_t(0x7E00u), half);
  to.bits = uint16_t(half | ((bits >> 16) & 0x8000u));
}

// -- random numbers -------------------------------------------------------------------------------------------------

// Of an element, `x` is its index times WEYL plus the key. Loops add up the products: a multiplication for each element
// would be their slowest instruction.
inline uint32_t random_bits(uint32_t x) { return (x ^ x >> 15) * MIX; }
inline int32_t high_half(uint32_t bits) { return int32_t(bits) >> 16; }
inline int32_t low_half(uint32_t bits) { return int32_t((bits ^ (bits >> 16)) << 16) >> 16; }
inline float uniform(int32_t rand) { return float(rand | 1) * 0x1p-16f; }

// Store a number, rounded to one of its two neighbours so that the mean over `rand` is the number; types of more than 16
// bits hold it as it is. From LARGE on it is rounded to nearest.
template <typename T, typename C>
inline void store_stochastically(T& to, C x, int32_t) {
  store(to, x);
}
inline void store_stochastically(BF16& to, float x, int32_t rand) {
  const uint32_t bits = bits_of(x);
  const uint32_t nearest = choose(x == x, ((bits >> 16) & 1) + 0x7FFFu, 0u);
  const uint32_t add = (bits & 0x7FFFFFFFu) < bits_of(LARGE) ? uint32_t(rand) & 0xFFFFu : nearest;
  to.bits = uint16_t((bits + add) >> 16);
}
inline void store_stochastically(FP16& to, float x, int32_t rand) {
  // fp16 has 10 bits after the leading one; subnormals have the step of the smallest normal number. In 2**13rds of a
  // step the noise is an odd integer, and as all factors are powers of two, each product is exact.
  const uint32_t binade = bits_of(x) & 0x7F800000u, step = bits_of(float_of(binade) * 0x1p-23f);
  const uint32_t smallest = bits_of(0x1p-37f);
  // Of positive numbers the larger one has the larger bits.
  const float grain = float_of(step > smallest ? step : smallest), shift = grain * (12582912.0f * 8192.0f);
  float y = (x + grain * float((rand >> 3) | 1) + shift) - shift;
  y = choose(y > 65504.0f, 65504.0f, choose(y < -65504.0f, -65504.0f, y));
  store(to, choose(absolute(x) < LARGE, y, x));
}
