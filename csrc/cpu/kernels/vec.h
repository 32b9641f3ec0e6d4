// Vectors of one instruction set: arithmetic comes from GCC's vector extensions, so every kernel is written once and
// compiled per level (-DFASTFORMER_ISA=baseline|avx2|avx512) into a namespace of that name.
//
// Nothing here may use code from the C++ standard library: the linker would keep one copy of a shared inline
// function for all levels, and an AVX-512 copy crashes on a machine without it.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#ifndef FASTFORMER_ISA
#error "compile with -DFASTFORMER_ISA=<level>"
#endif

#define FF_INLINE inline __attribute__((always_inline))

namespace fastformer::FASTFORMER_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

// Storage types of 16 bits: computed in float.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// The type that a storage type is computed in.
template <class T> struct ComputeType { using type = float; };
template <> struct ComputeType<double> { using type = double; };
template <class T> using compute_t = typename ComputeType<T>::type;

template <class S> struct VecType { typedef S type __attribute__((vector_size(kVecBytes))); };
template <class S> using Vec = typename VecType<S>::type;
template <class S> constexpr int kLanes = kVecBytes / int(sizeof(S));

// The integer of a floating-point lane's width: the type of masks and of bit patterns.
template <class S> struct IntType { using type = int32_t; };
template <> struct IntType<double> { using type = int64_t; };
template <class S> using IntVec = Vec<typename IntType<S>::type>;

template <class S> FF_INLINE Vec<S> splat(S x) { return x - Vec<S>{}; }
template <class S> FF_INLINE Vec<S> zero() { return Vec<S>{}; }

// 0, 1, 2 ...: a literal, because the compiler folds what is computed from it, but not a vector filled in a loop.
template <class S> FF_INLINE IntVec<S> lane_numbers() {
  if constexpr (kLanes<S> == 16)
    return IntVec<S>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  else if constexpr (kLanes<S> == 8)
    return IntVec<S>{0, 1, 2, 3, 4, 5, 6, 7};
  else if constexpr (kLanes<S> == 4)
    return IntVec<S>{0, 1, 2, 3};
  else
    return IntVec<S>{0, 1};
}

template <class To, class From> FF_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

template <class T> FF_INLINE T min(T a, T b) { return a < b ? a : b; }
template <class T> FF_INLINE T max(T a, T b) { return a > b ? a : b; }

// ---- scalar conversions ----

FF_INLINE float to_compute(float x) { return x; }
FF_INLINE double to_compute(double x) { return x; }
FF_INLINE float to_compute(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
FF_INLINE float to_compute(f16 h) {
  // Shift exponent and mantissa into place and rescale: exact, subnormals included; infinities and NaN apart.
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, rest = uint32_t(h.bits & 0x7fff) << 13;
  const float scaled = bit_cast<float>(rest) * 0x1p112f;
  const uint32_t bits = (h.bits & 0x7c00) == 0x7c00 ? (rest | 0x7f800000u) : bit_cast<uint32_t>(scaled);
  return bit_cast<float>(bits | sign);
}

template <class T> FF_INLINE T from_compute(compute_t<T> x) { return x; }
template <> FF_INLINE bf16 from_compute<bf16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // round to nearest, ties to even
}
template <> FF_INLINE f16 from_compute<f16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00)};  // rounds to 65520 or more: infinity
  if (magnitude < 0x38800000u) {                                   // subnormal: the adder rounds to nearest even
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13))};
}

// ---- loads and stores of a whole vector, any alignment ----

template <class T> FF_INLINE Vec<compute_t<T>> load(const T* p) {
  Vec<T> x;
  memcpy(&x, p, sizeof(x));
  return x;
}
template <class T> FF_INLINE void store(T* p, Vec<compute_t<T>> x) { memcpy(p, &x, sizeof(x)); }

typedef uint16_t HalfBits __attribute__((vector_size(kVecBytes / 2)));  // 16-bit values of one vector of floats

