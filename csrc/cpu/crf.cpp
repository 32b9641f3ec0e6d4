// crf_log_likelihood and crf_decode: a chain is a task.

#include <limits>

#include "common.h"

namespace fastformer {
namespace {

constexpr int64_t kIgnored = -100;  // the tag of a position that is in no chain

// The positions of each sequence that are in its chain, and their tags.
struct Chains {
  std::vector<int64_t> positions, path, first;  // of sequence b: [first[b], first[b + 1])

  Chains(int64_t batch, int64_t length, int64_t tag_count, const std::optional<Tensor>& tags,
         const std::optional<Tensor>& mask)
      : first{0} {
    std::optional<Tensor> adjacent_tags, adjacent_mask;
    if (tags) adjacent_tags = torch::stable::contiguous(*tags);
    if (mask) adjacent_mask = torch::stable::contiguous(*mask);
    const int64_t* tag = tags ? adjacent_tags->const_data_ptr<int64_t>() : nullptr;
    const bool* kept = mask ? adjacent_mask->const_data_ptr<bool>() : nullptr;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t position = 0; position < length; ++position) {
        const int64_t i = b * length + position;
        if ((kept && !kept[i]) || (tag && tag[i] == kIgnored)) continue;
        positions.push_back(position);
        if (!tag) continue;
        STD_TORCH_CHECK(tag[i] >= 0 && tag[i] < tag_count, "tags: expected 0 to ", tag_count - 1, ", or ", kIgnored,
                        " where there is none, got ", tag[i]);
        path.push_back(tag[i]);
      }
      first.push_back(static_cast<int64_t>(positions.size()));
    }
  }
};

class Crf {
 public:
  const int64_t batch, length, tags;
  const ScalarType type;  // compute type
  const int64_t width;    // of rows of the tags, in whole vectors of every instruction set

  Crf(const Tensor& emissions, const std::optional<Tensor>& path, const Tensor& transitions, const Tensor& start,
      const Tensor& end, const std::optional<Tensor>& mask)
      : batch(emissions.size(0)), length(emissions.size(1)), tags(emissions.size(2)),
        type(compute_type(dtype_of(emissions))), width((tags + lanes() - 1) / lanes() * lanes()),
        chains_(batch, length, tags, path, mask), rows_(rows_of(emissions)), dtype_(dtype_of(emissions)),
        transitions_(padded(transitions)), transposed_(padded(torch::stable::transpose(transitions, 0, 1))),
        start_(padded(start)), end_(padded(end)) {}

  // f(b, args) for the sequences from b to end_b that have a chain. Scratch for three rows, and `more_rows` a step.
  template <class F> void for_each_chain(int64_t b, int64_t end_b, int64_t more_rows, const F& f) const {
    const int64_t element = dtype_ == DType::f64 ? 8 : dtype_ == DType::f32 ? 4 : 2;
    for (; b < end_b; ++b) {
      const int64_t first = chains_.first[b], steps = chains_.first[b + 1] - first;
      if (steps == 0) continue;
      f(b, CrfArgs{
               .dtype = dtype_, .tags = tags, .width = width,
               .emissions = static_cast<const char*>(rows_.data) + b * length * rows_.stride * element,
               .stride = rows_.stride, .length = steps, .positions = chains_.positions.data() + first,
               .path = chains_.path.empty() ? nullptr : chains_.path.data() + first,
               .transitions = transitions_.const_data_ptr(), .transposed = transposed_.const_data_ptr(),
               .start = start_.const_data_ptr(), .end = end_.const_data_ptr(), .arrived = nullptr,
               .scratch = scratch((3 + more_rows * steps) * width * compute_bytes(dtype_)),
           });
    }
  }

 private:
  int64_t lanes() const { return type == ScalarType::Double ? 8 : 16; }

  // (..., tags) -> (..., width) in the compute type, -inf beyond the tags
  Tensor padded(const Tensor& values) const {
    std::vector<int64_t> shape = with_last(values, width);
    Tensor output = empty(shape, type);
    const Tensor adjacent = torch::stable::contiguous(to_type(values, type));
    const auto copy = [&]<class S>(const S* from, S* to) {
      std::fill_n(to, output.numel(), -std::numeric_limits<S>::infinity());
      for (int64_t row = 0; row < output.numel() / width; ++row) std::copy_n(from + row * tags, tags, to + row * width);
    };
    if (type == ScalarType::Double)
      copy(adjacent.const_data_ptr<double>(), output.mutable_data_ptr<double>());
    else
      copy(adjacent.const_data_ptr<float>(), output.mutable_data_ptr<float>());
    return output;
  }

