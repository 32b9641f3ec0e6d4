// Stands in for CUDA's header of this name: float16 and its conversions, rounded to nearest even.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "cuda_runtime.h"

struct __half_raw { unsigned short x; };
struct __half {
  uint16_t bits;
  __half() = default;
  __half(__half_raw raw) : bits(raw.x) {}
  __half(float x);
  operator float() const;
};
struct alignas(4) __half2 { __half x, y; };
using half = __half;
using half2 = __half2;

inline __half __ushort_as_half(unsigned short bits) { return __half(__half_raw{bits}); }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }

inline __half __float2half_rn(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) return __ushort_as_half(0x7fff);  // NaN
  if (magnitude < 0x38800000)  // subnormal: 0.5 + x has the unit of the last place, 2^-24
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  else if (magnitude >= 0x47800000)
    half = 0x7c00;
  else
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;  // up to infinity
  return __ushort_as_half(static_cast<uint16_t>(sign | half));
}
inline float __half2float(__half h) {
  const uint32_t sign = (h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  if (exponent == 0) return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(float(fraction) * 0x1p-24f));
  return std::bit_cast<float>(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13);
}
inline __half::__half(float x) : bits(__float2half_rn(x).bits) {}
inline __half::operator float() const { return __half2float(*this); }

inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 make_half2(__half x, __half y) { return {x, y}; }
