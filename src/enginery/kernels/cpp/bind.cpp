// The ops of enginery/ops/ for the CPU dispatch key: checks of arguments, then the kernels.
//
// Bound through torch's stable ABI: its headers compile in one second (torch/library.h: five, torch/extension.h:
// thirty), and an AOTInductor region reaches these functions through the dispatcher without Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "kernels.h"
#include "vec.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name until torch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace enginery {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

#define CHECK(condition, ...) \
  if (!(condition)) fail(__VA_ARGS__)

int thread_count() {
  uint32_t count = 1;
  torch_get_num_threads(&count);
  return int(count);
}

DType dtype_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default: fail(op, ": takes float32, bfloat16, float16 or float64");
  }
}

void check_same(const char* op, const char* name, const Tensor& tensor, const Tensor& as) {
  CHECK(tensor.scalar_type() == as.scalar_type(), op, ": ", name, " has another dtype than the input");
}

void check_dims(const char* op, const char* name, const Tensor& tensor, int64_t dims) {
  CHECK(tensor.dim() == dims, op, ": ", name, " has ", tensor.dim(), " dimensions, not ", dims);
}

void check_type(const char* op, const char* name, const Tensor& tensor, ScalarType type, const char* type_name) {
  CHECK(tensor.scalar_type() == type, op, ": ", name, " must be ", type_name);
}

Tensor empty(const std::vector<int64_t>& sizes, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t at = sizes.size(); at-- > 1;) strides[at - 1] = strides[at] * std::max<int64_t>(sizes[at], 1);
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->data_ptr() : nullptr;
}

int64_t pair_of(DType dtype) { return dtype == DType::kBFloat16 ? 2 : 1; }

// ---- linear ----

Tensor bound_pack_linear(Tensor weight) {
  const char* op = "pack_linear";
  const DType dtype = dtype_of(op, weight);
  check_dims(op, "weight", weight, 2);
  weight = dense(weight);
  const int64_t features = weight.size(0), depth = weight.size(1), pair = pair_of(dtype);
  const int64_t count = (features + kPanel - 1) / kPanel, steps = (depth + pair - 1) / pair;
  Tensor panels = empty({count, steps, kPanel, pair}, weight);
  pack_linear({dtype, weight.data_ptr(), features, depth, panels.data_ptr(), thread_count()});
  return panels;
}

void check_panels(const char* op, const Tensor& weight, DType dtype, int64_t depth) {
  check_dims(op, "packed weight", weight, 4);
  const int64_t pair = pair_of(dtype), steps = (depth + pair - 1) / pair;
  CHECK(weight.size(2) == kPanel && weight.size(3) == pair, op,
        ": the weight is not packed for its dtype; use pack_linear");
  CHECK(weight.size(1) == steps, op, ": the packed weight has depth ", weight.size(1) * pair, ", the input ", depth);
  CHECK(weight.is_contiguous(), op, ": the packed weight must be contiguous");
}

Tensor bound_packed_linear(Tensor input, Tensor weight, int64_t out_features, std::optional<Tensor> bias) {
  const char* op = "packed_linear";
  const DType dtype = dtype_of(op, input);
  check_same(op, "weight", weight, input);
  CHECK(input.dim() >= 1, op, ": the input has no dimension");
  const int64_t depth = input.size(-1), panels = (out_features + kPanel - 1) / kPanel;
  check_panels(op, weight, dtype, depth);
  CHECK(out_features >= 0 && weight.size(0) == panels, op, ": ", out_features, " outputs need ", panels,
        " panels, the weight has ", weight.size(0));
  if (bias.has_value()) {
    check_same(op, "bias", *bias, input);
    CHECK(bias->dim() == 1 && bias->size(0) == out_features, op, ": bias must have ", out_features, " elements");
  }
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  int64_t rows = 1;
  for (size_t at = 0; at + 1 < sizes.size(); ++at) rows *= sizes[at];
  sizes.back() = out_features;
  Tensor output = empty(sizes, input);
  if (rows == 0 || out_features == 0) return output;
  input = dense(input);
  bias = dense(bias);
  packed_linear({dtype, input.data_ptr(), rows, depth, out_features, weight.data_ptr(), data_or_null(bias),
                 output.data_ptr(), thread_count()});
  return output;
}

