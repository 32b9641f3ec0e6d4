// linear_cross_entropy: the logits of a chunk of labelled rows, their log-sum-exp and the gradients, chunk by chunk. Rows
// without a label are never computed; a chunk's logits become their gradient in place.

#include <array>

#include "gemm.h"

namespace fastformer {
namespace {

constexpr int64_t kLogitsBytes = 64 << 20;         // of a chunk
constexpr int64_t kMinRows = 64, kMaxRows = 1024;  // of a chunk: each reads the weight and its gradient once

// The rows whose target is not ignore_index, and their targets.
struct Labelled {
  std::vector<int64_t> rows, targets;

  Labelled(const Tensor& target, int64_t classes, int64_t ignore_index) {
    const Tensor adjacent = torch::stable::contiguous(target);
    const int64_t* values = adjacent.const_data_ptr<int64_t>();
    for (int64_t row = 0; row < target.numel(); ++row) {
      const int64_t value = values[row];
      if (value == ignore_index) continue;
      STD_TORCH_CHECK(value >= 0 && value < classes, "target: expected class indices from 0 to ", classes - 1,
                      ", or ignore_index ", ignore_index, ", got ", value);
      rows.push_back(row);
      targets.push_back(value);
    }
  }
  int64_t count() const { return static_cast<int64_t>(rows.size()); }
};

template <class S> class CrossEntropy {  // S: the compute type
 public:
  // The gradients, empty where not wanted.
  Tensor grad_input, grad_weight, grad_bias;

  CrossEntropy(const Tensor& input, const Tensor& linear_weight, const Labelled& labelled,
               const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& class_weight,
               double label_smoothing, std::array<bool, 3> needs)
      : grad_input(zeros(needs[0] ? shape_of(input) : std::vector<int64_t>{0}, kType)),
        // the first chunk overwrites these
        grad_weight(start(needs[1], shape_of(linear_weight), labelled)),
        grad_bias(start(needs[2], {linear_weight.size(0)}, labelled)),
        needs_(needs), input_(rows_of(input)), weight_(linear_weight), labelled_(labelled), dtype_(dtype_of(input)),
        bias_(to_compute(linear_bias, dtype_)), class_weight_(to_compute(class_weight, dtype_)),
        smoothing_(label_smoothing), classes_(linear_weight.size(0)), features_(linear_weight.size(1)),
        stride_(classes_ + 16), slices_((classes_ + kSlice - 1) / kSlice), slice_weights_(slices_) {
    for (int64_t c = 0; c < classes_; ++c) slice_weights_[c / kSlice] += weight_of(c);
    for (const double weight : slice_weights_) total_weight_ += weight;
  }

  bool wants_gradients() const { return needs_[0] || needs_[1] || needs_[2]; }
  double weight_of(int64_t c) const { return class_weight_ ? class_weight_->template const_data_ptr<S>()[c] : S(1); }

  // f(first, count) for each chunk of the labelled rows, which the functions below then work on.
  template <class F> void for_each_chunk(F f) {
    const int64_t most = std::clamp<int64_t>(kLogitsBytes / (stride_ * int64_t(sizeof(S))), kMinRows, kMaxRows);
    const int64_t chunks = (labelled_.count() + most - 1) / most;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      first_ = labelled_.count() * chunk / chunks;
      rows_ = labelled_.count() * (chunk + 1) / chunks - first_;
      if (chunk == 0 || rows_ > gathered_.size(0)) {
        gathered_ = empty({rows_, features_}, kType);
        logits_ = empty({rows_, stride_}, kType);
      }
      f(first_, rows_);
    }
  }

