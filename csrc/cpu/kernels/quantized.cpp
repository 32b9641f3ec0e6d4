// Products of 8-bit rows and 8-bit weights, exact in 32 bits: every instruction set gives the same sums. The rows are
// quantized one by one as they come, the weights column by column beforehand.

#include "epilogue.h"

namespace fastformer::FASTFORMER_ISA {

// x * scale + zero, rounded to an integer (ties to even) in the low bits: in two roundings on every instruction set.
FF_INLINE Vec<int32_t> scale_and_round(Vec<float> x, float scale, float zero) {
  Vec<float> scaled = x * scale;
#if defined(__x86_64__)
  asm("" : "+v"(scaled));  // no fused multiply-add
#endif
  return bit_cast<Vec<int32_t>>(scaled + (zero + 0x1.8p23f)) - 0x4b400000;
}

typedef uint8_t LaneBytes __attribute__((vector_size(kVecBytes / 4)));

constexpr float kSmallest = 0x1p-110f;  // of a row's or a column's largest value, else it counts as 0

template <class T>
static void quantize_rows(const QuantizeArgs& q, int64_t row_begin, int64_t row_end, int64_t group_begin, int64_t group_end) {
  const int64_t groups = quantized_groups(q.depth);
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int64_t group = group_begin; group < group_end; ++group) {
      const int64_t begin = group * kQuantizedGroup, depth = min(kQuantizedGroup, q.depth - begin);
      const T* x = (const T*)q.a + row * q.a_row_stride + begin;
      Vec<float> low[4] = {}, high[4] = {}, bad[4] = {};
      for_columns_in_turn<float>(depth, [&](int64_t k, int lanes, int i) {
        const Vec<float> v = load_lanes(x + k, lanes);
        low[i] = v < low[i] ? v : low[i];
        high[i] = v > high[i] ? v : high[i];
        bad[i] += v * 0.0f;  // NaN, also of an infinity
      });
      for (int i = 1; i < 4; ++i) {
        low[0] = low[i] < low[0] ? low[i] : low[0];
        high[0] = high[i] > high[0] ? high[i] : high[0];
      }
      const float smallest = -largest<float>(-low[0]), range = largest<float>(high[0]) - smallest;
      const float inverse = range >= kSmallest && range < __builtin_inff() ? 255 / range : 0;
      const int32_t zero = scale_and_round(splat<float>(-smallest), inverse, 0)[0];
      q.quantized.scale[row * groups + group] = range / 255 + sum_in_turn<float>(bad);
      q.quantized.zero[row * groups + group] = zero;
      uint8_t* out = q.quantized.values + row * quantized_stride(q.depth) + begin;
      for_columns<float>(depth, [&](int64_t k, int lanes) {
        Vec<int32_t> value = scale_and_round(load_lanes(x + k, lanes), inverse, float(zero));
        value = value < 0 ? Vec<int32_t>{} : value;
        value = value > 255 ? Vec<int32_t>{} + 255 : value;
        const LaneBytes bytes = __builtin_convertvector(value, LaneBytes);
        memcpy(out + k, &bytes, size_t(lanes));
      });
    }
}

void quantize(const QuantizeArgs& q, int64_t row_begin, int64_t row_end, int64_t group_begin, int64_t group_end) {
  if (q.a_is_compute_type) return quantize_rows<float>(q, row_begin, row_end, group_begin, group_end);
  switch (q.dtype) {
    case DType::bf16: return quantize_rows<bf16>(q, row_begin, row_end, group_begin, group_end);
    case DType::f16: return quantize_rows<f16>(q, row_begin, row_end, group_begin, group_end);
    default: return quantize_rows<float>(q, row_begin, row_end, group_begin, group_end);
  }
}