Tensor bound_packed_embedding(Tensor indices, Tensor weight, int64_t features) {
  const char* op = "packed_embedding";
  const DType dtype = dtype_of(op, weight);
  check_type(op, "indices", indices, ScalarType::Long, "int64");
  check_panels(op, weight, dtype, features);
  indices = dense(indices);
  const int64_t count = indices.numel(), limit = weight.size(0) * kPanel;
  const int64_t* data = static_cast<const int64_t*>(indices.data_ptr());
  for (int64_t at = 0; at < count; ++at)
    CHECK(data[at] >= 0 && data[at] < limit, op, ": index ", data[at], " is outside [0, ", limit, ")");
  std::vector<int64_t> sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.push_back(features);
  Tensor output = empty(sizes, weight);
  const int64_t panel = weight.size(1) * kPanel * weight.size(3);
  packed_embedding({dtype, data, count, features, panel, weight.data_ptr(), output.data_ptr(), thread_count()});
  return output;
}

// ---- experts ----

Tensor bound_expert_linear(Tensor input, Tensor weight, Tensor experts, std::optional<Tensor> bias, bool transposed) {
  const char* op = "expert_linear";
  const DType dtype = dtype_of(op, input);
  check_same(op, "weight", weight, input);
  check_dims(op, "input", input, 2);
  check_dims(op, "weight", weight, 3);
  check_dims(op, "experts", experts, 1);
  check_type(op, "experts", experts, ScalarType::Long, "int64");
  const int64_t rows = input.size(0), depth = input.size(1), count = weight.size(0);
  const int64_t features = weight.size(transposed ? 2 : 1);
  CHECK(weight.size(transposed ? 1 : 2) == depth, op, ": the weight's depth is not the input's ", depth);
  CHECK(experts.size(0) == rows, op, ": ", experts.size(0), " experts for ", rows, " rows");
  if (bias.has_value()) {
    check_same(op, "bias", *bias, input);
    CHECK(bias->dim() == 2 && bias->size(0) == count && bias->size(1) == features, op, ": bias must be [", count, ", ",
          features, "]");
  }
  input = dense(input);
  weight = dense(weight);
  experts = dense(experts);
  bias = dense(bias);
  const int64_t* chosen = static_cast<const int64_t*>(experts.data_ptr());
  for (int64_t row = 0; row < rows; ++row)
    CHECK(chosen[row] >= 0 && chosen[row] < count, op, ": expert ", chosen[row], " is outside [0, ", count, ")");
  Tensor output = empty({rows, features}, input);
  if (rows == 0 || features == 0) return output;
  expert_linear({dtype, input.data_ptr(), rows, depth, features, count, weight.data_ptr(), transposed, chosen,
                 data_or_null(bias), output.data_ptr(), thread_count()});
  return output;
}

// ---- attention ----

Tensor dense_heads(const char* op, const char* name, const Tensor& tensor, const Tensor& query) {
  check_dims(op, name, tensor, 3);
  check_same(op, name, tensor, query);
  return tensor.stride(2) == 1 || tensor.size(2) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

Heads heads(const Tensor& tensor) { return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1)}; }

// One number for each query head.
std::vector<double> per_head(const char* op, const char* name, const std::optional<Tensor>& tensor, int64_t heads) {
  std::vector<double> values;
  if (!tensor.has_value()) return values;
  CHECK(tensor->dim() == 1 && tensor->size(0) == heads, op, ": ", name, " must have one element for each of the ", heads,
        " query heads");
  const DType dtype = dtype_of(op, *tensor);
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t at = head * tensor->stride(0);
    switch (dtype) {
      case DType::kFloat32: values.push_back(static_cast<const float*>(tensor->data_ptr())[at]); break;
      case DType::kBFloat16: values.push_back(widen(static_cast<const bf16*>(tensor->data_ptr())[at])); break;
      case DType::kFloat16: values.push_back(widen(static_cast<const f16*>(tensor->data_ptr())[at])); break;
      case DType::kFloat64: values.push_back(static_cast<const double*>(tensor->data_ptr())[at]); break;
    }
  }
  return values;
}

