// Barriers that count bytes, copies of tiles, products of a warpgroup: what sm_90a does beside its threads.

#include "hopper.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <stdexcept>

#include "engine.h"

namespace sim {

namespace {

constexpr size_t kGranule = 16;  // bytes: chunks of a tile keep together
constexpr size_t kGranules = (kMaxShared + 64 * kGap) / kGranule;

struct Mbarrier {
  int count = 0, left = 0;     // arrivals of a phase
  int64_t bytes_to_come = 0;   // below 0 while copies are ahead of who announces them
  unsigned phase = 0;
  bool fenced = false;
  int made_by = 0;             // the thread that has still to fence
  ThreadSet waiting;
  char order[2];               // for happens_before, by phase
};

struct Load {
  unsigned char* destination;
  TensorMap map;
  Mbarrier* barrier;
  std::array<int, TensorMap::kMost> first;
  size_t bytes;
  Where where;
};

// What a warp has to do of a wgmma.
struct Product {
  Wgmma what;
  int warp = 0;
  float* d[32];
  const uint32_t* a[32];
  std::vector<uint16_t> reads;  // granules
  Where where;
};

struct Accumulators {
  float* d[32];
  int n = 0;
  std::vector<float> values;  // by lane
  int64_t last = 0;           // the group of the last product of them
};

struct WarpProducts {
  bool fenced = false;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;  // committed
  int64_t first_group = 0;                  // the number of groups[0]
  std::vector<Accumulators> accumulators;   // that wait for products
  uint64_t history = 0;                     // the same for all four warps
};

struct Hopper {
  std::map<uint32_t, Mbarrier> barriers;  // by address
  std::vector<Load> loads;                // under way
  uint8_t written[kGranules] = {};        // by copies under way
  uint16_t read[kGranules] = {};          // by products under way
  WarpProducts warps[kWarps];
};
Hopper& hopper() {
  static Hopper* h = new Hopper;
  return *h;
}

size_t granule_of(const void* pointer) { return shared_address(pointer) / kGranule; }

Mbarrier& mbarrier(void* barrier, const char* what, Where where) {
  check_shared(barrier, 8, 8, what, where);
  auto& all = hopper().barriers;
  const auto found = all.find(shared_address(barrier));
  if (found == all.end()) fault(std::string(what) + ": this barrier has not been initialised", where);
  return found->second;
}

void end_phase_if_complete(Mbarrier& b) {
  if (b.left || b.bytes_to_come) return;
  ++b.phase;
  b.left = b.count;
  engine().ready.add(b.waiting);
  b.waiting = {};
}

// Hardware swaps chunks by the bits of the address.
unsigned char* swizzled(unsigned char* pointer) {
  const uint32_t address = shared_address(pointer);
  return pointer + (static_cast<int64_t>(address ^ (address >> 7 & 7) << 4) - address);
}

void make(const Load& load) {
  const TensorMap& map = load.map;
  size_t done = 0;
  std::array<uint32_t, TensorMap::kMost> at = {};
  const auto rows = load.bytes / (map.box[0] * 2);
  for (size_t row = 0; row < rows; ++row) {
    bool inside = true;
    int64_t offset = 0;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t place = load.first[i] + int64_t(at[i]);
      inside = inside && place >= 0 && place < int64_t(map.sizes[i]);
      offset += place * int64_t(map.strides[i]);
    }
    for (uint32_t x = 0; x < map.box[0]; ++x, done += 2) {
      const int64_t place = load.first[0] + int64_t(x);
      unsigned char* to = swizzled(load.destination + done);
      if (inside && place >= 0 && place < int64_t(map.sizes[0])) {
        std::memcpy(to, static_cast<const char*>(map.data) + offset + place * 2, 2);
        engine().launch->copied_bytes += 2;
      } else {
        std::memset(to, 0, 2);
      }
    }
    for (int i = 1; i < map.rank && ++at[i] == map.box[i]; ++i) at[i] = 0;
  }
  load.barrier->bytes_to_come -= static_cast<int64_t>(load.bytes);
  end_phase_if_complete(*load.barrier);
}

float to_float(bool half, uint16_t bits) {
  if (!half) return std::bit_cast<float>(uint32_t(bits) << 16);
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 0) return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::ldexp(float(fraction), -24)));
  return std::bit_cast<float>(sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13);
}