  const Chains chains_;
  const Rows rows_;
  const DType dtype_;
  const Tensor transitions_, transposed_, start_, end_;  // padded
};

char* at(const Tensor& tensor, int64_t row, int64_t columns) {
  const int64_t bytes = tensor.scalar_type() == ScalarType::Double ? 8 : 4;
  return static_cast<char*>(tensor.mutable_data_ptr()) + row * columns * bytes;
}

std::tuple<Tensor, Tensor> crf_log_likelihood(Tensor emissions, Tensor tags, Tensor transitions, Tensor start,
                                              Tensor end, std::optional<Tensor> mask, bool save_arrived) {
  const Crf crf(emissions, tags, transitions, start, end, mask);
  Tensor output = zeros({crf.batch}, crf.type);
  Tensor arrived = zeros(save_arrived ? shape_of(emissions) : std::vector<int64_t>{0}, crf.type);
  parallel_tasks(crf.batch, [&](int64_t task) {
    crf.for_each_chain(task, task + 1, 0, [&](int64_t b, CrfArgs args) {
      if (save_arrived) args.arrived = at(arrived, b * crf.length, crf.tags);
      const double log_likelihood = kernels().crf_log_likelihood(args);
      if (crf.type == ScalarType::Double)
        output.mutable_data_ptr<double>()[b] = log_likelihood;
      else
        output.mutable_data_ptr<float>()[b] = static_cast<float>(log_likelihood);
    });
  });
  return {output, arrived};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> crf_log_likelihood_backward(
    Tensor grad_output, Tensor emissions, Tensor tags, Tensor transitions, Tensor start, Tensor end,
    std::optional<Tensor> mask, Tensor arrived) {
  const Crf crf(emissions, tags, transitions, start, end, mask);
  const Tensor grad = torch::stable::contiguous(to_type(grad_output, ScalarType::Double));
  Tensor grad_emissions = zeros(shape_of(emissions), crf.type);
  // Groups of sequences add up the gradients of what they share apart: the order does not depend on the threads.
  const int64_t groups = std::clamp<int64_t>(crf.batch, 1, 32);
  const Tensor transposed = zeros({groups, crf.tags, crf.width}, crf.type);
  const Tensor starts = zeros({groups, crf.tags}, crf.type), ends = zeros({groups, crf.tags}, crf.type);
  parallel_tasks(groups, [&](int64_t group) {
    const int64_t first = crf.batch * group / groups, last = crf.batch * (group + 1) / groups;
    crf.for_each_chain(first, last, 0, [&](int64_t b, CrfArgs args) {
      args.arrived = at(arrived, b * crf.length, crf.tags);
      const CrfGradients gradients = {
          .emissions = at(grad_emissions, b * crf.length, crf.tags),
          .transposed = at(transposed, group * crf.tags, crf.width),
          .start = at(starts, group, crf.tags), .end = at(ends, group, crf.tags),
      };
      kernels().crf_backward(args, gradients, grad.const_data_ptr<double>()[b]);
    });
  });
  const std::vector<int64_t> group_dim = {0};
  Tensor sums = torch::stable::sum(transposed, group_dim);
  const Tensor to_from = torch::stable::narrow(sums, 1, 0, crf.tags);
  return {grad_emissions, torch::stable::contiguous(torch::stable::transpose(to_from, 0, 1)),
          torch::stable::sum(starts, group_dim), torch::stable::sum(ends, group_dim)};
}

Tensor crf_decode(Tensor emissions, Tensor transitions, Tensor start, Tensor end, std::optional<Tensor> mask) {
  const Crf crf(emissions, std::nullopt, transitions, start, end, mask);
  Tensor tags = empty({crf.batch, crf.length}, ScalarType::Long);
  std::fill_n(tags.mutable_data_ptr<int64_t>(), tags.numel(), kIgnored);
  parallel_tasks(crf.batch, [&](int64_t task) {
    crf.for_each_chain(task, task + 1, 1, [&](int64_t b, const CrfArgs& args) {
      kernels().crf_decode(args, tags.mutable_data_ptr<int64_t>() + b * crf.length);
    });
  });
  return tags;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer_cpu, CPU, m) {
  m.impl("crf_log_likelihood", TORCH_BOX(&crf_log_likelihood));
  m.impl("crf_log_likelihood_backward", TORCH_BOX(&crf_log_likelihood_backward));
  m.impl("crf_decode", TORCH_BOX(&crf_decode));
}

}  // namespace fastformer
