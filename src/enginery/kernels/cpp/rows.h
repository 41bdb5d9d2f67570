// Rows into the chunked layout of A, and finished tiles out of it.
#pragma once

#include <cstring>

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
