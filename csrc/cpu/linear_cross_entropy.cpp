// linear_cross_entropy: the logits of a chunk of labelled rows, their log-sum-exp and the gradients, chunk by chunk. Rows
// without a label are never computed; a chunk's logits become their gradient in place. The threads share the slices of
// classes, whose weights are packed in a thread's own scratch; no sum depends on the number of threads.

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

const void* element(const Tensor& tensor, int64_t offset) {
  const DType dtype = dtype_of(tensor);
  const int64_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  return static_cast<const char*>(tensor.const_data_ptr()) + offset * size;
}

// a b for all rows of a; b is packed in this thread's scratch.
void multiply(GemmArgs product, PackArgs b) {
  const int64_t width = panel_columns(product.dtype), panels = (b.columns + width - 1) / width;
  const int64_t bytes = (panels * b.depth * width * compute_bytes(product.dtype) + 63) / 64 * 64;
  char* memory = static_cast<char*>(scratch(bytes + kernels().gemm_scratch_bytes(product)));
  product.b = b.packed = memory;
  kernels().pack(b, 0, panels);
  kernels().gemm(product, 0, product.rows, 0, panels, memory + bytes);
}

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
        stride_(classes_ + 16),
        width_(std::clamp<int64_t>((1 << 18) / std::max<int64_t>(features_, 1) / 64 * 64, 64, 1024)),
        slices_((classes_ + width_ - 1) / width_), slice_weights_(slices_) {
    for (int64_t c = 0; c < classes_; ++c) slice_weights_[c / width_] += weight_of(c);
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
    if (statistics) statistics_.resize(3 * slices_ * rows_);
    parallel_tasks(slices_, [&](int64_t slice) {
      const int64_t c0 = slice * width_, columns = std::min(width_, classes_ - c0);
      S* logits = logits_.mutable_data_ptr<S>() + c0;
      multiply({.dtype = kDType, .rows = rows_, .columns = columns, .depth = features_,
                .a = gathered_.const_data_ptr(), .a_row_stride = features_, .a_depth_stride = 1, .b = nullptr,
                .bias = bias_ ? bias_->template const_data_ptr<S>() + c0 : nullptr, .output = logits,
                .output_stride = stride_},
               {.dtype = dtype_, .columns = columns, .depth = features_, .b = element(weight_, c0 * weight_.stride(0)),
                .b_column_stride = weight_.stride(0), .b_depth_stride = weight_.stride(1), .packed = nullptr});
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
    std::optional<PackedWeight> gathered;
    if (needs_[1]) gathered = pack(gathered_, features_, rows_, 1, features_);
    parallel_tasks(slices_, [&](int64_t slice) {
      const int64_t c0 = slice * width_, columns = std::min(width_, classes_ - c0);
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
      if (needs_[1]) weight_gradient(*gathered, c0, columns);
      if (needs_[2]) bias_gradient(c0, columns);
    });
    if (needs_[0]) input_gradient();
  }

 private:
  static constexpr ScalarType kType = sizeof(S) == 8 ? ScalarType::Double : ScalarType::Float;
  static constexpr DType kDType = sizeof(S) == 8 ? DType::f64 : DType::f32;

  static Tensor start(bool needed, const std::vector<int64_t>& shape, const Labelled& labelled) {
    if (!needed) return empty({0}, kType);
    return labelled.count() ? empty(shape, kType) : zeros(shape, kType);
  }

  CrossEntropyArgs slice_args(int64_t c0, int64_t columns) const {
    return {.dtype = kDType, .rows = rows_, .columns = columns, .logits = logits_.mutable_data_ptr<S>() + c0,
            .stride = stride_, .class_weight = class_weight_ ? class_weight_->template const_data_ptr<S>() + c0 : nullptr};
  }

  // The slice's rows of grad_weight (classes, features) = or += the gradient of the logits, transposed, times the rows.
  void weight_gradient(const PackedWeight& gathered, int64_t c0, int64_t columns) {
    S* output = grad_weight.mutable_data_ptr<S>() + c0 * features_;
    const GemmArgs product = {
        .dtype = kDType, .rows = columns, .columns = features_, .depth = rows_,
        .a = logits_.const_data_ptr<S>() + c0, .a_row_stride = 1, .a_depth_stride = stride_, .b = gathered.data(),
        .bias = nullptr, .residual = first_ ? output : nullptr, .residual_stride = features_,
        .output = output, .output_stride = features_,
    };
    kernels().gemm(product, 0, columns, 0, gathered.panels.size(0), scratch(kernels().gemm_scratch_bytes(product)));
  }

  void bias_gradient(int64_t c0, int64_t columns) {
    S sums[1024];  // width_ at most
    kernels().column_sums({.dtype = kDType, .rows = rows_, .input = logits_.const_data_ptr<S>() + c0,
                           .stride = stride_, .sums = sums},
                          0, columns);
    S* output = grad_bias.mutable_data_ptr<S>() + c0;
    for (int64_t c = 0; c < columns; ++c) output[c] = first_ ? output[c] + sums[c] : sums[c];
  }

  // The rows of grad_input = the gradient of the logits times the weight, summed over slices of classes. A task takes some
  // of the features.
  void input_gradient() {
    constexpr int64_t kDepth = 1024;  // classes of a slice
    const int64_t width = panel_columns(kDType), panels = (features_ + width - 1) / width;
    const int64_t tasks = std::min<int64_t>(panels, 4 * torch::stable::get_num_threads());
    const Tensor sums = empty({rows_, features_}, kType);
    parallel_tasks(tasks, [&](int64_t task) {
      const int64_t f0 = panels * task / tasks * width, f1 = std::min(features_, panels * (task + 1) / tasks * width);
      S* output = sums.mutable_data_ptr<S>() + f0;
      for (int64_t c0 = 0; c0 < classes_; c0 += kDepth) {
        const int64_t depth = std::min(kDepth, classes_ - c0);
        multiply({.dtype = kDType, .rows = rows_, .columns = f1 - f0, .depth = depth,
                  .a = logits_.const_data_ptr<S>() + c0, .a_row_stride = stride_, .a_depth_stride = 1, .b = nullptr,
                  .bias = nullptr, .residual = c0 ? output : nullptr, .residual_stride = features_, .output = output,
                  .output_stride = features_},
                 {.dtype = dtype_, .columns = f1 - f0, .depth = depth,
                  .b = element(weight_, c0 * weight_.stride(0) + f0 * weight_.stride(1)),
                  .b_column_stride = weight_.stride(1), .b_depth_stride = weight_.stride(0), .packed = nullptr});
      }
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
  int64_t width_, slices_;               // width_: classes of a slice
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
