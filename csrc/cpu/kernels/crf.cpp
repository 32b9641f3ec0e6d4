// Linear-chain CRF: one chain, tag by tag. alpha[j] is the log of the summed scores of all paths that end in tag j, less
// the largest of them; the vectors run over the tags.

#include "lanes.h"
#include "vecmath.h"

namespace fastformer::FASTFORMER_ISA {

constexpr float kInfinity = __builtin_inff();
// Where nothing else is larger: a tag that no path reaches has exp(-inf - kLowest) = 0 and not NaN.
template <class S> constexpr S kLowest = sizeof(S) == 8 ? S(-__DBL_MAX__) : S(-__FLT_MAX__);
// Probabilities below it are left out of the gradient: their products would be subnormal, which is slow.
template <class S> constexpr S kLeast = sizeof(S) == 8 ? S(0) : S(1e-15);

// Of sums of exp: 0, or at least 1. log(2^k f) = k ln 2 + 2 artanh((f - 1) / (f + 1)), 1/sqrt 2 <= f < sqrt 2.
FF_INLINE Vec<float> log_of_sum(Vec<float> x) {
  const Vec<int32_t> bits = bit_cast<Vec<int32_t>>(x), k = (bits - 0x3f3504f3) >> 23;
  const Vec<float> f = bit_cast<Vec<float>>(bits - (k << 23));
  const Vec<float> s = (f - 1.0f) / (f + 1.0f), z = s * s;
  const Vec<float> series = (((z * (1 / 9.0f) + 1 / 7.0f) * z + 1 / 5.0f) * z + 1 / 3.0f) * z;
  const Vec<float> y = __builtin_convertvector(k, Vec<float>) * 0x1.62e430p-1f + 2.0f * (s + s * series);
  return x > 0 ? y : (x == 0 ? zero<float>() - kInfinity : x);  // NaN stays
}
FF_INLINE Vec<double> log_of_sum(Vec<double> x) {
  return each_lane(x, [](double v) { return ::log(v); });
}

template <class T> FF_INLINE const T* emissions_at(const CrfArgs& a, int64_t step) {
  return (const T*)a.emissions + a.positions[step] * a.stride;
}

// alpha = arrived + emissions less the largest, which is returned.
template <class T> FF_INLINE compute_t<T> emit(const CrfArgs& a, int64_t step, const compute_t<T>* arrived,
                                               compute_t<T>* alpha) {
  using S = compute_t<T>;
  const T* emissions = emissions_at<T>(a, step);
  Vec<S> most = splat<S>(kLowest<S>);
  for (int64_t c = 0; c < a.width; c += kLanes<S>) {
    const int lanes = int(min<int64_t>(max<int64_t>(a.tags - c, 0), kLanes<S>));
    const Vec<S> x = load_n(arrived + c, lanes, -kInfinity) + load_lanes(emissions + c, lanes);
    store(alpha + c, x);
    most = x > most ? x : most;
  }
  const S shift = largest<S>(most);
  for (int64_t c = 0; c < a.width; c += kLanes<S>) store(alpha + c, load(alpha + c) - shift);
  return shift;
}

// arrived[j] = log(sum over i of exp(alpha[i] + transitions[i, j]))
template <class S> FF_INLINE void sum_over_transitions(const CrfArgs& a, const S* alpha, S* arrived) {
  for (int64_t c = 0; c < a.width; c += kLanes<S>) {
    const S* to = (const S*)a.transitions + c;
    Vec<S> most = splat<S>(kLowest<S>), total = zero<S>();
    for (int64_t i = 0; i < a.tags; ++i) {
      const Vec<S> x = load(to + i * a.width) + alpha[i];
      most = x > most ? x : most;
    }
    for (int64_t i = 0; i < a.tags; ++i) total += exp_score(load(to + i * a.width) + alpha[i] - most);
    store(arrived + c, most + log_of_sum(total));
  }
}

// p = exp(alpha + end) / their sum, whose log is returned.
template <class S> FF_INLINE S finish(const CrfArgs& a, const S* alpha, S* p) {
  Vec<S> most = splat<S>(kLowest<S>), total = zero<S>();
  const S* end = (const S*)a.end;
  for (int64_t c = 0; c < a.width; c += kLanes<S>) {
    const Vec<S> x = load(alpha + c) + load(end + c);
    most = x > most ? x : most;
  }
  const S m = largest<S>(most);
  for (int64_t c = 0; c < a.width; c += kLanes<S>) {
    const Vec<S> e = exp_score(load(alpha + c) + load(end + c) - m);
    store(p + c, e);
    total += e;
  }
  const Vec<S> sums = splat<S>(sum<S>(total));
  for (int64_t c = 0; c < a.width; c += kLanes<S>) store(p + c, load(p + c) / sums);
  return m + log_of_sum(sums)[0];
}

template <class T> static double forward(const CrfArgs& a) {
  using S = compute_t<T>;
  const S *start = (const S*)a.start, *end = (const S*)a.end, *transitions = (const S*)a.transitions;
  S *alpha = (S*)a.scratch, *arrived = alpha + a.width;
  double log_likelihood = 0;  // score of the path less log of the sum of all, step by step
  for (int64_t step = 0; step < a.length; ++step) {
    const int64_t tag = a.path[step];
    if (step > 0) sum_over_transitions<S>(a, alpha, arrived);
    const S* row = step > 0 ? arrived : start;
    if (a.arrived)
      for_columns<S>(a.tags, [&](int64_t c, int lanes) {
        store_lanes((S*)a.arrived + step * a.tags + c, load(row + c), lanes);
      });
    const S moved = step > 0 ? transitions[a.path[step - 1] * a.width + tag] : start[tag];
    log_likelihood += double(moved) + double(to_compute(emissions_at<T>(a, step)[tag]));
    log_likelihood -= emit<T>(a, step, row, alpha);
  }
  return log_likelihood + double(end[a.path[a.length - 1]]) - double(finish<S>(a, alpha, arrived));
}

// p[j] is the probability of tag j at a step; given the tag j there, that of tag i before it is
// exp(alpha[i] + transitions[i, j] - arrived[j]).
template <class T> static void backward(const CrfArgs& a, const CrfGradients& gradients, double grad_) {
  using S = compute_t<T>;
  const S grad = S(grad_);
  S *alpha = (S*)a.scratch, *p = alpha + a.width, *before = p + a.width;
  const S* arrived = (const S*)a.arrived;
  S *grad_start = (S*)gradients.start, *grad_end = (S*)gradients.end, *grad_transposed = (S*)gradients.transposed;
  const auto subtract = [&](S* from, const S* x) {
    for_columns<S>(a.tags, [&](int64_t c, int lanes) {
      store_lanes(from + c, load_lanes(from + c, lanes) - load(x + c) * grad, lanes);
    });
  };
  for (int64_t step = a.length - 1; step >= 0; --step) {
    const int64_t tag = a.path[step];
    if (step == a.length - 1) {
      emit<T>(a, step, arrived + step * a.tags, alpha);
      finish<S>(a, alpha, p);
      subtract(grad_end, p);
      grad_end[tag] += grad;
    }
    S* grad_emissions = (S*)gradients.emissions + a.positions[step] * a.tags;  // zeros before
    subtract(grad_emissions, p);
    grad_emissions[tag] += grad;
    if (step == 0) {
      subtract(grad_start, p);
      grad_start[tag] += grad;
      break;
    }
    emit<T>(a, step - 1, arrived + (step - 1) * a.tags, alpha);
    for (int64_t c = 0; c < a.width; c += kLanes<S>) store(before + c, zero<S>());
    for (int64_t j = 0; j < a.tags; ++j) {
      if (p[j] <= kLeast<S>) continue;  // also where no path arrives, and arrived[j] = -inf
      const S log_sum = arrived[step * a.tags + j];
      const S* from = (const S*)a.transposed + j * a.width;
      S* grad_from = grad_transposed + j * a.width;
      for (int64_t c = 0; c < a.width; c += kLanes<S>) {
        const Vec<S> given = exp_score(load(alpha + c) + load(from + c) - log_sum);
        const Vec<S> both = (given < kLeast<S> ? zero<S>() : given) * p[j];
        store(before + c, load(before + c) + both);
        store(grad_from + c, load(grad_from + c) - both * grad);
      }
    }
    grad_transposed[tag * a.width + a.path[step - 1]] += grad;
    S* now = p;
    p = before;
    before = now;
  }
}

template <class T> static void decode(const CrfArgs& a, int64_t* tags) {
  using S = compute_t<T>;
  using Index = typename IntType<S>::type;
  S *alpha = (S*)a.scratch, *arrived = alpha + a.width;
  Index* best_before = (Index*)(arrived + a.width);  // (length, width)
  emit<T>(a, 0, (const S*)a.start, alpha);
  for (int64_t step = 1; step < a.length; ++step) {
    for (int64_t c = 0; c < a.width; c += kLanes<S>) {
      Vec<S> most = zero<S>() - S(kInfinity);
      IntVec<S> from = {};
      for (int64_t i = 0; i < a.tags; ++i) {
        const Vec<S> x = load((const S*)a.transitions + i * a.width + c) + alpha[i];
        from = x > most ? from - from + Index(i) : from;
        most = x > most ? x : most;
      }
      store(arrived + c, most);
      memcpy(best_before + step * a.width + c, &from, sizeof(from));
    }
    emit<T>(a, step, arrived, alpha);
  }
  int64_t tag = 0;
  const S* end = (const S*)a.end;
  for (int64_t j = 1; j < a.tags; ++j)
    if (alpha[j] + end[j] > alpha[tag] + end[tag]) tag = j;
  for (int64_t step = a.length - 1; step >= 0; --step) {
    tags[a.positions[step]] = tag;
    if (step > 0) tag = best_before[step * a.width + tag];
  }
}

double crf_log_likelihood(const CrfArgs& a) {
  double log_likelihood = 0;
  dispatch(a.dtype, [&]<class T>() { log_likelihood = forward<T>(a); });
  return log_likelihood;
}
void crf_backward(const CrfArgs& a, const CrfGradients& gradients, double grad) {
  dispatch(a.dtype, [&]<class T>() { backward<T>(a, gradients, grad); });
}
void crf_decode(const CrfArgs& a, int64_t* tags) {
  dispatch(a.dtype, [&]<class T>() { decode<T>(a, tags); });
}

}  // namespace fastformer::FASTFORMER_ISA
