// The one inner loop of every matrix product here: R rows of A times kPanels panels of sixteen columns of B.
//
// Law: element (r, c) of the result is the chain  x = fma(a[r][k], b[k][c], x)  for k = 0, 1, 2, ... in float32, whatever R is and
// wherever the row lies. No other order is ever taken, so a row's result does not depend on the rows beside it.
#pragma once

#include <cstddef>

#include "vec.h"

namespace enginery {

#if defined(ENGINERY_AVX512)
constexpr int kMaxRows = 14, kPanels = 2;  // 28 accumulators, 2 operands, 1 broadcast of 32 registers
#else
constexpr int kMaxRows = 6, kPanels = 1;  // AVX2: 12 accumulators, 2 operands, 1 broadcast of 16 registers
#endif

constexpr int kColumns = kPanels * kLanes;

// A is stored in chunks [ceil(steps / kChunk)][R][kChunk] of 32-bit elements: copying rows there is a plain copy, and R
// rows are R constant displacements from one pointer.
constexpr int kChunk = 256;

// How a format is read: 32-bit A elements against B elements.
enum class Format {
  kFloat,     // A float32, B float32 [k][16]
  kHalf,      // A float32, B float16 [k][16]
  kBfloat,    // A float32, B bfloat16 [k][16]
  kPairs,     // bfloat16 B [k / 2][16][2]; A float32, or pairs of bfloat16 where the CPU has their dot product (kDotPairs)
};

#if defined(ENGINERY_AVX512) && defined(__AVX512BF16__)
constexpr bool kDotPairs = true;
#else
constexpr bool kDotPairs = false;
#endif

// One step of A: how many 32-bit elements a step of B consumes.
constexpr int elements_per_step(Format format) { return format == Format::kPairs && !kDotPairs ? 2 : 1; }

struct Product {
  const void* a;        // chunked, see above
  const void* b;        // first panel
  ptrdiff_t b_step;     // B elements from one step to the next
  ptrdiff_t b_panel;    // B elements from one panel to the next
  int64_t steps;
  float* c;             // [R][kColumns], row stride c_row
  ptrdiff_t c_row;
  bool accumulate;      // the chains start from c instead of zero
};

using Micro = void (*)(const Product&);

// The inner loop for 1 ≤ rows ≤ kMaxRows.
Micro micro(Format format, int rows);

// rows split into the fewest tiles of at most kMaxRows, as even as can be.
struct Tiles {
  int64_t rows, count;
  explicit Tiles(int64_t rows) : rows(rows), count((rows + kMaxRows - 1) / kMaxRows) {}
  int64_t begin(int64_t tile) const { return rows * tile / count; }
  int size(int64_t tile) const { return int(begin(tile + 1) - begin(tile)); }
};

}  // namespace enginery
