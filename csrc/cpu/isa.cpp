#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastformer {
namespace {

// Has this machine 8-bit products of tiles, and does the system let this process use their registers?
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25;  // CPUID leaf 7, edx
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (kTiles | kInt8)) != (kTiles | kInt8)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// What this machine runs, best last. __builtin_cpu_supports asks CPUID and, for the wide registers, XCR0.
std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> levels = {&baseline::kernels};
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) levels.push_back(&avx2::kernels);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    levels.push_back(&avx512::kernels);
  if (levels.back() == &avx512::kernels && __builtin_cpu_supports("avx512vnni")) {
    levels.push_back(&avx512::kernels_vnni);
    if (has_amx()) levels.push_back(&avx512::kernels_amx);
  }
#endif
  return levels;
}

std::string names() {
  std::string list;
  for (const Kernels* level : supported()) list += (list.empty() ? "" : ",") + std::string(level->isa);
  return list;
}

const Kernels* find(const std::string& name) {
  for (const Kernels* level : supported())
    if (name == level->isa) return level;
  STD_TORCH_CHECK(false, "FASTFORMER_ISA: this machine can run ", names(), "; got '", name, "'");
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> level = [] {
    const char* wanted = std::getenv("FASTFORMER_ISA");
    return wanted && *wanted ? find(wanted) : supported().back();
  }();
  return level;
}

std::string isa() { return kernels().isa; }
void set_isa(std::string name) { current() = find(name); }

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

}  // namespace fastformer

STABLE_TORCH_LIBRARY_IMPL(fastformer_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&fastformer::isa));
  m.impl("isas", TORCH_BOX(&fastformer::names));
  m.impl("set_isa", TORCH_BOX(&fastformer::set_isa));
  m.impl("multiplies_bfloat16", TORCH_BOX(&fastformer::multiplies_bfloat16));
}