  // With `statistics`, those that `loss` needs.
  void compute_logits(bool statistics) {
    const GatherRowsArgs gather = {
        .dtype = dtype_, .columns = features_, .input = input_.data, .stride = input_.stride,
        .rows = labelled_.rows.data() + first_, .output = gathered_.mutable_data_ptr(),
    };
    parallel_rows(rows_, 64, [&](int64_t begin, int64_t end) { kernels().gather_rows(gather, begin, end); });
    for_each_weight([&](int64_t c0, const Tensor& weight) {
      multiply(logits(c0, weight.size(0)), gathered(), transposed(weight));
    });
    if (!statistics && !bias_) return;
    if (statistics) statistics_.resize(3 * slices_ * rows_);
    parallel_tasks(slices_, [&](int64_t slice) {
      const int64_t c0 = slice * kSlice, columns = std::min(kSlice, classes_ - c0);
      if (bias_) add_bias(c0, columns);
      if (!statistics) return;
      CrossEntropyArgs args = slice_args(c0, columns);
      S* mine = statistics_.data() + 3 * slice * rows_;
      args.largest = mine;
      args.sum_exp = mine + rows_;
      args.distance = smoothing_ ? mine + 2 * rows_ : nullptr;
      kernels().cross_entropy_statistics(args);
    });
  }

  // Loss, largest logit, and log(sum(exp(logit - largest))) of a row of the chunk.
  std::array<double, 3> loss(int64_t row) const {
    const auto of = [&](int64_t which, int64_t slice) { return double(statistics_[(3 * slice + which) * rows_ + row]); };
    const int64_t target = labelled_.targets[first_ + row];
    double largest = of(0, 0), sum = 0;
    for (int64_t slice = 1; slice < slices_; ++slice) largest = std::fmax(largest, of(0, slice));
    for (int64_t slice = 0; slice < slices_; ++slice) sum += of(1, slice) * std::exp(of(0, slice) - largest);
    const double log_sum = std::log(sum), logit = logits_.const_data_ptr<S>()[row * stride_ + target];
    double loss = (1 - smoothing_) * weight_of(target) * (largest - logit + log_sum);
    if (smoothing_) {
      double distance = 0;  // sum(class_weight (lse - logit))
      for (int64_t slice = 0; slice < slices_; ++slice)
        distance += of(2, slice) + slice_weights_[slice] * (largest - of(0, slice) + log_sum);
      loss += smoothing_ / double(classes_) * distance;
    }
    return {loss, largest, log_sum};
  }

  // The chunk's share of the gradients. One per row of the chunk: the two parts of lse, and the gradient of its loss.
  void compute_gradients(std::vector<S>& largest, const std::vector<S>& log_sum, const std::vector<double>& grad) {
    std::vector<S> scale(rows_), uniform(rows_), hot(rows_);
    for (int64_t i = 0; i < rows_; ++i) {
      const double at_target = grad[i] * (1 - smoothing_) * weight_of(labelled_.targets[first_ + i]);
      const double everywhere = grad[i] * smoothing_ / double(classes_);
      scale[i] = S(at_target + everywhere * total_weight_);
      uniform[i] = S(everywhere);
      hot[i] = S(at_target);
    }
    parallel_tasks(slices_, [&](int64_t slice) {
      const int64_t c0 = slice * kSlice, columns = std::min(kSlice, classes_ - c0);
      std::vector<int64_t> target(rows_);
      for (int64_t i = 0; i < rows_; ++i) target[i] = labelled_.targets[first_ + i] - c0;
      CrossEntropyArgs args = slice_args(c0, columns);
      args.largest = largest.data();
      args.log_sum = log_sum.data();
      args.scale = scale.data();
      args.uniform = uniform.data();
      args.hot = hot.data();
      args.target = target.data();
      kernels().cross_entropy_gradient(args);
      if (needs_[2]) bias_gradient(c0, columns);
    });
    if (needs_[1])
      multiply(grad_weight, transposed(logits(0, classes_)), gathered(), first_ > 0);
    if (needs_[0]) input_gradient();
  }