// What both attentions share; `sinks` and `slopes` outlive the call.
AttentionCall common(const char* op, const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                     std::optional<int64_t> window, std::optional<double> softcap, const std::vector<double>& sinks,
                     const std::vector<double>& slopes) {
  AttentionCall call{};
  call.dtype = dtype_of(op, query);
  call.tokens = query.size(0);
  call.query_heads = query.size(1);
  call.kv_heads = key.size(1);
  call.key_size = query.size(2);
  call.value_size = value.size(2);
  CHECK(key.size(0) == call.tokens && value.size(0) == call.tokens, op,
        ": query, key and value must have as many tokens");
  CHECK(value.size(1) == call.kv_heads, op, ": key has ", call.kv_heads, " heads, value ", value.size(1));
  CHECK(call.kv_heads > 0 && call.query_heads % call.kv_heads == 0, op, ": ", call.query_heads,
        " query heads are no multiple of ", call.kv_heads, " key heads");
  CHECK(key.size(2) == call.key_size, op, ": query has size ", call.key_size, " per head, key ", key.size(2));
  CHECK(!window.has_value() || *window >= 1, op, ": window must be at least 1");
  CHECK(!softcap.has_value() || *softcap > 0, op, ": softcap must be positive");
  call.query = heads(query);
  call.key = heads(key);
  call.value = heads(value);
  call.scale = scale;
  call.window = window.value_or(INT64_MAX);
  call.softcap = softcap.value_or(0.0);
  call.sinks = sinks.empty() ? nullptr : sinks.data();
  call.slopes = slopes.empty() ? nullptr : slopes.data();
  call.threads = thread_count();
  return call;
}

Tensor bound_attention(Tensor query, Tensor key, Tensor value, double scale, bool causal, std::optional<int64_t> window,
                       std::optional<double> softcap, std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes) {
  const char* op = "attention";
  query = dense_heads(op, "query", query, query);
  key = dense_heads(op, "key", key, query);
  value = dense_heads(op, "value", value, query);
  const auto sink_values = per_head(op, "sinks", sinks, query.size(1));
  const auto slopes = per_head(op, "alibi_slopes", alibi_slopes, query.size(1));
  AttentionCall call = common(op, query, key, value, scale, window, softcap, sink_values, slopes);
  CHECK(call.tokens <= INT32_MAX, op, ": too many tokens");
  Tensor output = empty({call.tokens, call.query_heads, call.value_size}, query);
  if (output.numel() == 0) return output;
  const int32_t table = 0, starts[2] = {0, int32_t(call.tokens)}, length = int32_t(call.tokens);
  call.key_cache = {key.data_ptr(), 0, call.key.head, call.key.token};
  call.value_cache = {value.data_ptr(), 0, call.value.head, call.value.token};
  call.block_size = call.tokens;
  call.sequences = 1;
  call.tables = &table;
  call.query_start = starts;
  call.seq_lens = &length;
  call.causal = causal;
  call.output = output.data_ptr();
  attention(call);
  return output;
}

Cache cache(const char* op, const char* name, const Tensor& pool, const Tensor& query, int64_t heads, int64_t size) {
  check_dims(op, name, pool, 4);
  check_same(op, name, pool, query);
  CHECK(pool.size(1) == heads && pool.size(3) == size, op, ": ", name, " must be [blocks, ", heads, ", block_size, ",
        size, "]");
  CHECK(pool.stride(3) == 1 || size <= 1, op, ": the last dimension of ", name, " must be contiguous");
  return {pool.data_ptr(), pool.stride(0), pool.stride(1), pool.stride(2)};
}

const int32_t* int32_data(const char* op, const char* name, const Tensor& tensor) {
  check_type(op, name, tensor, ScalarType::Int, "int32");
  CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
  return static_cast<const int32_t*>(tensor.data_ptr());
}

