// The formats of fewer bits: moments and backups in 8 bits, and master weights; see formats.py for what they mean.
#pragma once

#include "numbers.h"

// -- moments ----------------------------------------------------------------------------------------------------------

// The scale of a group whose largest magnitude has these bits: rounded up to bf16; 0 below the normal numbers.
inline float scale_of(uint32_t largest) {
  const uint32_t up = (largest + 0xFFFFu) & 0xFFFF0000u;
  return float_of((up < 0x7F7F0000u ? up : 0x7F7F0000u) & -uint32_t(up >= 0x00800000u));
}

// Codes of first moments.
inline float decoded(int8_t code, float scale) {
  const float root = float(code) * (1.0f / 127);
  return root * absolute(root) * scale;
}
inline void encode(int8_t& code, float x, float inverse, uint32_t noise) {
  const float level = square_root(absolute(x) * inverse) * 127.0f;
  const float centred = float_of(bits_of(level) | (bits_of(x) & 0x80000000u)) + 384.0f;
  code = int8_t(((bits_of(centred) + noise) >> 15) ^ 0x80u);
}

// Codes of second moments.
inline float decoded(uint8_t code, float scale) {
  const float root = float(code) * (1.0f / 255), square = root * root;
  return square * square * scale;
}
inline void encode(uint8_t& code, float x, float inverse, uint32_t noise) {
  const float level = square_root(square_root(absolute(x) * inverse)) * 255.0f + 256.0f;
  const uint32_t nearest = ((bits_of(level) + noise) >> 15) & 0xFFu;
  code = uint8_t(nearest | uint32_t((nearest == 0) & (x > 0)));
}

constexpr uint32_t TO_NEAREST = 0x4000;
// Rounds a code of lane i by one byte of 16 random bits.
inline uint32_t noise_of(int32_t low_half, int i) { return (uint32_t(low_half) >> (8 * i) & 0xFFu) << 7 | 0x40u; }

// -- backups ----------------------------------------------------------------------------------------------------------

// 16-bit floats as integers in the order of the numbers.
template <typename T>
inline int32_t ordered(T weight) {
  const int32_t bits = int16_t(weight.bits);
  return bits ^ (bits >> 15 & 0x7FFF);
}
template <typename T>
inline T unordered(int32_t order) {
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
  const uint32_t bits = bits_of(master), is_number = -uint32_t(master == master);
  const uint32_t kept = (bits + choose(absolute(master) < LARGE, random, 0x80u)) & ~0xFFu;
  const uint32_t high = (kept + 0x8000u) & 0xFFFF0000u;
  weight.bits = uint16_t(((high & is_number) | (bits & ~is_number)) >> 16);
  remainder = int8_t(int32_t((kept - high) & is_number) >> 8);
}
inline void split(float master, FP16& weight, int32_t& remainder, uint32_t) {
  store(weight, master);
  remainder = int32_t(bits_of(master) - bits_of(widened(weight)));
}
