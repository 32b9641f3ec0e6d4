// Shared memory, its bank conflicts, and asynchronous copies to it.

#include <algorithm>

#include "engine.h"

namespace sim {

void poison_arena() {
  Engine& e = engine();
#ifdef SIM_ASAN
  __asan_unpoison_memory_region(e.arena, kMaxShared + 64 * kGap);
#endif
  std::memset(e.arena, 0xff, e.used);
#ifdef SIM_ASAN
  __asan_poison_memory_region(e.arena, kMaxShared + 64 * kGap);
#endif
  e.used = 0;
  e.arrays.clear();
}

std::string too_much_shared(size_t bytes) {
  return std::to_string(bytes) + " bytes of shared memory, a block has at most " + std::to_string(kMaxShared);
}

void* allocate(const void* tag, size_t bytes, size_t alignment, const char* name) {
  Engine& e = engine();
  const size_t align = std::max<size_t>(alignment, 128);
  e.used = (e.used + align - 1) / align * align;
  unsigned char* begin = e.arena + e.used;
  size_t total = bytes;
  for (const SharedArray& array : e.arrays) total += array.bytes;
  if (total > kMaxShared) fault(too_much_shared(total), {});
  e.arrays.push_back({tag, begin, bytes, name});
  e.used += bytes + kGap;
#ifdef SIM_ASAN
  __asan_unpoison_memory_region(begin, bytes);
#endif
  std::memset(begin, 0xff, bytes);  // also what a block before has left
  e.launch->shared_bytes = std::max<int64_t>(e.launch->shared_bytes, static_cast<int64_t>(total));
  return begin;
}

namespace {

// Wavefronts of one access by up to 32 lanes: 32 banks of 4 bytes; lanes that read one word share it. Accesses of 8
// and 16 bytes go by halves and quarters of the warp.
int wavefronts(const uintptr_t* address, unsigned lanes, size_t bytes, int* least) {
  const int lanes_at_once = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  int total = 0;
  *least = 0;
  for (int first = 0; first < 32; first += lanes_at_once) {
    uintptr_t words[32][32];  // by bank
    int count[32] = {};
    for (int lane = first; lane < first + lanes_at_once; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      for (uintptr_t word = address[lane] / 4; word <= (address[lane] + bytes - 1) / 4; ++word) {
        uintptr_t* bank = words[word % 32];
        int& n = count[word % 32];
        if (std::find(bank, bank + n, word) == bank + n) bank[n++] = word;
      }
    }
    const int most = *std::max_element(count, count + 32);
    total += most;
    *least += most > 0;
  }
  return total;
}

}  // namespace

void count_wavefronts(const uintptr_t* address, unsigned lanes, size_t bytes) {
  int least;
  const int total = wavefronts(address, lanes, bytes, &least);
  engine().launch->shared_wavefronts += total;
  engine().launch->bank_conflicts += total - least;
}

void count_noted_accesses() {
  Engine& e = engine();
  for (const auto& [place, list] : e.accesses)
    for (const auto& access : list) count_wavefronts(access.address, access.lanes, access.bytes);
  e.accesses.clear();
  e.visits.clear();
}

void* shared_array(const void* tag, size_t bytes, size_t alignment, const char* name) {
  const Unwatched unwatched;
  for (const SharedArray& array : engine().arrays)
    if (array.tag == tag) return array.begin;
  return allocate(tag, bytes, alignment, name);
}

unsigned char* dynamic_shared() {
  Engine& e = engine();
  if (e.arrays.empty() || e.arrays[0].tag) fault("the launch gave no dynamic shared memory", {});
  return e.arrays[0].begin;
}

void check_shared(const void* pointer, size_t bytes, size_t alignment, const char* what, Where where, bool writes) {
  const Unwatched unwatched;
  const auto* p = static_cast<const unsigned char*>(pointer);
  if (reinterpret_cast<uintptr_t>(p) % alignment)
    fault(std::string(what) + ": not aligned to " + std::to_string(alignment) + " bytes", where);
  const auto& arrays = engine().arrays;
  for (const SharedArray& array : arrays)
    if (p >= array.begin && p + bytes <= array.begin + array.bytes)
      return check_under_way(p, bytes, writes, what, where);
  std::string nearest = "not in shared memory";
  for (const SharedArray& array : arrays)
    if (p + bytes + kGap > array.begin && p < array.begin + array.bytes + kGap)
      nearest = "bytes " + std::to_string(p - array.begin) + " to " + std::to_string(p - array.begin + int64_t(bytes)) +
                " of the shared array " + array.name + " of " + std::to_string(array.bytes);
  fault(std::string(what) + ": out of bounds, " + nearest, where);
}

void note_shared_access(const void* pointer, size_t bytes, Where where) {
  if (!options().count_conflicts) return;
  const Unwatched unwatched;
  Engine& e = engine();
  const Thread& thread = me();
  const auto place = std::tuple(thread.warp(), where.file_name(), unsigned(where.line()), unsigned(where.column()));
  const unsigned visit = e.visits[place][static_cast<size_t>(thread.lane())]++;
  auto& list = e.accesses[place];
  if (visit >= list.size()) list.resize(visit + 1);
  list[visit].address[thread.lane()] = reinterpret_cast<uintptr_t>(pointer);
  list[visit].bytes = bytes;
  list[visit].lanes |= 1u << thread.lane();
}

void copy_start(const Copy& copy, Where where) {
  const Unwatched unwatched;
  const auto bytes = static_cast<size_t>(copy.bytes);
  check_shared(copy.destination, bytes, bytes, "cp.async: the destination", where);
  if (reinterpret_cast<uintptr_t>(copy.source) % bytes)
    fault("cp.async: the source is not aligned to " + std::to_string(copy.bytes) + " bytes", where);
  if (copy.source_bytes < 0 || copy.source_bytes > copy.bytes)
    fault("cp.async: " + std::to_string(copy.source_bytes) + " bytes of the source, it copies " +
              std::to_string(copy.bytes), where);
  engine().launch->copied_bytes += copy.source_bytes;
  if (options().lazy_copies) me().copies.push_back(copy);
}

void copy_commit() {
  const Unwatched unwatched;
  me().groups.push_back(me().copies.size());
}

std::vector<Copy> copy_wait(int groups_left) {
  const Unwatched unwatched;
  Thread& thread = me();
  const size_t groups = thread.groups.size(), left = static_cast<size_t>(groups_left);
  if (groups <= left) return {};
  const size_t end = thread.groups[groups - left - 1];
  std::vector<Copy> now(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(end));
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(end));
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + static_cast<std::ptrdiff_t>(groups - left));
  for (size_t& group : thread.groups) group -= end;
  return now;
}

}  // namespace sim