template <class T> static void pack_quantized_panels(const PackArgs& a, int64_t panel_begin, int64_t panel_end) {
  constexpr int64_t kW = kQuantizedColumns;
  const int64_t depth = quantized_depth(a.depth), bytes = quantized_panel_bytes(a.depth);
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    int8_t* out = (int8_t*)a.packed + p * bytes;
    memset((void*)out, 0, size_t(bytes));
    float* scales = (float*)(out + depth * kW);
    int32_t* sums = (int32_t*)(scales + kW);
    float* samples = (float*)(sums + quantized_groups(a.depth) * kW);
    for (int64_t c = 0; c < min(kW, a.columns - p * kW); ++c) {
      const int64_t column = p * kW + c;
      const T* b = (const T*)a.b + column * a.b_column_stride;
      float magnitude = 0, bad = 0;
      for (int64_t k = 0; k < a.depth; ++k) {
        const float w = to_compute(b[k * a.b_depth_stride]);
        magnitude = max(magnitude, w < 0 ? -w : w);
        bad += w * 0.0f;
      }
      const bool scalable = bad == 0 && magnitude >= kSmallest;
      const float inverse = scalable ? 127 / magnitude : 0;
      for (int64_t k = 0; k < a.depth && scalable; ++k) {
        const float w = to_compute(b[k * a.b_depth_stride]);
        const int32_t value = min(127, max(-127, int32_t(__builtin_rintf(w * inverse))));
        out[quantized_offset(k, c)] = int8_t(value);
        sums[k / kQuantizedGroup * kW + c] += value;
      }
      scales[c] = magnitude / 127 + bad;
      if (a.depth > 0) samples[c] = to_compute(b[sampled_depth(column, a.depth) * a.b_depth_stride]);
    }
  }
}

void pack_quantized(const PackArgs& a, int64_t panel_begin, int64_t panel_end) {
  switch (a.dtype) {
    case DType::bf16: return pack_quantized_panels<bf16>(a, panel_begin, panel_end);
    case DType::f16: return pack_quantized_panels<f16>(a, panel_begin, panel_end);
    default: return pack_quantized_panels<float>(a, panel_begin, panel_end);
  }
}

// Exact sums (rows, COLUMNS) of one group are added to the totals; those of the last one go to the output. `scales`, and
// behind them in the panel the sums of its weights, are those of the first column.
template <class T, Activation ACTIVATION, int COLUMNS>
static void finish_rows(const GemmArgs& g, int64_t begin, int64_t end, int64_t group, int64_t column, const float* scales,
                        const int32_t* sums, float* totals) {
  constexpr int kVecs = COLUMNS / kLanes<float>;
  const int64_t groups = quantized_groups(g.depth);
  const bool last = group + 1 == groups;
  Vec<int32_t> weight_sums[kVecs];
  Vec<float> weight_scales[kVecs], bias[kVecs] = {};
  int lanes[kVecs];
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) {
    const int c = j * kLanes<float>;
    lanes[j] = int(max<int64_t>(0, min<int64_t>(kLanes<float>, g.columns - column - c)));
    memcpy(&weight_sums[j], scales + (1 + group) * kQuantizedColumns + c, sizeof(weight_sums[j]));
    weight_scales[j] = load(scales + c);
    if (g.bias) bias[j] = load_lanes((const float*)g.bias + column + c, lanes[j]);
  }
  for (int64_t row = begin; row < end; ++row, sums += COLUMNS, totals += COLUMNS) {
    const float scale = g.quantized.scale[row * groups + group];
    const int32_t zero = g.quantized.zero[row * groups + group];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      const int c = j * kLanes<float>;
      Vec<int32_t> sum;
      memcpy(&sum, sums + c, sizeof(sum));
      Vec<float> v = __builtin_convertvector(sum - zero * weight_sums[j], Vec<float>) * (scale * weight_scales[j]);
#if defined(__x86_64__)
      asm("" : "+v"(v));  // no fused multiply-add with what follows: the same on every instruction set
#endif
      if (group > 0) v += load(totals + c);
      if (!last) {
        store(totals + c, v);
        continue;
      }
      v = activate<float>(ACTIVATION, v + bias[j]);
      if (g.residual) v += load_lanes((const T*)g.residual + row * g.residual_stride + column + c, lanes[j]);
      const int64_t to = row * g.output_stride + column + c;
      g.output_is_compute_type ? store_lanes((float*)g.output + to, v, lanes[j])
                               : store_lanes((T*)g.output + to, v, lanes[j]);
    }
  }
}

