// packed_layers: all layers of an encoder or a decoder in one parallel region, on packed weights.

#include <cstring>

#include "attention.h"
#include "feed_forward.h"

namespace fastformer {
namespace {

// Pieces of one block of memory; without memory a count of how much they need.
class Arena {
 public:
  explicit Arena(char* memory) : memory_(memory) {}
  char* take(int64_t bytes) {
    char* piece = memory_ + taken_;
    taken_ += (bytes + 63) / 64 * 64;
    return piece;
  }
  int64_t taken() const { return taken_; }

 private:
  char* memory_;
  int64_t taken_ = 0;
};

struct Weights {
  PackedWeight qkv, projection, hidden, output;
};

// In the compute type, null where there is none.
struct Vectors {
  const void *norm1_weight, *norm1_bias, *qkv_bias, *projection_bias, *norm2_weight, *norm2_bias, *hidden_bias,
      *output_bias;
};

// Where a layer reads keys and values from, and writes the new ones to.
struct Cache {
  void *keys, *values;
};

struct Shape {
  DType dtype;
  int64_t width, heads, hidden_features;
  Activation activation;
  double eps;
  bool pre_norm;
  PanelType panels;
};

constexpr int64_t kKeptBytes = 64 << 20;  // of the arena: new memory for each call would cost a page fault for every 4 KiB

// Sequences, and the rows that they are.
struct Part {
  int64_t first_sequence, sequences, first_row, rows;
};

// The phases of layer after layer, for a part of the batch. Rows are (rows, width), contiguous but for the input's.
class Layers {
 public:
  Layers(Phases& phases, const Shape& shape, const AttentionArgs& attention, const Part& part, char* memory)
      : phases_(phases), s_(shape), attention_(attention), rows_(part.rows), arena_(memory) {
    if (s_.panels == PanelType::int8)
      quantized_ = quantized_rows(arena_.take(quantized_bytes(rows_, s_.width)), 0, rows_, s_.width);
    const int64_t element = element_bytes(s_.dtype), row = s_.width * element, compute = compute_bytes(s_.dtype);
    x_ = arena_.take(rows_ * row);
    normed_ = arena_.take(rows_ * row);
    qkv_ = arena_.take(rows_ * row * 3);
    context_ = arena_.take(rows_ * row);
    mean_ = arena_.take(rows_ * compute);
    rstd_ = arena_.take(rows_ * compute);
    char* lse = arena_.take(rows_ * s_.heads * compute);
    work_ = memory + arena_.taken();

    AttentionArgs& a = attention_;
    a.sequences = part.sequences;
    const int64_t skipped = a.cu_seq_q ? part.first_row : 0;  // rows in front of the part, which cu_seq counts
    if (a.cu_seq_q) a.cu_seq_q += part.first_sequence, a.cu_seq_k += part.first_sequence;
    if (a.mask.data)
      a.mask.data = static_cast<const char*>(a.mask.data) +
                    part.first_sequence * a.mask.sequence * (a.mask.is_bool ? 1 : compute);
    if (a.cu_seq_q) a.lse = {nullptr, 0, rows_, 1};
    a.lse.data = lse - skipped * compute;
    a.output.data = context_ - skipped * row;
    a.query.data = qkv_ - skipped * 3 * row;
  }

  // Adds the layer that reads `input`, rows `stride` apart, and writes `output`, which may be x().
  void add(const Weights& w, const Vectors& v, const Cache* cache, int64_t past, const void* input, int64_t stride,
           void* output) {
    const void* normed = input;
    int64_t normed_stride = stride;
    if (s_.pre_norm) {
      norm(input, stride, v.norm1_weight, v.norm1_bias, normed_);
      normed = normed_, normed_stride = s_.width;
    }
    product(linear(w.qkv, v.qkv_bias, normed, normed_stride, nullptr, 0, qkv_));
    if (cache) append(*cache, past);
    attend(cache);
    product(linear(w.projection, v.projection_bias, context_, s_.width, input, stride, x_));
    if (s_.pre_norm) {
      norm(x_, s_.width, v.norm2_weight, v.norm2_bias, normed_);
      feed_forward(w, v, normed_, x_, output);
    } else {
      norm(x_, s_.width, v.norm1_weight, v.norm1_bias, normed_);
      feed_forward(w, v, normed_, normed_, x_);
      norm(x_, s_.width, v.norm2_weight, v.norm2_bias, output);
    }
  }

