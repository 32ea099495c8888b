"""C++ for CPUs: how it is built, and the numbers its passes have in common.

torch.compile vectorises neither random numbers nor a look at the bits of a number: with stochastic rounding its code
takes twice as long.
"""

import ctypes
import functools
import inspect

import torch

# In the compiler's eyes a choice between two numbers is a branch, and a loop with a branch is not vectorised: hence
# `choose`. The same goes for a square root that sets errno. torch.compile vectorises by itself and tells the compiler
# not to.
_FLAGS = ("-ftree-loop-vectorize", "-fno-math-errno")
HEADER = r"""
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

struct BF16 { uint16_t bits; };
struct FP16 { uint16_t bits; };

inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

inline uint32_t choose(bool first, uint32_t a, uint32_t b) { return (a & -uint32_t(first)) | (b & ~-uint32_t(first)); }
inline float choose(bool first, float a, float b) { return float_of(choose(first, bits_of(a), bits_of(b))); }
inline double choose(bool first, double a, double b) {
  uint64_t mask = -uint64_t(first);
  return std::bit_cast<double>((std::bit_cast<uint64_t>(a) & mask) | (std::bit_cast<uint64_t>(b) & ~mask));
}
template <typename C>
inline bool finite(C x) { return std::fabs(x) < C(INFINITY); }

// The bits of the fp32 number with the same magnitude.
inline uint32_t magnitude(float x) { return bits_of(x) & 0x7FFFFFFFu; }
inline uint32_t magnitude(BF16 x) { return uint32_t(x.bits & 0x7FFFu) << 16; }
inline uint32_t magnitude(FP16 x) {
  uint32_t half = x.bits & 0x7FFFu;
  uint32_t normal = (half << 13) + ((112u + 112u * (half >= 0x7C00u)) << 23);
  return choose(half >= 0x400u, normal, bits_of(float(int(half)) * 0x1p-24f));
}

inline double widened(double x) { return x; }
inline float widened(float x) { return x; }
inline float widened(BF16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float widened(FP16 x) { return float_of(magnitude(x) | uint32_t(x.bits & 0x8000u) << 16); }

// Rounded to nearest even.
inline void store(double& to, double x) { to = x; }
template <typename C>
inline void store(float& to, C x) { to = float(x); }
template <typename C>
inline void store(BF16& to, C number) {
  uint32_t bits = bits_of(float(number)), rounded = bits + ((bits >> 16) & 1) + 0x7FFFu;
  // A NaN whose payload lies in the lower half must not turn into an infinity, nor overflow into a zero.
  to.bits = uint16_t(choose((bits & 0x7FFFFFFFu) > 0x7F800000u, bits | 0x400000u, rounded) >> 16);
}
template <typename C>
inline void store(FP16& to, C number) {
  uint32_t bits = bits_of(float(number)), size = bits & 0x7FFFFFFFu;
  uint32_t normal = (size + 0xFFFu + ((size >> 13) & 1) - (112u << 23)) >> 13;
  uint32_t subnormal = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
  uint32_t half = choose(size < 0x38800000u, subnormal, normal);
  half = choose(size >= 0x477FF000u, uint32_t(0x7C00u), half);
  half = choose(size > 0x7F800000u, uint32_t(0x7E00u), half);
  to.bits = uint16_t(half | ((bits >> 16) & 0x8000u));
}

// The same for a number that comes from 16-bit ones alone: a NaN then has nothing in the lower half.
template <typename T, typename C>
inline void store_narrow(T& to, C number) { store(to, number); }
template <typename C>
inline void store_narrow(BF16& to, C number) {
  uint32_t bits = bits_of(float(number));
  to.bits = uint16_t((bits + ((bits >> 16) & 1) + 0x7FFFu) >> 16);
}
"""
TYPES = {torch.float64: "double", torch.float32: "float", torch.bfloat16: "BF16", torch.float16: "FP16"}
# With fewer elements other threads would come too late to help.
_ALONE = 1 << 15


@functools.cache
def library(source: str) -> ctypes.CDLL:
    """The C++ source, built by what builds torch.compile's code and kept in its cache."""
    from torch._inductor.codecache import CppCodeCache

    # From torch 2.13 on: not to try out in processes which vector instructions work. `-march=native` has them all.
    known = inspect.signature(CppCodeCache.load_async).parameters
    options = {"needs_vec_isa": False} if "needs_vec_isa" in known else {}
    return CppCodeCache.load(source, device_type="cpu", extra_flags=_FLAGS, **options)


def threads(n: int) -> int:
    """How many threads a pass over n elements is worth."""
    return torch.get_num_threads() if n > _ALONE else 1
