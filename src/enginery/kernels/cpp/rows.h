// Rows into the chunked layout of A, and finished tiles out of it.
#pragma once

#include <cstring>
#include <type_traits>

#include "micro.h"

namespace enginery {

// One row's elements [begin, end) of a chunk, widened to float32.
template <class T>
inline void copy_chunk(const T* row, int64_t begin, int64_t end, float* out) {
  int64_t at = begin;
  for (; at + kLanes <= end; at += kLanes, out += kLanes) store(out, load(row + at));
  for (; at < end; ++at) *out++ = widen(row[at]);
}

inline void copy_chunk(const float* row, int64_t begin, int64_t end, float* out) {
  std::memcpy(out, row + begin, (end - begin) * sizeof(float));
}

// One row's chunk as float32; `elements` may exceed `depth` by the padding, which is zero.
template <class T>
inline void pack_row_chunk(const T* row, int64_t depth, int64_t elements, int64_t chunk, float* out) {
  const int64_t begin = chunk * kChunk, end = begin + kChunk < depth ? begin + kChunk : depth;
  copy_chunk(row, begin, end, out);
  const int64_t limit = begin + kChunk < elements ? begin + kChunk : elements;
  for (int64_t at = end; at < limit; ++at) out[at - begin] = 0.0f;
}

// One row's chunk as the format of T's packed weights takes it: bfloat16 pairs stay as they are where the CPU
// multiplies them.
template <class T>
inline void pack_operand_chunk(const T* row, int64_t depth, int64_t elements, int64_t chunk, float* out) {
  if constexpr (std::is_same_v<T, bf16> && kDotPairs) {
    const int64_t begin = chunk * kChunk * 2, end = begin + kChunk * 2 < depth ? begin + kChunk * 2 : depth;
    std::memcpy(out, row + begin, (end - begin) * sizeof(T));
    if ((end - begin) % 2) reinterpret_cast<T*>(out)[end - begin] = T{0};
  } else {
    pack_row_chunk(row, depth, elements, chunk, out);
  }
}

// Sixteen rows as one vector of that format: [count][16] float32, or [ceil(count / 2)][16] pairs of bfloat16.
template <class T>
inline void pack_columns(const T* const* rows, int64_t count, float* out) {
  if constexpr (std::is_same_v<T, bf16>) {
    const float* pairs[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) pairs[lane] = reinterpret_cast<const float*>(rows[lane]);
    transpose_panel(pairs, count / 2, out);
    if (count % 2 == 0) return;
    float* last = out + count / 2 * kLanes;
    for (int lane = 0; lane < kLanes; ++lane) last[lane] = bits_to_float(rows[lane][count - 1].bits);
  } else {
    transpose_panel(rows, count, out);
  }
}

// c + bias -> out; `count` elements, c padded to whole vectors.
template <class T>
inline void finish_row(const float* c, const T* bias, int64_t count, T* out) {
  for (int64_t at = 0; at < count; at += kLanes) {
    const int left = count - at < kLanes ? int(count - at) : kLanes;
    Vec value = load(c + at);
    if (bias != nullptr) {
      if (left == kLanes) {
        value = add(value, load(bias + at));
      } else {
        T padded[kLanes] = {};
        std::memcpy(padded, bias + at, left * sizeof(T));
        value = add(value, load(padded));
      }
    }
    if (left == kLanes)
      store(out + at, value);
    else
      store_first(out + at, value, left);
  }
}

}  // namespace enginery