 private:
  static constexpr ScalarType kType = sizeof(S) == 8 ? ScalarType::Double : ScalarType::Float;
  static constexpr int64_t kSlice = 1024;  // classes that are one task
  static constexpr DType kDType = sizeof(S) == 8 ? DType::f64 : DType::f32;

  static Tensor start(bool needed, const std::vector<int64_t>& shape, const Labelled& labelled) {
    if (!needed) return empty({0}, kType);
    return labelled.count() ? empty(shape, kType) : zeros(shape, kType);
  }

  CrossEntropyArgs slice_args(int64_t c0, int64_t columns) const {
    return {.dtype = kDType, .rows = rows_, .columns = columns, .logits = logits_.mutable_data_ptr<S>() + c0,
            .stride = stride_, .class_weight = class_weight_ ? class_weight_->template const_data_ptr<S>() + c0 : nullptr};
  }

  Tensor gathered() const { return matrix(gathered_.const_data_ptr(), kType, rows_, features_, features_, 1); }
  Tensor logits(int64_t c0, int64_t columns) const {
    return matrix(logits_.const_data_ptr<S>() + c0, kType, rows_, columns, stride_, 1);
  }
  // f(first class, weight of some classes in the compute type): of all, where nothing has to be widened for it.
  template <class F> void for_each_weight(F f) const {
    const int64_t most = weight_.scalar_type() == kType ? std::max<int64_t>(classes_, 1) : 4 * kSlice;
    for (int64_t c0 = 0; c0 < classes_; c0 += most) {
      const int64_t count = std::min(most, classes_ - c0);
      const char* data = static_cast<const char*>(weight_.const_data_ptr()) + c0 * weight_.stride(0) * weight_.element_size();
      f(c0, matrix(data, weight_.scalar_type(), count, features_, weight_.stride(0), weight_.stride(1)));
    }
  }

  void add_bias(int64_t c0, int64_t columns) {
    const S* bias = bias_->template const_data_ptr<S>() + c0;
    for (int64_t i = 0; i < rows_; ++i) {
      S* row = logits_.mutable_data_ptr<S>() + i * stride_ + c0;
      for (int64_t c = 0; c < columns; ++c) row[c] += bias[c];
    }
  }

  void bias_gradient(int64_t c0, int64_t columns) {
    S sums[kSlice];
    kernels().column_sums({.dtype = kDType, .rows = rows_, .input = logits_.const_data_ptr<S>() + c0,
                           .stride = stride_, .sums = sums},
                          0, columns);
    S* output = grad_bias.mutable_data_ptr<S>() + c0;
    for (int64_t c = 0; c < columns; ++c) output[c] = first_ ? output[c] + sums[c] : sums[c];
  }

  // The rows of grad_input = the gradient of the logits times the weight.
  void input_gradient() {
    const Tensor sums = empty({rows_, features_}, kType);
    for_each_weight([&](int64_t c0, const Tensor& weight) {
      multiply(sums, logits(c0, weight.size(0)), weight, c0 > 0);
    });
    for (int64_t i = 0; i < rows_; ++i)
      std::copy_n(sums.const_data_ptr<S>() + i * features_, features_,
                  grad_input.mutable_data_ptr<S>() + labelled_.rows[first_ + i] * features_);
  }

  std::array<bool, 3> needs_;
  Rows input_;
  Tensor weight_;
  const Labelled& labelled_;
  DType dtype_;  // of input and weight
  std::optional<Tensor> bias_, class_weight_;
  double smoothing_;
  int64_t classes_, features_, stride_;  // stride_: of the logits' rows, a cache line off the distances that share sets
  int64_t slices_;
  std::vector<double> slice_weights_;    // sum of the class weights
  double total_weight_ = 0;

