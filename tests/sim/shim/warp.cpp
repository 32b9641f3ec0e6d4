// What the lanes of a warp do together: shuffles, votes, ldmatrix, mma.

#include <algorithm>
#include <bit>
#include <cmath>

#include "engine.h"

namespace sim {
namespace {

template <class F> void for_lanes(unsigned lanes, F f) {
  for (; lanes; lanes &= lanes - 1) f(std::countr_zero(lanes));
}

struct ShuffleValue {
  uint64_t value, result;
  int source;
};
struct Vote {
  uint64_t value;
  uint32_t result;
  Reduction reduction;
  bool is_signed;
};

uint32_t combine(Reduction reduction, bool is_signed, uint32_t a, uint32_t b) {
  const auto i = static_cast<int32_t>(a), j = static_cast<int32_t>(b);
  switch (reduction) {
    case Reduction::add: return a + b;
    case Reduction::min: return is_signed ? static_cast<uint32_t>(std::min(i, j)) : std::min(a, b);
    case Reduction::max: return is_signed ? static_cast<uint32_t>(std::max(i, j)) : std::max(a, b);
    case Reduction::bit_and: return a & b;
    case Reduction::bit_or: return a | b;
    case Reduction::bit_xor: return a ^ b;
  }
  return 0;
}

void exchange_shuffle(void* const* payload, unsigned lanes, Where where) {
  for_lanes(lanes, [&](int lane) {
    auto& value = *static_cast<ShuffleValue*>(payload[lane]);
    if (!(lanes >> value.source & 1))
      fault("lane " + std::to_string(lane) + " reads from lane " + std::to_string(value.source) +
                ", which does not take part in the shuffle", where);
    value.result = static_cast<ShuffleValue*>(payload[value.source])->value;
  });
}
void exchange_ballot(void* const* payload, unsigned lanes, Where) {
  uint32_t result = 0;
  for_lanes(lanes, [&](int l) { result |= uint32_t(static_cast<Vote*>(payload[l])->value != 0) << l; });
  for_lanes(lanes, [&](int l) { static_cast<Vote*>(payload[l])->result = result; });
}
void exchange_match(void* const* payload, unsigned lanes, Where) {
  for_lanes(lanes, [&](int lane) {
    auto& vote = *static_cast<Vote*>(payload[lane]);
    vote.result = 0;
    for_lanes(lanes, [&](int l) {
      vote.result |= uint32_t(static_cast<Vote*>(payload[l])->value == vote.value) << l;
    });
  });
}
void exchange_reduce(void* const* payload, unsigned lanes, Where) {
  auto& first = *static_cast<Vote*>(payload[std::countr_zero(lanes)]);
  auto result = static_cast<uint32_t>(first.value);
  for_lanes(lanes & (lanes - 1), [&](int l) {
    const auto value = static_cast<uint32_t>(static_cast<Vote*>(payload[l])->value);
    result = combine(first.reduction, first.is_signed, result, value);
  });
  for_lanes(lanes, [&](int l) { static_cast<Vote*>(payload[l])->result = result; });
}

void need_whole_warp(const char* name, unsigned lanes, Where where) {
  if (lanes != kWholeWarp) fault(std::string(name) + " wants all 32 lanes of the warp", where);
}

void exchange_matrix_rows(void* const* payload, unsigned lanes, Where where) {
  need_whole_warp("ldmatrix", lanes, where);
  const void* rows[32];
  uintptr_t address[32];
  for (int l = 0; l < 32; ++l) rows[l] = static_cast<MatrixRows*>(payload[l])->row;
  for (int l = 0; l < 32; ++l) address[l] = reinterpret_cast<uintptr_t>(rows[l]);
  for (int l = 0; l < 32; ++l) std::memcpy(static_cast<MatrixRows*>(payload[l])->rows, rows, sizeof rows);
  const int count = static_cast<MatrixRows*>(payload[0])->count;
  for (int l = 0; l < 8 * count; ++l) check_shared(rows[l], 16, 16, "ldmatrix: the row of lane ", where);
  ++engine().launch->ldmatrix;
  count_wavefronts(address, count == 4 ? kWholeWarp : (1u << 8 * count) - 1, 16);
}

float half_to_float(uint32_t h) {
  const uint32_t sign = (h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 0) return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::ldexp(float(fraction), -24)));
  return std::bit_cast<float>(sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13);
}

struct Fragments {
  Operand type;
  float* d;
  const uint32_t *a, *b;
};

// Element j of 16 bits of a fragment's registers.
float element16(Operand type, const uint32_t* registers, int j) {
  const uint32_t bits = registers[j / 2] >> (j % 2 * 16) & 0xffff;
  return type == Operand::f16 ? half_to_float(bits) : std::bit_cast<float>(bits << 16);
}

// PTX ISA, "Matrix fragments for mma.m16n8k16" and "... mma.m16n8k8": group = lane / 4, t = lane % 4.
void exchange_mma(void* const* payload, unsigned lanes, Where where) {
  need_whole_warp("mma", lanes, where);
  const Operand type = static_cast<Fragments*>(payload[0])->type;
  const int depth = type == Operand::tf32 ? 8 : 16;
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& f = *static_cast<Fragments*>(payload[lane]);
    const int group = lane / 4, t = lane % 4;
    if (type == Operand::tf32) {  // the hardware reads the upper 19 bits
      for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][t + i / 2 * 4] = std::bit_cast<float>(f.a[i] & 0xffffe000);
      for (int i = 0; i < 2; ++i) b[t + i * 4][group] = std::bit_cast<float>(f.b[i] & 0xffffe000);
    } else {
      for (int i = 0; i < 8; ++i) a[group + i / 2 % 2 * 8][t * 2 + i % 2 + i / 4 * 8] = element16(type, f.a, i);
      for (int i = 0; i < 4; ++i) b[t * 2 + i % 2 + i / 2 * 8][group] = element16(type, f.b, i);
    }
    for (int i = 0; i < 4; ++i) d[group + i / 2 * 8][t * 2 + i % 2] = f.d[i];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < depth; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& f = *static_cast<Fragments*>(payload[lane]);
    for (int i = 0; i < 4; ++i) f.d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
  ++engine().launch->mma;
}

}  // namespace

uint64_t shuffle(const char* name, unsigned mask, uint64_t value, int source_lane, Where where) {
  ShuffleValue v = {value, 0, source_lane};
  meet(name, mask, &v, exchange_shuffle, where);
  return v.result;
}
unsigned ballot(const char* name, unsigned mask, bool predicate, Where where) {
  Vote vote = {predicate, 0, {}, false};
  meet(name, mask, &vote, exchange_ballot, where);
  return vote.result;
}
unsigned match_any(unsigned mask, uint64_t value, Where where) {
  Vote vote = {value, 0, {}, false};
  meet("__match_any_sync", mask, &vote, exchange_match, where);
  return vote.result;
}
uint32_t reduce(const char* name, unsigned mask, uint32_t value, Reduction reduction, bool is_signed, Where where) {
  Vote vote = {value, 0, reduction, is_signed};
  meet(name, mask, &vote, exchange_reduce, where);
  return vote.result;
}

void exchange_rows(MatrixRows& rows, Where where) {
  meet("ldmatrix", kWholeWarp, &rows, exchange_matrix_rows, where);
}

void mma_m16n8(Operand type, float* d, const uint32_t* a, const uint32_t* b, Where where) {
  Fragments fragments = {type, d, a, b};
  meet("mma", kWholeWarp, &fragments, exchange_mma, where);
}

}  // namespace sim
