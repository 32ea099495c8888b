// The formats of fewer bits: moments and backups in 8 bits, and master weights; see formats.py for what they mean.
#pragma once

#include "numbers.h"

// -- moments ----------------------------------------------------------------------------------------------------------

// The scale of a group whose largest magnitude has these bits: rounded up to bf16; 0 below the normal numbers.
inline float scale_of(uint32_t largest) {
  const uint32_t up = (largest + 0xFFFFu) & 0xFFFF0000u;
  return float_of((up < 0x7F7F0000u ? up : 0x7F7F0000u) & -uint32_t(up >= bits_of(SMALLEST)));
}

// What the codes of a lane count: of first moments, and of second ones.
constexpr double levels_of(int8_t) { return SIGNED_LEVELS; }
constexpr double levels_of(uint8_t) { return UNSIGNED_LEVELS; }

// What codes are multiplied with, and what moments are.
template <typename S>
inline float unit_of(S, float scale) {
  return scale * float(1 / levels_of(S()));
}
template <typename S>
inline float inverse_of(S, float scale) {
  return scale > 0 ? float(levels_of(S())) / scale : 0;
}

inline float decoded(int8_t code, float unit) {
  const float root = code;
  return root * absolute(root) * unit;
}
inline void encode(int8_t& code, float x, float inverse, uint32_t noise) {
  const float level = square_root(absolute(x) * inverse);
  const float centred = float_of(bits_of(level) | (bits_of(x) & 0x80000000u)) + 384.0f;
  code = int8_t(((bits_of(centred) + noise) >> 15) ^ 0x80u);
}

inline float decoded(uint8_t code, float unit) {
  const float root = code, square = root * root;
  return square * square * unit;
}
inline void encode(uint8_t& code, float x, float inverse, uint32_t noise) {
  const float level = square_root(square_root(absolute(x) * inverse));
  code = uint8_t((bits_of(choose(level > 1, level, 1.0f) + 256.0f) + noise) >> 15);
}

constexpr uint32_t TO_NEAREST = 0x4000;
// Rounds a code of lane i by one of 32 random bits' bytes, of which the highest is for the weight.
inline uint32_t noise_of(uint32_t bits, int i) { return (bits >> (16 - 8 * i) & 0xFFu) << 7 | 0x40u; }

// -- backups ----------------------------------------------------------------------------------------------------------

// 16-bit floats as integers in the order of the numbers.
template <typename T>
inline int32_t ordered(T weight) {
  const int32_t bits = int16_t(weight.bits);
  return bits ^ (bits >> 15 & 0x7FFF);
}
template <typename T>
inline T unordered(int32_t any) {
  const int32_t order = int16_t(any);
  return T{uint16_t(order ^ (order >> 15 & 0x7FFF))};
}

// Moves a weight to `target`, by at most 127 steps, and returns the steps.
template <typename T>
inline int8_t displace(T& weight, T target) {
  const int32_t before = ordered(weight);
  int32_t moved = ordered(target) - before;
  moved = moved < -127 ? -127 : moved;
  moved = moved > 127 ? 127 : moved;
  weight = unordered<T>(before + moved);
  return int8_t(moved);
}

// -- master weights ---------------------------------------------------------------------------------------------------

// The fp32 number of which `weight` is the rounding: int16_t or int8_t for BF16, int32_t for FP16.
inline float combined(BF16 weight, int16_t remainder) {
  const uint32_t bits = uint32_t(weight.bits) << 16;
  const float master = float_of(bits + uint32_t(int32_t(remainder)));
  return choose(master == master, master, float_of(bits));
}
inline float combined(BF16 weight, int8_t remainder) {
  const uint32_t bits = uint32_t(weight.bits) << 16;
  const float master = float_of(bits + (uint32_t(int32_t(remainder)) << 8));
  return choose(master == master, master, float_of(bits));
}
inline float combined(FP16 weight, int32_t remainder) {
  const float wide = widened(weight), master = float_of(bits_of(wide) + uint32_t(remainder));
  FP16 rounded;
  store(rounded, master);
  return choose(widened(rounded) == wide, master, wide);
}

// The rounding of `master`, and what it loses; 24-bit master weights are rounded by a byte, or by 0x80 to nearest.
inline void split(float master, BF16& weight, int16_t& remainder, uint32_t) {
  // Where the weight was set to an infinity, no arithmetic has made the NaN.
  store(weight, choose(master == master, master, __builtin_nanf("")));
  const int32_t lost = int32_t(bits_of(master) - (uint32_t(weight.bits) << 16));
  remainder = int16_t(lost < 32767 ? lost : 32767);
}
inline void split(float master, BF16& weight, int8_t& remainder, uint32_t random) {
  const uint32_t kept = bits_of(master) + random;
  weight.bits = uint16_t(choose(master == master, kept + 0x8000u, bits_of(master)) >> 16);
  remainder = int8_t(kept >> 8);
}
inline void split(float master, FP16& weight, int32_t& remainder, uint32_t) {
  store(weight, master);
  remainder = int32_t(bits_of(master) - bits_of(widened(weight)));
}