  int64_t first_ = 0, rows_ = 0;  // of the chunk
  Tensor gathered_ = empty({0}, kType), logits_ = empty({0}, kType);
  std::vector<S> statistics_;  // (slices, 3, rows): largest, sum_exp, distance
};

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

template <class S>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, const std::optional<Tensor>& linear_bias,
    const std::optional<Tensor>& weight, const std::string& reduction, int64_t ignore_index, double label_smoothing,
    std::array<bool, 3> needs) {
  const Labelled labelled(target, linear_weight.size(0), ignore_index);
  CrossEntropy<S> op(input, linear_weight, labelled, linear_bias, weight, label_smoothing, needs);
  const ScalarType type = op.grad_input.scalar_type();
  const bool each = reduction == "none";
  Tensor losses = zeros(each ? shape_of(target) : std::vector<int64_t>{}, type), lse = zeros({2, target.numel()}, type);
  double divisor = reduction == "mean" ? 0 : 1, sum = 0;
  if (reduction == "mean")
    for (const int64_t t : labelled.targets) divisor += op.weight_of(t);
  op.for_each_chunk([&](int64_t first, int64_t rows) {
    op.compute_logits(true);
    std::vector<S> largest(rows), log_sum(rows);
    for (int64_t i = 0; i < rows; ++i) {
      const auto [row_loss, row_largest, row_log_sum] = op.loss(i);
      const int64_t row = labelled.rows[first + i];
      largest[i] = lse.mutable_data_ptr<S>()[row] = S(row_largest);
      log_sum[i] = lse.mutable_data_ptr<S>()[target.numel() + row] = S(row_log_sum);
      if (each)
        losses.mutable_data_ptr<S>()[row] = S(row_loss);
      else
        sum += row_loss;
    }
    if (op.wants_gradients()) op.compute_gradients(largest, log_sum, std::vector<double>(rows, 1 / divisor));
  });
  if (!each) *losses.mutable_data_ptr<S>() = S(sum / divisor);
  return {losses, lse, op.grad_input, op.grad_weight, op.grad_bias};
}

template <class S>
Gradients backward(const Tensor& grad_output, const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                   const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& weight, const Tensor& lse,
                   int64_t ignore_index, double label_smoothing, std::array<bool, 3> needs) {
  const Labelled labelled(target, linear_weight.size(0), ignore_index);
  CrossEntropy<S> op(input, linear_weight, labelled, linear_bias, weight, label_smoothing, needs);
  const Tensor grad = torch::stable::contiguous(grad_output);
  op.for_each_chunk([&](int64_t first, int64_t rows) {
    op.compute_logits(false);
    std::vector<S> largest(rows), log_sum(rows);
    std::vector<double> grads(rows);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = labelled.rows[first + i];
      largest[i] = lse.const_data_ptr<S>()[row];
      log_sum[i] = lse.const_data_ptr<S>()[target.numel() + row];
      grads[i] = grad.const_data_ptr<S>()[row];
    }
    op.compute_gradients(largest, log_sum, grads);
  });
  return {op.grad_input, op.grad_weight, op.grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    Tensor input, Tensor linear_weight, Tensor target, std::optional<Tensor> linear_bias, std::optional<Tensor> weight,
    std::string reduction, int64_t ignore_index, double label_smoothing, bool need_input, bool need_weight,
    bool need_bias) {
  const auto run = dtype_of(input) == DType::f64 ? forward<double> : forward<float>;
  return run(input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing,
             {need_input, need_weight, need_bias});
}

Gradients linear_cross_entropy_backward(Tensor grad_output, Tensor input, Tensor linear_weight, Tensor target,
                                        std::optional<Tensor> linear_bias, std::optional<Tensor> weight, Tensor lse,
                                        int64_t ignore_index, double label_smoothing, bool need_input, bool need_weight,
                                        bool need_bias) {
  const auto run = dtype_of(input) == DType::f64 ? backward<double> : backward<float>;
  return run(grad_output, input, linear_weight, target, linear_bias, weight, lse, ignore_index, label_smoothing,
             {need_input, need_weight, need_bias});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer_cpu, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&linear_cross_entropy_backward));
}

}  // namespace fastformer