template <class T, int COLUMNS>
static void finish(const GemmArgs& g, int64_t begin, int64_t end, int64_t group, int64_t column, const float* scales,
                   const int32_t* sums, float* totals) {
  const auto rows = [&]<Activation ACTIVATION>() {
    finish_rows<T, ACTIVATION, COLUMNS>(g, begin, end, group, column, scales, sums, totals);
  };
  switch (g.activation) {
    case Activation::gelu: return rows.template operator()<Activation::gelu>();
    case Activation::gelu_tanh: return rows.template operator()<Activation::gelu_tanh>();
    case Activation::relu: return rows.template operator()<Activation::relu>();
    case Activation::silu: return rows.template operator()<Activation::silu>();
    case Activation::none: return rows.template operator()<Activation::none>();
  }
}

constexpr int64_t kRows = 192;  // of a block: its values stay in L2

// What comes into L2 while a block is computed: `step` bytes for each step of it.
struct Prefetch {
  const char* next;
  int64_t step;

  FF_INLINE void operator()() {
    for (int64_t byte = 0; byte < step; byte += 64) __builtin_prefetch(next + byte, 0, 2);
    next += step;
  }
};

// panel_product(rows, depth, a, stride, b, sums, add, next): sums (rows, kQuantizedColumns) = or += a b for `depth` values
// of each row, `stride` bytes apart; up to kQuantizedRowTile - 1 more rows of a are read and of sums written. `next` is the
// part of the panels that comes after. BLOCK: the depths at a time, so that what is read again and again of b stays in L1;
// up to FEW rows read it once.
template <int64_t BLOCK, int64_t FEW, class Product>
static void product(const GemmArgs& g, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
                    void* scratch, Product panel_product) {
  constexpr int64_t kW = kQuantizedColumns;
  const int64_t depth = quantized_depth(g.depth), stride = quantized_stride(g.depth), groups = quantized_groups(g.depth);
  const int64_t bytes = quantized_panel_bytes(g.depth);
  const int64_t blocks = (row_end - row_begin + kRows - 1) / kRows;
  int32_t* sums = (int32_t*)scratch;
  float* totals = (float*)(sums + (kRows + kQuantizedRowTile) * kW);
  dispatch(g.dtype, [&]<class T>() {
    if constexpr (!__is_same(T, double))
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t m0 = row_begin + (row_end - row_begin) * block / blocks;
        const int64_t m1 = row_begin + (row_end - row_begin) * (block + 1) / blocks;
        for (int64_t p = panel_begin; p < panel_end; ++p) {
          const int8_t* b = (const int8_t*)g.b + p * bytes;
          const float* scales = (const float*)(b + depth * kW);
          if (depth == 0) memset((void*)sums, 0, size_t(m1 - m0) * kW * sizeof(int32_t));
          for (int64_t group = 0; group < groups; ++group) {
            const int64_t begin = group * kQuantizedGroup, end = min(depth, begin + kQuantizedGroup);
            const int64_t step = m1 - m0 <= FEW ? kQuantizedGroup : BLOCK;
            for (int64_t k = begin; k < end; k += step) {
              const int64_t k1 = min(end, k + step);
              panel_product(m1 - m0, k1 - k, g.quantized.values + m0 * stride + k, stride, b + k * kW, sums, k > begin,
                            (const char*)b + k1 * kW);
            }
            finish<T, kW>(g, m0, m1, group, p * kW, scales, sums, totals);
          }
        }
      }
  });
}

extern const int64_t kQuantizedScratchBytes;
const int64_t kQuantizedScratchBytes = (2 * kRows + kQuantizedRowTile) * kQuantizedColumns * 4;

// ---- products of 16 bits, added in pairs: any instruction set ----

