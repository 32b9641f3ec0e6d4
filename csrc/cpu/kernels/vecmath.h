// exp, the normal distribution and the activations, on vectors. In float by polynomials fitted for this file (minimax,
// Lawson's algorithm); in double by libm, lane by lane: double is there to check the kernels, not to be fast.
#pragma once

#include <math.h>

#include "kernels.h"
#include "vec.h"

namespace fastformer::FASTFORMER_ISA {

template <class F> FF_INLINE Vec<double> each_lane(Vec<double> x, F f) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = f(x[i]);
  return x;
}

// e^x for x <= 88.7 within 1.2 units in the last place, 0 below e^-87: subnormal numbers are slow and add nothing.
FF_INLINE Vec<float> exp_score(Vec<float> x) {
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, in the low bits
  const Vec<float> z = x * 0x1.715476p0f + kRound, n = z - kRound;
  const Vec<float> r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // x - n ln 2, |r| <= ln(2) / 2
  Vec<float> p = r * 0x1.6a23fep-10f + 0x1.123a10p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_mask_scalef_ps(__m512{}, _mm512_cmp_ps_mask((__m512)x, __m512{} - 87.0f, _CMP_NLT_UQ), (__m512)p,
                                           (__m512)n);
#else
  const Vec<float> y = bit_cast<Vec<float>>(bit_cast<Vec<int32_t>>(p) + (bit_cast<Vec<int32_t>>(z) << 23));
  return x < -87.0f ? Vec<float>{} : y;
#endif
}
// The same for any x: overflow gives inf, NaN stays.
FF_INLINE Vec<float> exp(Vec<float> x) {
  return x > 0x1.62e42ep6f ? Vec<float>{} + __builtin_inff() : exp_score(x);
}
FF_INLINE Vec<double> exp(Vec<double> x) {
  return each_lane(x, [](double v) { return ::exp(v); });
}
FF_INLINE Vec<double> exp_score(Vec<double> x) { return exp(x); }

// The normal distribution function Phi(x) = erfc(-x / sqrt 2) / 2, within 1e-7 absolute in float.
// erfc(t) = exp(t g(t)) for t >= 0, with a polynomial g: the negative side has no cancellation.
FF_INLINE Vec<float> normal_cdf(Vec<float> x) {
  const Vec<float> t = bit_cast<Vec<float>>(bit_cast<Vec<int32_t>>(x) & 0x7fffffff) * 0x1.6a09e6p-1f;
  Vec<float> g = t * -1.4119740399110015e-07f + 4.20987407778739e-06f;
  g = g * t - 5.121844878885895e-05f;
  g = g * t + 0.0003175142337568104f;
  g = g * t - 0.0009078364237211645f;
  g = g * t - 0.0008496118243783712f;
  g = g * t + 0.019899340346455574f;
  g = g * t - 0.10306823253631592f;
  g = g * t - 0.6365674138069153f;
  g = g * t - 1.1283822059631348f;
  const Vec<float> tail = 0.5f * exp_score(g * t);
  return x < 0 ? tail : 1.0f - tail;
}
FF_INLINE Vec<double> normal_cdf(Vec<double> x) {
  return each_lane(x, [](double v) { return 0.5 * erfc(-v * 0.70710678118654752440); });
}

// 2 sqrt(2 / pi) (x + 0.044715 x^3): gelu_tanh(x) = x sigmoid of this.
template <class S> FF_INLINE Vec<S> gelu_tanh_argument(Vec<S> x) {
  return x * (S(1.5957691216057308) + x * x * S(1.5957691216057308 * 0.044715));
}
template <class S> FF_INLINE Vec<S> sigmoid(Vec<S> x) { return S(1) / (S(1) + exp(-x)); }

// s = sigmoid(x) and its slope s (1 - s), neither with a cancellation.
template <class S> FF_INLINE void sigmoid_and_slope(Vec<S> x, Vec<S>& s, Vec<S>& slope) {
  const Vec<S> e = exp(x < 0 ? x : -x), p = S(1) / (S(1) + e);
  s = x < 0 ? e * p : p;
  slope = e * p * p;
}

template <class S> FF_INLINE Vec<S> activate(Activation activation, Vec<S> x) {
  switch (activation) {
    case Activation::gelu: return x * normal_cdf(x);
    case Activation::gelu_tanh: return x * sigmoid<S>(gelu_tanh_argument<S>(x));
    case Activation::relu: return x < 0 ? Vec<S>{} : x;
    case Activation::silu: return x * sigmoid<S>(x);
    case Activation::none: break;
  }
  return x;
}

// d activate(x) / dx
template <class S> FF_INLINE Vec<S> activation_gradient(Activation activation, Vec<S> x) {
  switch (activation) {
    case Activation::gelu: return normal_cdf(x) + x * exp(x * x * S(-0.5)) * S(0.39894228040143267794);
    case Activation::gelu_tanh: {
      Vec<S> s, slope;
      sigmoid_and_slope<S>(gelu_tanh_argument<S>(x), s, slope);
      return s + x * slope * (S(1.5957691216057308) + x * x * S(3 * 1.5957691216057308 * 0.044715));
    }
    case Activation::relu: return x > 0 ? splat<S>(1) : (x != x ? x : Vec<S>{});
    case Activation::silu: {
      Vec<S> s, slope;
      sigmoid_and_slope<S>(x, s, slope);
      return s + x * slope;
    }
    case Activation::none: break;
  }
  return splat<S>(1);
}

}  // namespace fastformer::FASTFORMER_ISA