// PTX ISA, "Shared memory matrix layout" and "Matrix descriptor", with 128 bytes of swizzling: where element
// (count, depth) is. Along the depth: 8 rows of 128 bytes, then at the stride the next 8. Along the count: 8 of the
// depth, 128 bytes each, then at the stride the next 8; 64 of the count, then at the leading distance the next.
unsigned char* element(const Tile& tile, int count, int depth) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(tile.descriptor >> bit & 0x3fff) * 16; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const uint32_t offset =
      tile.depth_adjacent
          ? static_cast<uint32_t>(count / 8) * stride + static_cast<uint32_t>(count % 8 * 128 + depth * 2)
          : static_cast<uint32_t>(count / 64) * leading + static_cast<uint32_t>(depth / 8) * stride +
                static_cast<uint32_t>(depth % 8 * 128 + count % 64 * 2);
  return swizzled(engine().arena + start + offset);
}

// Of `size` rows from `first` on, in memory: their granules, checked.
void note_granules(Product& product, const Tile& tile, int first, int size) {
  if (tile.descriptor >> 62 != 1) fault("wgmma: a descriptor without 128 bytes of swizzling", product.where);
  const int step = tile.depth_adjacent ? 1 : 8;
  for (int count = first; count < first + size; count += step)
    for (int depth = 0; depth < 16; depth += tile.depth_adjacent ? 8 : 1) {
      const unsigned char* chunk = element(tile, count, depth);
      check_shared(chunk, 16, 16, "wgmma: a tile", product.where);
      product.reads.push_back(static_cast<uint16_t>(granule_of(chunk)));
    }
}

void multiply(const Product& product, Accumulators& sums) {
  const Wgmma& w = product.what;
  const int first = product.warp % 4 * 16;
  float a[16][16];
  static float b[16][256], d[16][256];
  const auto value = [&](const Tile& tile, int count, int depth) {
    uint16_t bits;
    std::memcpy(&bits, element(tile, count, depth), 2);
    return to_float(w.half, bits);
  };
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k) {
      if (!product.a[0]) {
        a[m][k] = value(w.a, first + m, k);
      } else {  // registers: rows g, g + 8, g, g + 8, columns 2 t and the next, + 8 in the last two
        const int lane = m % 8 * 4 + k % 8 / 2, i = m / 8 + k / 8 * 2;
        a[m][k] = to_float(w.half, static_cast<uint16_t>(product.a[lane][i] >> (k % 2 * 16)));
      }
    }
  for (int n = 0; n < w.n; ++n)
    for (int k = 0; k < 16; ++k) b[k][n] = value(w.b, n, k);
  const auto each = [&](const auto& f) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < w.n / 2; ++i)
        f(d[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2],
          sums.values[static_cast<size_t>(lane * w.n / 2 + i)]);
  };
  each([&](float& sum, float before) { sum = w.accumulate ? before : 0; });
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < w.n; ++n) d[m][n] += a[m][k] * b[k][n];
  each([&](float sum, float& after) { after = sum; });
}

Accumulators& accumulators_of(WarpProducts& warp, const Product& product) {
  for (Accumulators& known : warp.accumulators)
    if (known.d[0] == product.d[0]) {
      if (known.n != product.what.n) fault("wgmma: registers of another product that is under way", product.where);
      return known;
    }
  Accumulators sums;
  sums.n = product.what.n;
  std::copy(product.d, product.d + 32, sums.d);
  for (float* d : sums.d) sums.values.insert(sums.values.end(), d, d + sums.n / 2);
  warp.accumulators.push_back(std::move(sums));
  return warp.accumulators.back();
}

void give_back(const Accumulators& sums) {
  for (int lane = 0; lane < 32; ++lane)
    std::copy_n(sums.values.begin() + lane * sums.n / 2, sums.n / 2, sums.d[lane]);
}

struct LaneOfProduct {
  const Wgmma* what;
  float* d;
  const uint32_t* a;
};

void need_whole_warp(const char* name, unsigned lanes, Where where) {
  if (lanes != kWholeWarp) fault(std::string(name) + " wants all 32 lanes of the warp", where);
}

WarpProducts& my_warp() { return hopper().warps[me().warp()]; }
void remember(uint64_t what) {
  uint64_t& history = my_warp().history;
  history = (history ^ what) * 0x9e3779b97f4a7c15u + 1;
}