template <> FF_INLINE Vec<float> load<bf16>(const bf16* p) {
  HalfBits h;
  memcpy(&h, p, sizeof(h));
  return bit_cast<Vec<float>>(__builtin_convertvector(h, Vec<uint32_t>) << 16);
}
template <> FF_INLINE void store<bf16>(bf16* p, Vec<float> x) {
  const Vec<uint32_t> bits = bit_cast<Vec<uint32_t>>(x);
  const Vec<uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Vec<uint32_t> is_nan = bit_cast<Vec<uint32_t>>(x != x);
  const HalfBits h = __builtin_convertvector((rounded & ~is_nan) | (((bits >> 16) | 0x40) & is_nan), HalfBits);
  memcpy(p, &h, sizeof(h));
}
template <> FF_INLINE Vec<float> load<f16>(const f16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec<float> x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = to_compute(p[i]);
  return x;
#endif
}
template <> FF_INLINE void store<f16>(f16* p, Vec<float> x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = from_compute<f16>(x[i]);
#endif
}

// ---- the first n lanes only; the others load as `fill` ----

template <class T> FF_INLINE Vec<compute_t<T>> load_n(const T* p, int n, compute_t<T> fill = 0) {
  Vec<compute_t<T>> x = splat<compute_t<T>>(fill);
#if defined(__AVX512F__)
  if constexpr (__is_same(T, float)) return (Vec<float>)_mm512_mask_loadu_ps((__m512)x, __mmask16((1u << n) - 1), p);
#endif
  for (int i = 0; i < kLanes<compute_t<T>>; ++i)
    if (i < n) x[i] = to_compute(p[i]);
  return x;
}
template <class T> FF_INLINE void store_n(T* p, Vec<compute_t<T>> x, int n) {
#if defined(__AVX512F__)
  if constexpr (__is_same(T, float)) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)x);
    return;
  }
#endif
  T values[kLanes<compute_t<T>>];
  store(values, x);
  memcpy((void*)p, values, size_t(n) * sizeof(T));
}

// Past the caches, to an address that is a multiple of kVecBytes; others see it after a streams_done().
FF_INLINE void stream(void* p, Vec<int32_t> x) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)p, (__m512i)x);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)p, (__m256i)x);
#else
  memcpy(p, &x, sizeof(x));
#endif
}
FF_INLINE void streams_done() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// ---- reductions over the lanes, in a fixed order ----

template <class S> FF_INLINE Vec<S> swap_halves(Vec<S> x, int step) {
  return __builtin_shuffle(x, lane_numbers<S>() ^ typename IntType<S>::type(step));
}
template <class S> FF_INLINE S sum(Vec<S> x) {
#pragma GCC unroll 4
  for (int step = kLanes<S> / 2; step > 0; step /= 2) x += swap_halves<S>(x, step);
  return x[0];
}
template <class S> FF_INLINE S largest(Vec<S> x) {
#pragma GCC unroll 4
  for (int step = kLanes<S> / 2; step > 0; step /= 2) {
    const Vec<S> y = swap_halves<S>(x, step);
    x = x > y ? x : y;
  }
  return x[0];
}

// ---- a square of vectors to its transpose, in log2(lanes) steps ----

template <class S> FF_INLINE void transpose(Vec<S> x[kLanes<S>]) {
  constexpr int n = kLanes<S>;
#pragma GCC unroll 4
  for (int step = 1; step < n; step *= 2) {
    using Int = typename IntType<S>::type;
    const IntVec<S> lane = lane_numbers<S>(), second = (lane & Int(step)) != 0;
    const IntVec<S> even = second ? lane + Int(n - step) : lane;  // lanes of the pair (x[i], x[i + step]),
    const IntVec<S> odd = second ? lane + Int(n) : lane + Int(step);  // numbered 0 to 2 n - 1
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (i & step) continue;
      const Vec<S> a = x[i], b = x[i + step];
      x[i] = __builtin_shuffle(a, b, even);
      x[i + step] = __builtin_shuffle(a, b, odd);
    }
  }
}

}  // namespace fastformer::FASTFORMER_ISA