constexpr int64_t kPairsDepth = 512;

#if defined(__AVX2__)
using Bytes = __attribute__((vector_size(kVecBytes / 2))) int8_t;
using Shorts = __attribute__((vector_size(kVecBytes))) int16_t;

FF_INLINE Vec<int32_t> multiply_add_pairs(Shorts a, Shorts b) {
#if defined(__AVX512BW__)
  return (Vec<int32_t>)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
  return (Vec<int32_t>)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

// Columns of a vector, each with two sums side by side.
constexpr int kPairsColumns = kVecBytes / 8;
constexpr int kPairsRows = kVecBytes == 64 ? 6 : 4, kPairsVecs = kVecBytes == 64 ? 4 : 2;

// a in 16 bits.
template <int ROWS>
static void pairs_tile(int64_t depth, const int16_t* a, int64_t stride, const int8_t* b, int32_t* sums, bool add) {
  Vec<int32_t> acc[ROWS][kPairsVecs] = {};
  for (int64_t k = 0; k < depth; k += 4) {
    Shorts bk[kPairsVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kPairsVecs; ++j) {
      Bytes bytes;
      memcpy(&bytes, b + quantized_offset(k, j * kPairsColumns), sizeof(bytes));
      bk[j] = __builtin_convertvector(bytes, Shorts);
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      int64_t four;
      memcpy(&four, a + i * stride + k, sizeof(four));
      const Shorts ak = (Shorts)(Vec<int64_t>{} + four);
#pragma GCC unroll 4
      for (int j = 0; j < kPairsVecs; ++j) acc[i][j] += multiply_add_pairs(ak, bk[j]);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < kPairsVecs; ++j)
      for (int c = 0; c < kPairsColumns; ++c) {
        int32_t& sum = sums[i * kQuantizedColumns + j * kPairsColumns + c];
        sum = (add ? sum : 0) + acc[i][j][2 * c] + acc[i][j][2 * c + 1];
      }
}
#endif

static void pairs_product(int64_t rows, int64_t depth, const uint8_t* a, int64_t stride, const int8_t* b, int32_t* sums,
                          bool add, const char*) {
#if defined(__AVX2__)
  int16_t wide[kPairsRows * kPairsDepth];
  for (int64_t i = 0; i < rows; i += kPairsRows) {
    const int64_t tile = min<int64_t>(kPairsRows, rows - i);
    for (int64_t r = 0; r < tile; ++r)
      for (int64_t k = 0; k < depth; ++k) wide[r * depth + k] = a[(i + r) * stride + k];
    for (int64_t c = 0; c < kQuantizedColumns; c += kPairsVecs * kPairsColumns) {
      int32_t* out = sums + i * kQuantizedColumns + c;
      if (tile == kPairsRows)
        pairs_tile<kPairsRows>(depth, wide, depth, b + quantized_offset(0, c), out, add);
      else
        for (int64_t r = 0; r < tile; ++r)
          pairs_tile<1>(depth, wide + r * depth, depth, b + quantized_offset(0, c), out + r * kQuantizedColumns, add);
    }
  }
#else
  for (int64_t i = 0; i < rows; ++i) {
    int32_t* row = sums + i * kQuantizedColumns;
    if (!add) memset((void*)row, 0, kQuantizedColumns * sizeof(int32_t));
    for (int64_t k = 0; k < depth; k += 4) {
      const uint8_t* x = a + i * stride + k;
      for (int64_t c = 0; c < kQuantizedColumns; ++c) {
        const int8_t* w = b + quantized_offset(k, c);
        row[c] += x[0] * w[0] + x[1] * w[1] + x[2] * w[2] + x[3] * w[3];
      }
    }
  }
#endif
}

void quantized_gemm(const GemmArgs& g, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
                    void* scratch) {
  product<kPairsDepth, 0>(g, row_begin, row_end, panel_begin, panel_end, scratch, pairs_product);
}

#if defined(__AVX512F__)

// ---- VNNI: four products of 8 bits are added to 32 bits by one instruction ----

constexpr int kVnniRows = 6;

// As assembly, or gcc 12 moves the accumulators about.
FF_INLINE void vpdpbusd(Vec<int32_t>& acc, Vec<int32_t> a, Vec<int32_t> b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

template <int ROWS>
static void vnni_tile(int64_t depth, const uint8_t* a, int64_t stride, const int8_t* b, int32_t* sums, bool add,
                      Prefetch prefetch) {
  Vec<int32_t> acc[ROWS][4];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[i][j] = Vec<int32_t>{};
  for (int64_t k = 0; k < depth; k += 4) {
    prefetch();
    Vec<int32_t> bk[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) memcpy(&bk[j], b + quantized_offset(k, j * 16), 64);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      int32_t four;
      memcpy(&four, a + i * stride + k, 4);
      const Vec<int32_t> ak = Vec<int32_t>{} + four;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) vpdpbusd(acc[i][j], ak, bk[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      int32_t* out = sums + i * kQuantizedColumns + j * 16;
      Vec<int32_t> before{};
      if (add) memcpy(&before, out, 64);
      before += acc[i][j];
      memcpy(out, &before, 64);
    }
}

static void vnni_product(int64_t rows, int64_t depth, const uint8_t* a, int64_t stride, const int8_t* b, int32_t* sums,
                         bool add, const char* next) {
  const int64_t tiles = (rows + kVnniRows - 1) / kVnniRows, steps = tiles * depth / 4;
  if (tiles == 1) next = (const char*)b + kAhead;
  const int64_t step = (depth * kQuantizedColumns / steps + 63) / 64 * 64;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t i = rows * t / tiles, end = rows * (t + 1) / tiles;
    const uint8_t* x = a + i * stride;
    int32_t* out = sums + i * kQuantizedColumns;
    const Prefetch prefetch{next + t * (depth / 4) * step, t * (depth / 4) * step < depth * kQuantizedColumns ? step : 0};
    switch (end - i) {
      case 1: vnni_tile<1>(depth, x, stride, b, out, add, prefetch); break;
      case 2: vnni_tile<2>(depth, x, stride, b, out, add, prefetch); break;
      case 3: vnni_tile<3>(depth, x, stride, b, out, add, prefetch); break;
      case 4: vnni_tile<4>(depth, x, stride, b, out, add, prefetch); break;
      case 5: vnni_tile<5>(depth, x, stride, b, out, add, prefetch); break;
      default: vnni_tile<6>(depth, x, stride, b, out, add, prefetch);
    }
  }
}

void quantized_gemm_vnni(const GemmArgs& g, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
                         void* scratch) {
  product<512, kVnniRows>(g, row_begin, row_end, panel_begin, panel_end, scratch, vnni_product);
}

// ---- AMX: tiles of 16 rows of 64 bytes; one instruction multiplies 16 x 64 by 64 x 16 values ----

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr int64_t kAmxColumns = 32;       // of a tile of sums
constexpr int64_t kAmxBytes = 768 << 10;  // of a block of rows: they stay in L2 while all panels pass over them

// sums (32 or 16 rows, kAmxColumns) = a b. Tiles 0 to 3: sums of 2 x 2 blocks of 16 x 16; 4 and 5: rows of a; 6 and 7:
// columns of b. between() is what there is to do while the products of a step are on their way.
template <bool TWO, class Between>
static void amx_tile(int64_t depth, const uint8_t* a, int64_t stride, const int8_t* b, int32_t* sums, Between between) {
  constexpr int64_t kRow = kAmxColumns * 4;  // bytes from one row of sums to the next
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; k += 64) {
    const int8_t* bk = b + k * kQuantizedColumns;
    _tile_loadd(6, bk, 64);
    _tile_loadd(4, a + k, stride);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, bk + 1024, 64);
    _tile_dpbusd(1, 4, 7);
    if constexpr (TWO) {
      _tile_loadd(5, a + 16 * stride + k, stride);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
    between();
  }
  _tile_stored(0, sums, kRow);
  _tile_stored(1, sums + 16, kRow);
  if constexpr (TWO) {
    _tile_stored(2, sums + 16 * kAmxColumns, kRow);
    _tile_stored(3, sums + 16 * kAmxColumns + 16, kRow);
  }
}

// A tile that is computed, on its way to the output.
template <class T> struct AmxTile {
  const GemmArgs& g;
  int64_t row = 0, end = 0, group = 0, column = 0;
  const float* scales = nullptr;
  const int32_t* sums = nullptr;
  float* totals = nullptr;

  FF_INLINE void finish_some(int64_t rows) {
    rows = min(rows, end - row);
    if (rows <= 0) return;
    finish<T, kAmxColumns>(g, row, row + rows, group, column, scales, sums, totals);
    row += rows, sums += rows * kAmxColumns, totals += rows * kAmxColumns;
  }
};

// Half a panel at a time: a group of it stays in L1.
template <class T>
static void amx_product(const GemmArgs& g, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
                        int32_t* scratch) {
  constexpr int64_t kW = kQuantizedColumns, kTile = kQuantizedRowTile, kSums = kTile * kAmxColumns;
  const int64_t depth = quantized_depth(g.depth), stride = quantized_stride(g.depth), bytes = quantized_panel_bytes(g.depth);
  const int64_t most = max(kTile, kAmxBytes / stride / kTile * kTile), blocks = (row_end - row_begin + most - 1) / most;
  float* totals = (float*)(scratch + 2 * kSums);
  AmxTile<T> before = {g};
  for (int64_t block = 0, tile = 0; block < blocks; ++block) {
    const int64_t m0 = row_begin + (row_end - row_begin) * block / blocks;
    const int64_t m1 = row_begin + (row_end - row_begin) * (block + 1) / blocks;
    const int64_t tiles = (m1 - m0 + kTile - 1) / kTile;
    for (int64_t p = panel_begin; p < panel_end; ++p) {
      const int8_t* b = (const int8_t*)g.b + p * bytes;
      Prefetch prefetch{(const char*)b + bytes, (kTile + tiles - 1) / tiles * 64};
      for (int64_t half = 0; half < kW && p * kW + half < g.columns; half += kAmxColumns)
        for (int64_t i = m0; i < m1; i += kTile)
          for (int64_t k = 0, group = 0; k < depth; k += kQuantizedGroup, ++group, ++tile) {
            const int64_t part = min(kQuantizedGroup, depth - k), rows = (kTile * 64 + part - 1) / part;
            const auto between = [&] {
              prefetch();
              before.finish_some(rows);
            };
            const uint8_t* a = g.quantized.values + i * stride + k;
            const int8_t* bk = b + k * kW + half * 64;
            int32_t* sums = scratch + tile % 2 * kSums;
            m1 - i > 16 ? amx_tile<true>(part, a, stride, bk, sums, between)
                        : amx_tile<false>(part, a, stride, bk, sums, between);
            before.row = i, before.end = min(m1, i + kTile), before.group = group, before.column = p * kW + half;
            before.scales = (const float*)(b + depth * kW) + half, before.sums = sums, before.totals = totals;
          }
    }
  }
  before.finish_some(kTile);
}

__attribute__((target("amx-tile"))) void quantized_gemm_amx(const GemmArgs& g, int64_t row_begin, int64_t row_end,
                                                            int64_t panel_begin, int64_t panel_end, void* scratch) {
  if (row_end - row_begin <= kVnniRows || g.depth == 0)
    return quantized_gemm_vnni(g, row_begin, row_end, panel_begin, panel_end, scratch);
  const TileConfig config;
  _tile_loadconfig(&config);
  dispatch(g.dtype, [&]<class T>() {
    if constexpr (!__is_same(T, double)) amx_product<T>(g, row_begin, row_end, panel_begin, panel_end, (int32_t*)scratch);
  });
  _tile_release();
}

#endif

}  // namespace fastformer::FASTFORMER_ISA