void exchange_wgmma(void* const* payload, unsigned lanes, Where where) {
  need_whole_warp("wgmma", lanes, where);
  Hopper& h = hopper();
  WarpProducts& warp = my_warp();
  Product product = {.what = *static_cast<LaneOfProduct*>(payload[0])->what, .warp = me().warp(), .d = {}, .a = {},
                     .reads = {}, .where = where};
  const Wgmma& w = product.what;
  for (int l = 0; l < 32; ++l) {
    const auto& lane = *static_cast<LaneOfProduct*>(payload[l]);
    product.d[l] = lane.d;
    product.a[l] = lane.a;
    if (lane.what->b.descriptor != w.b.descriptor || lane.what->accumulate != w.accumulate ||
        (!lane.a && lane.what->a.descriptor != w.a.descriptor))
      fault("wgmma: lanes of a warp give different descriptors", where);
  }
  if (!warp.fenced) fault("wgmma: no wgmma.fence since the registers could change", where);
  remember(w.b.descriptor + static_cast<uint64_t>(w.n) + (product.a[0] ? 0 : w.a.descriptor << 1));
  if (!product.a[0]) note_granules(product, w.a, me().warp() % 4 * 16, 16);
  note_granules(product, w.b, 0, w.n);
  for (const uint16_t granule : product.reads) ++h.read[granule];
  Accumulators& sums = accumulators_of(warp, product);
  sums.last = warp.first_group + static_cast<int64_t>(warp.groups.size());
  if (options().lazy_copies) {
    for (float* d : sums.d) std::memset(d, 0xff, sizeof(float) * static_cast<size_t>(sums.n / 2));
  } else {
    multiply(product, sums);
    give_back(sums);
  }
  warp.open.push_back(std::move(product));
  engine().launch->wgmma += me().warp() % 4 == 0;
}

void exchange_fence(void* const*, unsigned lanes, Where where) {
  need_whole_warp("wgmma.fence", lanes, where);
  my_warp().fenced = true;
}

void exchange_commit(void* const*, unsigned lanes, Where where) {
  need_whole_warp("wgmma.commit_group", lanes, where);
  WarpProducts& warp = my_warp();
  warp.groups.push_back(std::move(warp.open));
  warp.open.clear();
}

void exchange_wait(void* const* payload, unsigned lanes, Where where) {
  need_whole_warp("wgmma.wait_group", lanes, where);
  Hopper& h = hopper();
  WarpProducts& warp = my_warp();
  while (warp.groups.size() > static_cast<size_t>(*static_cast<int*>(payload[0]))) {
    for (const Product& product : warp.groups.front()) {
      if (options().lazy_copies) multiply(product, accumulators_of(warp, product));
      for (const uint16_t granule : product.reads) --h.read[granule];
    }
    warp.groups.pop_front();
    ++warp.first_group;
  }
  warp.fenced = false;
  std::erase_if(warp.accumulators, [&](const Accumulators& sums) {
    const bool done = sums.last < warp.first_group;
    if (done && options().lazy_copies) give_back(sums);
    return done;
  });
}

void exchange_registers(void* const* payload, unsigned lanes, Where where) {
  need_whole_warp("setmaxnreg", lanes, where);
  const int count = *static_cast<int*>(payload[0]);
  if (count < 24 || count > 256 || count % 8) fault("setmaxnreg: 24 to 256 registers, a multiple of 8", where);
  remember(static_cast<uint64_t>(count));
}

}  // namespace

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - engine().arena);
}

void mbarrier_init(void* barrier, int count, Where where) {
  const Unwatched unwatched;
  check_shared(barrier, 8, 8, "mbarrier.init", where);
  if (count < 1 || count >= 1 << 20) fault("mbarrier.init: " + std::to_string(count) + " arrivals", where);
  Mbarrier& b = hopper().barriers[shared_address(barrier)];
  b = {};
  b.count = b.left = count;
  b.made_by = me().index;
}

void fence_proxy_async() {
  const Unwatched unwatched;
  for (auto& [address, b] : hopper().barriers) b.fenced = b.fenced || b.made_by == me().index;
}

void mbarrier_arrive(void* barrier, int bytes_to_come, Where where) {
  const Unwatched unwatched;
  Mbarrier& b = mbarrier(barrier, "mbarrier.arrive", where);
  if (!b.left) fault("mbarrier.arrive: more arrivals than the " + std::to_string(b.count) + " of a phase", where);
  happens_before(&b.order[b.phase & 1]);
  b.bytes_to_come += bytes_to_come;
  --b.left;
  end_phase_if_complete(b);
}

void mbarrier_wait(void* barrier, int parity, Where where) {
  const Unwatched unwatched;
  Mbarrier& b = mbarrier(barrier, "mbarrier.try_wait", where);
  while ((b.phase & 1) == static_cast<unsigned>(parity)) {
    b.waiting.add(me().index);
    wait({"mbarrier.try_wait", where});
  }
  happens_after(&b.order[parity]);
}