  void norm(const void* input, int64_t stride, const void* weight, const void* bias, void* output) {
    const LayerNormArgs args = norm_of(input, stride, weight, bias, output);
    phases_.add_rows(rows_, s_.width, [=, quantize = quantizer(output)](int64_t begin, int64_t end) {
      kernels().layer_norm(args, begin, end);
      quantize(begin, end);
    });
  }

  // Logits (sequences, keep, columns) of the last `keep` positions of each sequence: norm, then the product with the head.
  void logits(const void* input, int64_t stride, const void* weight, const void* bias, int64_t keep,
              const PackedWeight& head, const void* head_bias, void* output) {
    const int64_t length = attention_.queries, element = element_bytes(s_.dtype);
    const LayerNormArgs args = norm_of(input, stride, weight, bias, normed_);
    phases_.add_rows(attention_.sequences, keep * s_.width, [=, quantize = quantizer(normed_)](int64_t begin, int64_t end) {
      for (int64_t sequence = begin; sequence < end; ++sequence) {
        const int64_t row = sequence * keep, from = (sequence + 1) * length - keep;
        LayerNormArgs mine = args;
        mine.input = static_cast<const char*>(args.input) + (from - row) * stride * element;
        kernels().layer_norm(mine, row, row + keep);
        quantize(row, row + keep);
      }
    });
    GemmArgs to_logits = linear(head, head_bias, normed_, s_.width, nullptr, 0, output);
    to_logits.rows = attention_.sequences * keep;
    product(to_logits);
  }

  void* x() const { return x_; }
  int64_t bytes() const { return arena_.taken() + work_bytes_; }

 private:
  // f(begin, end) quantizes rows of a layer-norm's output, while they are in L1, for the product that reads them.
  std::function<void(int64_t, int64_t)> quantizer(const void* output) {
    const bool is_read = s_.panels == PanelType::int8 && (output == x_ || output == normed_);
    if (is_read) quantized_of_ = output;
    const QuantizeArgs args = {.dtype = s_.dtype, .depth = s_.width, .a = output, .a_row_stride = s_.width,
                               .a_is_compute_type = false, .quantized = quantized_};
    return [=](int64_t begin, int64_t end) {
      if (is_read) kernels().quantize(args, begin, end, 0, quantized_groups(args.depth));
    };
  }
  LayerNormArgs norm_of(const void* input, int64_t stride, const void* weight, const void* bias, void* output) const {
    return {
        .dtype = s_.dtype, .residual_dtype = s_.dtype, .columns = s_.width, .eps = s_.eps, .dropout = {},
        .input = input, .residual = nullptr, .input_stride = stride, .residual_stride = 0,
        .weight = weight, .bias = bias, .output = output, .sum = nullptr, .mean = mean_, .rstd = rstd_,
    };
  }
  GemmArgs linear(const PackedWeight& weight, const void* bias, const void* input, int64_t stride,
                  const void* residual, int64_t residual_stride, void* output) const {
    return {
        .dtype = s_.dtype, .rows = rows_, .columns = weight.columns, .depth = weight.depth,
        .a = input, .a_row_stride = stride, .a_depth_stride = 1, .b = weight.data(),
        .b_type = weight.type(), .quantized = input && input == quantized_of_ ? quantized_ : QuantizedRows{},
        .bias = bias, .residual = residual, .residual_stride = residual_stride, .output = output,
        .output_stride = weight.columns,
    };
  }
  void product(const GemmArgs& args) {
    work_bytes_ = std::max(work_bytes_, quantized_bytes(args));
    add_gemm(phases_, args, work_);
  }
  void feed_forward(const Weights& w, const Vectors& v, const void* input, const void* residual, void* output) {
    GemmArgs first = linear(w.hidden, v.hidden_bias, input, s_.width, nullptr, 0, nullptr);
    first.activation = s_.activation;
    FeedForward products(first, linear(w.output, v.output_bias, nullptr, 0, residual, s_.width, output),
                         phases_.threads());
    work_bytes_ = std::max(work_bytes_, products.bytes());
    products.add_to(phases_, work_);
  }

