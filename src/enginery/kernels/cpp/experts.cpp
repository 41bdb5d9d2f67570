// expert_linear: rows are sorted by expert; each expert's weight is packed panel by panel on the way, read once.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "rows.h"
#include "scratch.h"
#include "share.h"

namespace enginery {
namespace {

template <class T>
class ExpertLinear {
 public:
  explicit ExpertLinear(const ExpertCall& call)
      : call_(call),
        threads_(useful_threads(call.threads, estimate(call))),
        chunks_((call.depth + kChunk - 1) / kChunk),
        groups_((call.features + kPanel - 1) / kPanel),
        starts_(call.expert_count + 1),
        order_(call.rows) {
    for (int64_t row = 0; row < call.rows; ++row) ++starts_[call.experts[row] + 1];
    for (int64_t expert = 0; expert < call.expert_count; ++expert) starts_[expert + 1] += starts_[expert];
    std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
    for (int64_t row = 0; row < call.rows; ++row) order_[next[call.experts[row]]++] = row;
  }

  void run() {
    int64_t most = 0;
    for (int64_t expert = 0; expert < call_.expert_count; ++expert)
      most = std::max(most, starts_[expert + 1] - starts_[expert]);
    const size_t packed_bytes = round_up(most * chunks_ * kChunk * sizeof(float), kLine);
    const size_t panel_bytes = kPanel * call_.depth * sizeof(float);
    char* scratch = thread_scratch().reserve(packed_bytes + threads_ * panel_bytes);
    float* packed = reinterpret_cast<float*>(scratch);
#pragma omp parallel num_threads(threads_)
    {
      float* panels = reinterpret_cast<float*>(scratch + packed_bytes + omp_get_thread_num() * panel_bytes);
      for (int64_t expert = 0; expert < call_.expert_count; ++expert) {
        const Tiles tiles(starts_[expert + 1] - starts_[expert]);
        if (tiles.rows == 0) continue;
        const int64_t* rows = order_.data() + starts_[expert];
        pack_rows(tiles, rows, packed);
#pragma omp for schedule(static)
        for (int64_t group = 0; group < groups_; ++group) multiply_group(expert, group, tiles, rows, packed, panels);
      }
    }
  }

 private:
  static double estimate(const ExpertCall& call) {
    const double elements = double(call.features) * call.depth;
    const double weights = elements * sizeof(T) * std::min(call.rows, call.expert_count) / kBytesPerNanosecond;
    return std::max(weights, 2.0 * call.rows * elements / kOperationsPerNanosecond);
  }

  void pack_rows(const Tiles& tiles, const int64_t* rows, float* packed) const {
#pragma omp for schedule(static) collapse(2)
    for (int64_t tile = 0; tile < tiles.count; ++tile)
      for (int64_t chunk = 0; chunk < chunks_; ++chunk)
        for (int r = 0; r < tiles.size(tile); ++r) {
          const T* row = static_cast<const T*>(call_.input) + rows[tiles.begin(tile) + r] * call_.depth;
          float* out = packed + tiles.begin(tile) * chunks_ * kChunk + (chunk * tiles.size(tile) + r) * kChunk;
          pack_row_chunk(row, call_.depth, call_.depth, chunk, out);
        }
  }

  void multiply_group(int64_t expert, int64_t group, const Tiles& tiles, const int64_t* rows, const float* packed,
                      float* panels) const {
    const int64_t column = group * kPanel, columns = std::min<int64_t>(kPanel, call_.features - column);
    for (int64_t at = 0; at < columns; at += kLanes) pack_panel(expert, column + at, panels + at * call_.depth);
    float c[kMaxRows * kPanel];
    Product product{};
    product.b = panels;
    product.b_step = kLanes;
    product.b_vector = call_.depth * kLanes;
    product.steps = call_.depth;
    product.c = c;
    product.c_row = kPanel;
    const T* biases = static_cast<const T*>(call_.bias);
    const T* bias = biases == nullptr ? nullptr : biases + expert * call_.features + column;
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      product.a = packed + tiles.begin(tile) * chunks_ * kChunk;
      multiply(Format::kFloat, tiles.size(tile), int(columns + kLanes - 1) / kLanes, product);
      for (int r = 0; r < tiles.size(tile); ++r) {
        T* out = static_cast<T*>(call_.output) + rows[tiles.begin(tile) + r] * call_.features + column;
        finish_row(c + r * kPanel, bias, columns, out);
      }
    }
  }

  // Sixteen outputs of one expert as a float32 panel [depth][16]; missing outputs repeat the last one and are dropped
  // later.
  void pack_panel(int64_t expert, int64_t column, float* panel) const {
    const T* weight = static_cast<const T*>(call_.weight) + expert * call_.features * call_.depth;
    const int count = int(std::min<int64_t>(kLanes, call_.features - column));
    if (call_.transposed) {
      for (int64_t k = 0; k < call_.depth; ++k)
        for (int lane = 0; lane < kLanes; ++lane)
          panel[k * kLanes + lane] = lane < count ? widen(weight[k * call_.features + column + lane]) : 0.0f;
    } else {
      const T* rows[kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        rows[lane] = weight + (column + std::min(lane, count - 1)) * call_.depth;
      transpose_panel(rows, call_.depth, panel);
    }
  }

  const ExpertCall& call_;
  int threads_;
  int64_t chunks_, groups_;
  std::vector<int64_t> starts_, order_;
};

// float64 serves comparisons only: plain loops.
void multiply_doubles(const ExpertCall& call) {
  const auto *input = static_cast<const double*>(call.input), *bias = static_cast<const double*>(call.bias);
  const int64_t k_stride = call.transposed ? call.features : 1, column_stride = call.transposed ? 1 : call.depth;
#pragma omp parallel for schedule(static) num_threads(call.threads)
  for (int64_t row = 0; row < call.rows; ++row)
    for (int64_t column = 0; column < call.features; ++column) {
      const int64_t expert = call.experts[row];
      const double* weights = static_cast<const double*>(call.weight) + expert * call.features * call.depth;
      const double* weight = weights + column * column_stride;
      double sum = bias == nullptr ? 0.0 : bias[expert * call.features + column];
      for (int64_t k = 0; k < call.depth; ++k) sum += input[row * call.depth + k] * weight[k * k_stride];
      static_cast<double*>(call.output)[row * call.features + column] = sum;
    }
}

}  // namespace

void expert_linear(const ExpertCall& call) {
  switch (call.dtype) {
    case DType::kFloat32: return ExpertLinear<float>(call).run();
    case DType::kBFloat16: return ExpertLinear<bf16>(call).run();
    case DType::kFloat16: return ExpertLinear<f16>(call).run();
    case DType::kFloat64: return multiply_doubles(call);
  }
}

}  // namespace enginery