TensorMap tensor_map(const void* data, std::initializer_list<uint64_t> sizes, std::initializer_list<uint64_t> strides,
                     std::initializer_list<uint32_t> box) {
  TensorMap map = {.data = data, .rank = static_cast<int>(sizes.size())};
  const auto need = [](bool good, const char* what) {
    if (!good) throw std::runtime_error(std::string("tensor map: ") + what);
  };
  need(map.rank >= 2 && map.rank <= TensorMap::kMost && strides.size() + 1 == sizes.size() &&
           box.size() == sizes.size(),
       "2 to 4 sizes, a box of as many, a stride less");
  need(reinterpret_cast<uintptr_t>(data) % 16 == 0, "the data is not aligned to 16 bytes");
  std::copy(sizes.begin(), sizes.end(), map.sizes);
  std::copy(strides.begin(), strides.end(), map.strides + 1);
  std::copy(box.begin(), box.end(), map.box);
  for (int i = 0; i < map.rank; ++i) {
    need(map.sizes[i] >= 1 && map.sizes[i] <= uint64_t(1) << 32, "sizes are 1 to 2^32");
    need(map.box[i] >= 1 && map.box[i] <= 256, "a box is 1 to 256 wide");
    need(i == 0 || (map.strides[i] % 16 == 0 && map.strides[i] < uint64_t(1) << 40),
         "strides are multiples of 16 bytes below 2^40");
  }
  need(map.box[0] == 64, "rows of a box are the 128 bytes that are swizzled");
  return map;
}

void tensor_load(void* destination, const TensorMap& map, void* barrier, std::array<int, TensorMap::kMost> first,
                 Where where) {
  const Unwatched unwatched;
  Hopper& h = hopper();
  Mbarrier& b = mbarrier(barrier, "cp.async.bulk.tensor: the barrier", where);
  if (!b.fenced) fault("cp.async.bulk.tensor: no fence after the barrier's initialisation", where);
  Load load = {static_cast<unsigned char*>(destination), map, &b, first, 2, where};
  for (int i = 0; i < map.rank; ++i) load.bytes *= map.box[i];
  check_shared(destination, load.bytes, 128, "cp.async.bulk.tensor", where, true);
  if (!options().lazy_copies) return make(load);
  std::fill_n(h.written + granule_of(destination), load.bytes / kGranule, uint8_t(1));
  std::memset(destination, 0xff, load.bytes);
  h.loads.push_back(load);
}

bool finish_load() {
  Hopper& h = hopper();
  if (h.loads.empty()) return false;
  const size_t last = h.loads.size() - 1;
  const size_t which = options().threads == Order::forward   ? 0
                       : options().threads == Order::reverse ? last
                                                             : engine().random() % (last + 1);
  const Load load = h.loads[which];
  h.loads.erase(h.loads.begin() + static_cast<std::ptrdiff_t>(which));
  std::fill_n(h.written + granule_of(load.destination), load.bytes / kGranule, uint8_t(0));
  make(load);
  return true;
}

void check_under_way(const void* pointer, size_t bytes, bool writes, const char* what, Where where) {
  const Hopper& h = hopper();
  for (size_t g = granule_of(pointer); g <= granule_of(static_cast<const char*>(pointer) + bytes - 1); ++g) {
    if (h.written[g]) fault(std::string(what) + ": a copy has still to write there", where);
    if (writes && h.read[g]) fault(std::string(what) + ": a wgmma may still read there", where);
  }
}

void wgmma(const Wgmma& product, float* d, const uint32_t* a_registers, Where where) {
  LaneOfProduct lane = {&product, d, a_registers};
  collective("wgmma", kWholeWarp, &lane, exchange_wgmma, where);
}
void wgmma_fence(Where where) { collective("wgmma.fence", kWholeWarp, nullptr, exchange_fence, where); }
void wgmma_commit(Where where) { collective("wgmma.commit_group", kWholeWarp, nullptr, exchange_commit, where); }
void wgmma_wait(int groups_left, Where where) {
  collective("wgmma.wait_group", kWholeWarp, &groups_left, exchange_wait, where);
}
void set_registers(int count, Where where) { collective("setmaxnreg", kWholeWarp, &count, exchange_registers, where); }

void begin_block_of_hopper() {
  Hopper& h = hopper();
  if (h.barriers.empty() && h.loads.empty()) return;
  h.~Hopper();
  new (&h) Hopper;
}

void end_block_of_hopper() {
  const Hopper& h = hopper();
  if (!h.loads.empty()) fault("the block ends while a copy is under way", h.loads[0].where);
  for (const auto& [address, b] : h.barriers)
    if (b.bytes_to_come)
      fault("the block ends, and a barrier has still to get " + std::to_string(b.bytes_to_come) + " bytes", {});
  for (int w = 0; w < kWarps; ++w) {
    const WarpProducts& warp = h.warps[w];
    if (!warp.open.empty() || !warp.groups.empty()) fault("the block ends while a wgmma is under way", {});
    if (warp.history != h.warps[w / 4 * 4].history)
      fault("the warps of warpgroup " + std::to_string(w / 4) + " did not all do the same wgmma and setmaxnreg", {});
  }
}

}  // namespace sim
