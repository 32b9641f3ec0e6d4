// What one core can do at most: loops that do nothing but multiply and add in registers, or read memory.
#pragma once

#include <stdint.h>

namespace fastformer {

using MultiplyAddsKernel = int64_t(int64_t rounds);                       // returns how many operations it did
using ReadKernel = int32_t(const void* memory, int64_t bytes, int64_t times);  // bytes: a multiple of 4096

namespace baseline { MultiplyAddsKernel multiply_adds; ReadKernel read; }
namespace avx2 { MultiplyAddsKernel multiply_adds; ReadKernel read; }
namespace avx512 { MultiplyAddsKernel multiply_adds, multiply_adds_vnni, multiply_adds_amx; ReadKernel read; }

}  // namespace fastformer