  // The new keys and values go behind the `past` ones of the cache, (sequences, heads, capacity, head_dim).
  void append(const Cache& cache, int64_t past) {
    const AttentionArgs& a = attention_;
    const int64_t width = s_.width, element = element_bytes(s_.dtype);
    const int64_t bytes = a.head_dim * element, row_bytes = 3 * width * element;
    const char* rows = qkv_;
    phases_.add_rows(a.sequences * a.heads, a.queries * a.head_dim, [=](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const int64_t sequence = pair / a.heads, head = pair % a.heads;
        const char* key = rows + sequence * a.queries * row_bytes + width * element + head * bytes;
        const int64_t to = (sequence * a.key.sequence + head * a.key.head + past * a.key.row) * element;
        for (int64_t q = 0; q < a.queries; ++q, key += row_bytes) {
          std::memcpy(static_cast<char*>(cache.keys) + to + q * bytes, key, size_t(bytes));
          std::memcpy(static_cast<char*>(cache.values) + to + q * bytes, key + width * element, size_t(bytes));
        }
      }
    });
  }

  void attend(const Cache* cache) {
    AttentionArgs args = attention_;
    const int64_t part = s_.width * element_bytes(s_.dtype);
    const char* qkv = static_cast<const char*>(args.query.data);
    args.key.data = cache ? cache->keys : qkv + part;
    args.value.data = cache ? cache->values : qkv + 2 * part;
    const AttentionForward forward(args, phases_.threads());
    work_bytes_ = std::max(work_bytes_, forward.bytes());
    forward.add_to(phases_, work_);
  }

  Phases& phases_;
  const Shape s_;
  AttentionArgs attention_;
  const int64_t rows_;
  Arena arena_;
  QuantizedRows quantized_ = {};  // of
  const void* quantized_of_ = nullptr;
  char *x_, *normed_, *qkv_, *context_, *mean_, *rstd_, *work_;
  int64_t work_bytes_ = 0;
};

// Contiguous and in the compute type; what is neither is copied, and kept.
class VectorReader {
 public:
  explicit VectorReader(DType dtype) : dtype_(dtype) {}

  const void* operator()(const Tensor& vector) {
    if (vector.numel() == 0) return nullptr;
    if (vector.scalar_type() == compute_type(dtype_) && vector.is_contiguous()) return vector.const_data_ptr();
    kept_.push_back(*to_compute(vector, dtype_));
    return kept_.back().const_data_ptr();
  }
  // One after the other: the biases of query, key and value; or the first is all of them.
  const void* joined(const Tensor* parts, int64_t count, int64_t total) {
    if (parts[0].numel() == total || parts[0].numel() == 0) return (*this)(parts[0]);
    Tensor all = empty({total}, compute_type(dtype_));
    char* to = static_cast<char*>(all.mutable_data_ptr());
    for (int64_t i = 0; i < count; ++i) {
      const size_t bytes = size_t(parts[i].numel() * compute_bytes(dtype_));
      std::memcpy(to, (*this)(parts[i]), bytes);
      to += bytes;
    }
    kept_.push_back(all);
    return all.const_data_ptr();
  }

