// The one inner loop of every matrix product here: R rows of A times one or two vectors of sixteen columns of B.
//
// Law: element (r, c) of the result is the chain  x = fma(a[r][k], b[k][c], x)  for k = 0, 1, 2, ... in float32,
// whatever R is and wherever the row lies. No other order is ever taken, so a row's result does not depend on the rows
// beside it. A chain may be stored and taken up again, which is exact.
#pragma once

#include <cstddef>

#include "vec.h"

namespace enginery {

// Rows whose accumulators fit the registers beside the operands.
#if defined(ENGINERY_AVX512)
constexpr int kMaxRows = 14, kWideRows = 14;  // 28 accumulators, 2 operands, 1 broadcast of 32
#else
constexpr int kMaxRows = 6, kWideRows = 3;  // AVX2: 12 accumulators of two halves, operands, 1 broadcast of 16
#endif

// A is stored in chunks [ceil(elements / kChunk)][R][kChunk] of 32-bit elements: bringing rows there is a plain copy,
// and R rows are R constant displacements from one pointer.
constexpr int kChunk = 256;

// How B is read, and what an element of A is.
enum class Format {
  kFloat,   // B float32 [step][16]; A float32
  kHalf,    // B float16 [step][16]; A float32
  kBfloat,  // B bfloat16 [step][16]; A float32
  kPairs,   // B bfloat16 [step][16][2]; A float32, two a step, or pairs of bfloat16 where kDotPairs
};

#if defined(ENGINERY_AVX512) && defined(__AVX512BF16__)
constexpr bool kDotPairs = true;
#else
constexpr bool kDotPairs = false;
#endif

constexpr int elements_per_step(Format format) { return format == Format::kPairs && !kDotPairs ? 2 : 1; }

constexpr int bytes_per_column(Format format) { return format == Format::kHalf || format == Format::kBfloat ? 2 : 4; }

struct Product {
  const float* a;           // chunked; may start inside a chunk if the product ends there too
  const void* b;            // the first vector's first step
  ptrdiff_t b_step;         // columns of B from one step to the next
  ptrdiff_t b_vector;       // columns of B from one vector to the next
  int64_t steps;
  float* c;                 // [R][16 · vectors]
  ptrdiff_t c_row;
  bool accumulate;          // the chains start from c instead of zero
  const char* ahead;        // memory to prefetch, or null
  ptrdiff_t ahead_step;     // bytes of it for each step; up to two lines
};

// c = a · b for 1 ≤ rows ≤ kMaxRows and any number of vectors.
void multiply(Format format, int rows, int vectors, const Product& product);

// rows split into the fewest tiles of at most kMaxRows, as even as can be.
struct Tiles {
  int64_t rows, count;
  explicit Tiles(int64_t rows) : rows(rows), count((rows + kMaxRows - 1) / kMaxRows) {}
  int64_t begin(int64_t tile) const { return rows * tile / count; }
  int size(int64_t tile) const { return int(begin(tile + 1) - begin(tile)); }
};

}  // namespace enginery
