// Activations and their slopes in float32. Nothing overflows to NaN for a finite number, and NaN stays; infinities give
// what the formulas give, as in PyTorch.
#pragma once

#include "ptx.h"

namespace fastformer {

enum class Activation { none, gelu, gelu_tanh, relu, silu };

struct Activated {
  float value, slope;  // what isn't used is not computed
};

// To about 2 units in the last place: 2^n e^r with n = round(x / ln 2). 2^(x / ln 2) loses bits far from 0.
__device__ __forceinline__ float exp_approx(float x) {
  const float n = rintf(fminf(fmaxf(x * 1.44269504f, -126.0f), 126.0f));
  const float r = (x - n * 0.693145752f) - n * 1.42860682e-6f;  // ln 2 in two parts, the first of 16 bits
  return ptx::exp2_approx(r * 1.44269504f) * ptx::exp2_approx(n);
}

__device__ __forceinline__ Activated gelu(float x) {
  const float cdf = 0.5f * (1.0f + erff(x * 0.707106781f));
  const float density = 0.398942280f * ptx::exp2_approx(x * x * -0.721347520f);  // e^(-x^2 / 2) / sqrt(2 pi)
  return {x * cdf, cdf + x * density};
}
// (1 + tanh u) / 2 = 1 / (1 + e^-2u) for u = sqrt(2 / pi) (x + 0.044715 x^3), here in units of ln 2.
__device__ __forceinline__ Activated gelu_tanh(float x) {
  const float near = fminf(fmaxf(x, -16.0f), 16.0f);  // beyond it the sigmoid is 0 or 1
  const float doubled_u = x * (2.30220820f + 0.102943240f * near * near);
  const float sigmoid = ptx::reciprocal_approx(1.0f + ptx::exp2_approx(-doubled_u));
  const float rest = ptx::reciprocal_approx(1.0f + ptx::exp2_approx(doubled_u));
  return {x * sigmoid, sigmoid + x * sigmoid * rest * (1.59576912f + 0.214064449f * near * near)};
}
__device__ __forceinline__ Activated silu(float x) {
  const float sigmoid = ptx::reciprocal_approx(1.0f + exp_approx(-x));
  const float rest = ptx::reciprocal_approx(1.0f + exp_approx(x));
  return {x * sigmoid, sigmoid + x * sigmoid * rest};
}
__device__ __forceinline__ Activated relu(float x) { return {x < 0 ? 0.0f : x, x <= 0 ? 0.0f : 1.0f}; }

// f(function): one branch for all the elements that f applies the function to.
template <class F> __device__ __forceinline__ void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::none: return f([](float x) { return Activated{x, 1.0f}; });
    case Activation::gelu: return f([](float x) { return gelu(x); });
    case Activation::gelu_tanh: return f([](float x) { return gelu_tanh(x); });
    case Activation::relu: return f([](float x) { return relu(x); });
    case Activation::silu: return f([](float x) { return silu(x); });
  }
}

}  // namespace fastformer
