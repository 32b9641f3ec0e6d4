// What the kernels of a linear-chain CRF take: one sequence.
#pragma once

#include <stdint.h>

namespace fastformer {

// The chain runs over `length` > 0 positions of the sequence; the others are left out. Values are of the compute type
// but for the emissions, those of start, end and transitions in rows of `width`, whole vectors, -inf beyond the tags.
struct CrfArgs {
  DType dtype;  // of the emissions
  int64_t tags, width;
  const void* emissions;  // (positions, tags), `stride` elements apart
  int64_t stride;
  int64_t length;
  const int64_t* positions;  // of each step
  const int64_t* path;       // its tag; null for the decoder
  const void *transitions, *transposed;  // (from, to) and (to, from)
  const void *start, *end;
  // (length, tags): log of the summed scores of all paths into a tag, before its emission and less what the largest was
  // one step before. Written where not null, and read by the backward.
  void* arrived;
  void* scratch;  // three rows; the decoder's takes one more for each step
};

// Each is added to; start, end and transposed are those of a group of sequences.
struct CrfGradients {
  void *emissions;   // (positions, tags)
  void *transposed;  // (tags, width): (to, from)
  void *start, *end;
};

using CrfKernel = double(const CrfArgs&);
using CrfBackwardKernel = void(const CrfArgs&, const CrfGradients&, double grad);
using CrfDecodeKernel = void(const CrfArgs&, int64_t* tags);  // tags: of every position, written at those of the chain

}  // namespace fastformer
