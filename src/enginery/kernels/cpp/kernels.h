// The kernels as plain C++: pointers, sizes and strides in elements, no torch. bind.cpp checks the arguments and calls
// these.
#pragma once

#include <cstddef>
#include <cstdint>

namespace enginery {

constexpr int kPanel = 32;  // PANEL of enginery/ops/linear.py

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// weight [features, depth] -> panels [ceil(features / 32)][ceil(depth / pair)][32][pair], pair = 2 for bfloat16, else
// 1.
struct PackCall {
  DType dtype;
  const void* weight;
  int64_t features, depth;
  void* panels;
  int threads;
};
void pack_linear(const PackCall& call);

// output [rows, features] = input [rows, depth] · weightᵀ + bias [features]
struct LinearCall {
  DType dtype;
  const void* input;
  int64_t rows, depth, features;
  const void* panels;
  const void* bias;  // or null
  void* output;
  int threads;
};
void packed_linear(const LinearCall& call);

// output [count, features] = rows of the packed weight; every index is inside the panels.
struct EmbeddingCall {
  DType dtype;
  const int64_t* indices;
  int64_t count, features, panel_elements;
  const void* panels;
  void* output;
  int threads;
};
void packed_embedding(const EmbeddingCall& call);

// output [rows, features]: row r goes through expert experts[r] of weight [E, features, depth] ([E, depth, features] if
// transposed).
struct ExpertCall {
  DType dtype;
  const void* input;
  int64_t rows, depth, features, expert_count;
  const void* weight;
  bool transposed;
  const int64_t* experts;  // each inside [0, expert_count)
  const void* bias;        // [E, features] or null
  void* output;
  int threads;
};
void expert_linear(const ExpertCall& call);

// [tokens, heads, size] with any strides but a contiguous last dimension.
struct Heads {
  const void* data;
  int64_t token, head;
};

// [blocks, heads, block_size, size], the same.
struct Cache {
  void* data;
  int64_t block, head, token;
};

// ops/paged_attention.py states the meaning. `attention` is the case of one sequence whose keys are one block.
struct AttentionCall {
  DType dtype;
  int64_t tokens, query_heads, kv_heads, key_size, value_size;
  Heads query, key, value;
  Cache key_cache, value_cache;
  int64_t block_size;
  const int64_t* slots;  // null: the caches are complete, nothing is written
  int64_t sequences;
  const int32_t* tables;
  int64_t table_stride;
  const int32_t* query_start;
  const int32_t* seq_lens;
  double scale;
  bool causal;
  int64_t window;        // INT64_MAX: none
  double softcap;        // 0: none
  const double* sinks;   // [query_heads] or null
  const double* slopes;  // [query_heads] or null
  void* output;          // [tokens, query_heads, value_size]
  int threads;
};
void attention(const AttentionCall& call);

}  // namespace enginery