 private:
  DType dtype_;
  std::vector<Tensor> kept_;
};

AttentionMask mask_of(const std::optional<Tensor>& mask) {
  if (!mask) return {};
  const auto stride = [&](int64_t d) { return mask->size(d) == 1 ? 0 : mask->stride(d); };
  return {mask->const_data_ptr(), mask->scalar_type() == ScalarType::Bool, stride(0), stride(1), stride(2), stride(3)};
}

// Where there are enough sequences, each thread takes some of them through all layers: what it computes stays in its cache,
// and nobody waits. Else one part, which the threads share.
std::vector<Part> parts_of(const AttentionArgs& a, int64_t rows, PanelType panels) {
  constexpr int64_t kLeast = 96;  // rows for which it pays to read the weights
  // Rows that stay in cache; but products in 8 bits are so fast that it is worse to read the weights again and again.
  const int64_t most = panels == PanelType::int8 ? 512 : 192;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t count = (rows + threads * most - 1) / (threads * most) * threads;
  if (a.sequences < count || rows < count * kLeast || a.queries > most || count == 1) return {{0, a.sequences, 0, rows}};
  std::vector<Part> parts;
  const auto row = [&](int64_t sequence) { return a.cu_seq_q ? int64_t(a.cu_seq_q[sequence]) : sequence * a.queries; };
  for (int64_t p = 0, sequence = 0; p < count && sequence < a.sequences; ++p) {
    const int64_t first = sequence;
    while (sequence < a.sequences && row(sequence) < rows * (p + 1) / count) ++sequence;
    if (sequence > first) parts.push_back({first, sequence - first, row(first), row(sequence) - row(first)});
  }
  return parts;
}

Tensor packed_layers(Tensor input, std::vector<Tensor> packed, std::vector<Tensor> vectors,
                     std::optional<Tensor> final_weight, std::optional<Tensor> final_bias, std::optional<Tensor> head,
                     std::optional<Tensor> head_bias, int64_t vocabulary, int64_t keep, bool pre_norm, bool is_causal,
                     int64_t heads, int64_t hidden_features, std::optional<std::string> activation, double scale,
                     double eps, std::optional<Tensor> attn_mask, std::optional<Tensor> cu_seq, int64_t longest,
                     std::vector<Tensor> key_cache, std::vector<Tensor> value_cache, int64_t past) {
  constexpr size_t kWeights = 4, kVectors = 10;
  const Rows x = rows_of(input);
  const DType dtype = dtype_of(input);
  const int64_t width = x.columns, head_dim = width / heads;
  const size_t layers = packed.size() / kWeights;
  STD_TORCH_CHECK(layers > 0 && packed.size() == kWeights * layers && vectors.size() == kVectors * layers &&
                      key_cache.size() == value_cache.size() && (key_cache.empty() || key_cache.size() == layers),
                  "packed_layers: 4 packed weights and 10 vectors for each layer, and caches for all layers or none");
  const bool cached = !key_cache.empty();
  const int64_t sequences = cu_seq ? cu_seq->size(0) - 1 : input.size(0);
  const int64_t queries = cu_seq ? longest : input.size(1), keys = cached ? past + queries : queries;
  for (size_t i = 0; i < key_cache.size(); ++i)
    for (const Tensor& cache : {key_cache[i], value_cache[i]})
      STD_TORCH_CHECK(cache.is_contiguous() && cache.scalar_type() == input.scalar_type() && cache.dim() == 4 &&
                          cache.size(0) == sequences && cache.size(1) == heads && cache.size(2) >= keys &&
                          cache.size(3) == head_dim && cache.size(2) == key_cache[0].size(2),
                      "packed_layers: a cache must be (batch, heads, capacity, head_dim), contiguous, of the input's dtype");

  STD_TORCH_CHECK(!head || (pre_norm && !cu_seq && keep > 0 && keep <= queries),
                  "packed_layers: a head follows the last layer-norm, and is of `keep` positions of each sequence");
  Tensor output = empty(head ? std::vector<int64_t>{sequences, keep, vocabulary} : shape_of(input), input.scalar_type());
  if (x.count == 0) return output;
  const int64_t capacity = cached ? key_cache[0].size(2) : 0, part = queries * 3 * width;
  const AttentionArgs attention = {
      .dtype = dtype, .sequences = sequences, .heads = heads, .kv_heads = heads, .head_dim = head_dim,
      .value_dim = head_dim, .queries = queries, .keys = keys,
      .cu_seq_q = cu_seq ? cu_seq->const_data_ptr<int32_t>() : nullptr,
      .cu_seq_k = cu_seq ? cu_seq->const_data_ptr<int32_t>() : nullptr,
      .query = {nullptr, cu_seq ? 0 : part, head_dim, 3 * width},
      .key = cached ? AttentionInput{nullptr, heads * capacity * head_dim, capacity * head_dim, head_dim}
                    : AttentionInput{nullptr, cu_seq ? 0 : part, head_dim, 3 * width},
      .value = cached ? AttentionInput{nullptr, heads * capacity * head_dim, capacity * head_dim, head_dim}
                      : AttentionInput{nullptr, cu_seq ? 0 : part, head_dim, 3 * width},
      .mask = mask_of(attn_mask), .is_causal = false, .window_left = -1, .window_right = is_causal ? 0 : -1,
      .dropout = {}, .scale = scale,
      .output = {nullptr, cu_seq ? 0 : queries * width, head_dim, width},
      .lse = cu_seq ? AttentionOutput{nullptr, 0, x.count, 1} : AttentionOutput{nullptr, heads * queries, queries, 1},
  };
  VectorReader read(dtype);
  std::vector<Weights> weights;
  std::vector<Vectors> biases;
  for (size_t i = 0; i < layers; ++i) {
    const Tensor* p = &packed[kWeights * i];
    const Tensor* v = &vectors[kVectors * i];
    weights.push_back({packed_weight(p[0], 3 * width, width, dtype), packed_weight(p[1], width, width, dtype),
                       packed_weight(p[2], hidden_features, width, dtype),
                       packed_weight(p[3], width, hidden_features, dtype)});
    biases.push_back({read(v[0]), read(v[1]), read.joined(v + 2, 3, 3 * width), read(v[5]), read(v[6]), read(v[7]),
                      read(v[8]), read(v[9])});
  }

  const Shape shape = {dtype, width, heads, hidden_features, activation_of(activation), eps, pre_norm,
                       weights[0].qkv.type()};
  const void* weight = final_weight ? read(*final_weight) : nullptr;
  const void* bias = final_bias ? read(*final_bias) : nullptr;
  const void* logits_bias = head_bias ? read(*head_bias) : nullptr;
  std::optional<PackedWeight> logits;
  if (head) logits = packed_weight(*head, vocabulary, width, dtype);

  const int64_t element = element_bytes(dtype);
  const auto build = [&](Phases& phases, const Part& part, char* memory) {
    Layers all(phases, shape, attention, part, memory);
    const void* from = static_cast<const char*>(x.data) + part.first_row * x.stride * element;
    const int64_t result_offset = head ? part.first_sequence * keep * vocabulary : part.first_row * width;
    void* const result = static_cast<char*>(output.mutable_data_ptr()) + result_offset * element;
    int64_t stride = x.stride;
    for (size_t i = 0; i < layers; ++i) {
      Cache cache;
      const int64_t first = part.first_sequence * attention.key.sequence * element;
      if (cached) cache = {static_cast<char*>(key_cache[i].mutable_data_ptr()) + first,
                           static_cast<char*>(value_cache[i].mutable_data_ptr()) + first};
      const bool last = !pre_norm && i + 1 == layers;
      void* to = last ? result : all.x();
      all.add(weights[i], biases[i], cached ? &cache : nullptr, past, from, stride, to);
      from = to, stride = width;
    }
    if (head)
      all.logits(from, stride, weight, bias, keep, *logits, logits_bias, result);
    else if (pre_norm)
      all.norm(from, stride, weight, bias, result);
    return all.bytes();
  };
  const std::vector<Part> parts = parts_of(attention, x.count, shape.panels);
  const int64_t threads = parts.size() > 1 ? 1 : torch::stable::get_num_threads();  // of a part
  parallel_tasks(static_cast<int64_t>(parts.size()), [&](int64_t p) {
    Phases count(threads), phases(threads);
    const int64_t bytes = build(count, parts[p], nullptr);
    static thread_local Buffer kept;
    Buffer once;
    build(phases, parts[p], static_cast<char*>((bytes <= kKeptBytes ? kept : once).of(bytes)));
    phases.run();
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer_cpu, CPU, m) { m.impl("packed_layers", TORCH_BOX(&packed_layers)); }

}  // namespace fastformer