// Every slot, length and block id that the kernel will follow; a wrong one is an error, never a stray write.
void check_batch(const char* op, const AttentionCall& call, int64_t blocks, int64_t table_width) {
  for (int64_t token = 0; token < call.tokens; ++token)
    CHECK(call.slots[token] < blocks * call.block_size, op, ": slot ", call.slots[token], " is outside the cache of ",
          blocks * call.block_size, " slots");
  int64_t previous = call.sequences > 0 ? call.query_start[0] : 0;
  CHECK(previous >= 0, op, ": query_start is negative");
  for (int64_t sequence = 0; sequence < call.sequences; ++sequence) {
    const int64_t end = call.query_start[sequence + 1], count = end - previous, length = call.seq_lens[sequence];
    CHECK(count >= 0 && end <= call.tokens, op, ": query_start must rise and stay within ", call.tokens, " tokens");
    previous = end;
    if (count == 0) continue;
    CHECK(length >= count, op, ": sequence ", sequence, " has ", count, " new tokens but length ", length);
    CHECK(length <= table_width * call.block_size, op, ": sequence ", sequence, " of length ", length,
          " exceeds its table of ", table_width, " blocks");
    const int64_t position = length - count, first = call.window > position ? 0 : position - call.window + 1;
    for (int64_t block = first / call.block_size; block * call.block_size < length; ++block) {
      const int32_t id = call.tables[sequence * call.table_stride + block];
      CHECK(id >= 0 && id < blocks, op, ": block ", id, " of sequence ", sequence, " is outside the cache of ", blocks,
            " blocks");
    }
  }
}

Tensor bound_paged_attention(Tensor query, Tensor key, Tensor value, Tensor key_cache, Tensor value_cache,
                             Tensor slot_mapping, Tensor block_tables, Tensor query_start, Tensor seq_lens,
                             double scale, std::optional<int64_t> window, std::optional<double> softcap,
                             std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes) {
  const char* op = "paged_attention";
  query = dense_heads(op, "query", query, query);
  key = dense_heads(op, "key", key, query);
  value = dense_heads(op, "value", value, query);
  const auto sink_values = per_head(op, "sinks", sinks, query.size(1));
  const auto slopes = per_head(op, "alibi_slopes", alibi_slopes, query.size(1));
  AttentionCall call = common(op, query, key, value, scale, window, softcap, sink_values, slopes);
  call.key_cache = cache(op, "key_cache", key_cache, query, call.kv_heads, call.key_size);
  call.value_cache = cache(op, "value_cache", value_cache, query, call.kv_heads, call.value_size);
  call.block_size = key_cache.size(2);
  CHECK(value_cache.size(0) == key_cache.size(0) && value_cache.size(2) == call.block_size, op,
        ": the caches have different blocks");
  CHECK(call.block_size > 0, op, ": blocks are empty");
  check_type(op, "slot_mapping", slot_mapping, ScalarType::Long, "int64");
  CHECK(slot_mapping.dim() == 1 && slot_mapping.size(0) == call.tokens, op, ": slot_mapping must have ", call.tokens,
        " elements");
  slot_mapping = dense(slot_mapping);
  check_dims(op, "block_tables", block_tables, 2);
  block_tables = dense(block_tables);
  query_start = dense(query_start);
  seq_lens = dense(seq_lens);
  call.sequences = block_tables.size(0);
  CHECK(seq_lens.dim() == 1 && seq_lens.size(0) == call.sequences, op, ": seq_lens must have ", call.sequences,
        " elements");
  CHECK(query_start.dim() == 1 && query_start.size(0) == call.sequences + 1, op, ": query_start must have ",
        call.sequences + 1, " elements");
  call.slots = static_cast<const int64_t*>(slot_mapping.data_ptr());
  call.tables = int32_data(op, "block_tables", block_tables);
  call.table_stride = block_tables.size(1);
  call.query_start = int32_data(op, "query_start", query_start);
  call.seq_lens = int32_data(op, "seq_lens", seq_lens);
  check_batch(op, call, key_cache.size(0), block_tables.size(1));
  call.causal = true;
  Tensor output = empty({call.tokens, call.query_heads, call.value_size}, query);
  call.output = output.data_ptr();
  if (call.tokens > 0) attention(call);
  return output;
}

}  // namespace
}  // namespace enginery

STABLE_TORCH_LIBRARY_IMPL(enginery, CPU, m) {
  m.impl("pack_linear", TORCH_BOX(&enginery::bound_pack_linear));
  m.impl("packed_linear", TORCH_BOX(&enginery::bound_packed_linear));
  m.impl("packed_embedding", TORCH_BOX(&enginery::bound_packed_embedding));
  m.impl("expert_linear", TORCH_BOX(&enginery::bound_expert_linear));
  m.impl("attention", TORCH_BOX(&enginery::bound_attention));
  m.impl("paged_attention", TORCH_BOX(&enginery::bound_paged_attention));
}
