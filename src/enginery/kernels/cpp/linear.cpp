// packed_linear: GotoBLAS's blocking (Goto & van de Geijn, 2008) with B packed once and for all. A group of kPanel
// columns is multiplied by all rows of a block before the next group, depth by depth, so that a piece of the group
// stays in the first cache while the tiles of rows pass, and the weights are read from memory once for each block of
// rows.
#include <omp.h>

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "rows.h"
#include "scratch.h"
#include "share.h"

namespace enginery {
namespace {

constexpr int kVectors = kPanel / kLanes;
constexpr int64_t kBlockBytes = 1 << 18;  // rows of A that stay in the second cache while all panels pass
constexpr int64_t kLeastTiles = 4;        // but so many of them in any case: each block reads all weights
constexpr int64_t kDepth = kChunk;        // steps of a panel that stay in the first cache while tiles pass
constexpr int64_t kAhead = 64;            // steps of a single tile's panel that are on their way from memory
constexpr int64_t kWidenFrom = 3;         // tiles that pay for widening a 16-bit panel to float32 once

// How T's weights are stored and fed to the inner loop.
template <class T>
struct Layout {
  static constexpr Format kFormat = Format::kFloat;
  static constexpr int kPair = 1;
  static constexpr bool kCopied = true;  // the elements of A are the input's own bits
};
template <>
struct Layout<f16> {
  static constexpr Format kFormat = Format::kHalf;
  static constexpr int kPair = 1;
  static constexpr bool kCopied = false;
};
template <>
struct Layout<bf16> {
  static constexpr Format kFormat = Format::kPairs;
  static constexpr int kPair = 2;
  static constexpr bool kCopied = kDotPairs;
};

template <class T>
class PackedLinear {
 public:
  explicit PackedLinear(const LinearCall& call)
      : call_(call),
        threads_(useful_threads(call.threads, estimate(call))),
        steps_((call.depth + kPair - 1) / kPair),
        elements_(steps_ * elements_per_step(Layout<T>::kFormat)),
        chunks_((elements_ + kChunk - 1) / kChunk),
        groups_((call.features + kPanel - 1) / kPanel),
        tiles_(call.rows) {
    const int64_t tile_bytes = kMaxRows * chunks_ * kChunk * int64_t(sizeof(float));
    const int64_t fitting = std::max(kLeastTiles, kBlockBytes / std::max<int64_t>(tile_bytes, 1));
    const int64_t shared = tiles_.count * groups_ / (2 * threads_);  // few panels: smaller blocks, more tasks
    tiles_per_block_ = std::clamp<int64_t>(std::min(fitting, shared), 1, tiles_.count);
    blocks_ = (tiles_.count + tiles_per_block_ - 1) / tiles_per_block_;
    widened_ = !Layout<T>::kCopied && tiles_per_block_ >= kWidenFrom;
  }

  // A task is a block of rows times a panel. Each thread packs the rows that it meets for itself: tasks follow one
  // another block by block, so little is packed twice and no thread ever waits for another.
  void run() {
    const int64_t block_rows = tiles_per_block_ * kMaxRows;
    const size_t packed = block_rows * chunks_ * kChunk, sums = block_rows * kPanel;
    const size_t wide = widened_ ? steps_ * kPair * kPanel : 0, own = packed + sums + wide;
    float* scratch = reinterpret_cast<float*>(thread_scratch().reserve(threads_ * own * sizeof(float)));
    SharedTasks tasks(blocks_ * groups_, threads_);
#pragma omp parallel num_threads(threads_)
    {
      float* memory = scratch + omp_get_thread_num() * own;
      int64_t packed_block = -1;
      for (int64_t task; (task = tasks.next(omp_get_thread_num())) >= 0;) {
        const int64_t block = task / groups_, group = task % groups_;
        const int64_t first = block * tiles_per_block_, last = std::min(first + tiles_per_block_, tiles_.count);
        const float* rows = memory;
        if (is_packed())
          rows = static_cast<const float*>(call_.input);
        else if (block != packed_block)
          pack(first, last, memory);
        packed_block = block;
        multiply_group(group, first, last, rows, memory + packed, memory + packed + sums);
        finish(group, first, last, memory + packed);
      }
    }
  }

 private:
  static constexpr int kPair = Layout<T>::kPair;

  static double estimate(const LinearCall& call) {
    const double elements = double(call.features) * call.depth;
    return std::max(elements * sizeof(T) / kBytesPerNanosecond, 2.0 * call.rows * elements / kOperationsPerNanosecond);
  }

  // One row whose elements are the format's is its own packed form.
  bool is_packed() const { return call_.rows == 1 && Layout<T>::kCopied && call_.depth % kPair == 0; }

  void pack(int64_t first, int64_t last, float* out) const {
    const T* input = static_cast<const T*>(call_.input);
    for (int64_t tile = first; tile < last; ++tile)
      for (int64_t chunk = 0; chunk < chunks_; ++chunk)
        for (int64_t row = tiles_.begin(tile); row < tiles_.begin(tile + 1); ++row, out += kChunk)
          pack_operand_chunk(input + row * call_.depth, call_.depth, elements_, chunk, out);
  }

  // sums [rows of the tiles][kPanel] = their products with one panel
  void multiply_group(int64_t group, int64_t begin, int64_t end, const float* packed, float* sums, float* wide) const {
    const T* panel = static_cast<const T*>(call_.panels) + group * steps_ * kPanel * kPair;
    if (widened_) {
      widen_panel(panel, wide);
      multiply_panel(Format::kFloat, steps_ * kPair, 1, wide, begin, end, packed, sums);
    } else {
      constexpr Format kFormat = Layout<T>::kFormat;
      multiply_panel(kFormat, steps_, elements_per_step(kFormat), panel, begin, end, packed, sums);
    }
  }

  void multiply_panel(Format format, int64_t steps, int elements, const void* panel, int64_t begin, int64_t end,
                      const float* packed, float* sums) const {
    const int64_t step_bytes = kPanel * bytes_per_column(format), tiles = end - begin;
    const int64_t depth = tiles == 1 ? steps : kDepth;
    Product product{};
    product.b_step = kPanel;
    product.b_vector = kLanes;
    product.c_row = kPanel;
    for (int64_t step = 0; step < steps; step += depth) {
      product.steps = std::min(depth, steps - step);
      product.b = static_cast<const char*>(panel) + step * step_bytes;
      product.accumulate = step > 0;
      // One tile runs after the stream of weights; several tiles fetch the next piece of it together.
      product.ahead_step = step_bytes / tiles;
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t row = tiles_.begin(tile) - tiles_.begin(begin), element = step * elements;
        const int rows = tiles_.size(tile);
        const int64_t piece = depth * (step_bytes + (tile - begin) * product.ahead_step);
        const int64_t lead = tiles == 1 ? kAhead * step_bytes : piece;
        product.ahead = static_cast<const char*>(product.b) + lead;
        product.a = packed + row * chunks_ * kChunk + element / kChunk * rows * kChunk + element % kChunk;
        product.c = sums + row * kPanel;
        multiply(format, rows, kVectors, product);
      }
    }
    if (steps == 0) std::memset(sums, 0, (tiles_.begin(end) - tiles_.begin(begin)) * kPanel * sizeof(float));
  }

  void finish(int64_t group, int64_t begin, int64_t end, const float* sums) const {
    const int64_t column = group * kPanel, columns = std::min<int64_t>(kPanel, call_.features - column);
    const T* bias = call_.bias == nullptr ? nullptr : static_cast<const T*>(call_.bias) + column;
    for (int64_t row = tiles_.begin(begin); row < tiles_.begin(end); ++row, sums += kPanel)
      finish_row(sums, bias, columns, static_cast<T*>(call_.output) + row * call_.features + column);
  }

  void widen_panel(const T* panel, float* wide) const {
    if constexpr (kPair == 1) {
      for (int64_t at = 0; at < steps_ * kPanel; at += kLanes) store(wide + at, load(panel + at));
    } else {
      for (int64_t step = 0; step < steps_; ++step)
        for (int64_t column = 0; column < kPanel; ++column)
          for (int64_t k = 0; k < kPair; ++k)
            wide[(step * kPair + k) * kPanel + column] = widen(panel[(step * kPanel + column) * kPair + k]);
    }
  }

  const LinearCall& call_;
  int threads_;
  int64_t steps_, elements_, chunks_, groups_;
  Tiles tiles_;
  int64_t tiles_per_block_, blocks_;
  bool widened_;
};

// float64 serves comparisons only: plain loops.
void multiply_doubles(const LinearCall& call) {
  const auto *input = static_cast<const double*>(call.input), *panels = static_cast<const double*>(call.panels);
  const auto* bias = static_cast<const double*>(call.bias);
#pragma omp parallel for schedule(static) num_threads(call.threads)
  for (int64_t row = 0; row < call.rows; ++row)
    for (int64_t column = 0; column < call.features; ++column) {
      const double* weight = panels + column / kPanel * call.depth * kPanel + column % kPanel;
      double sum = 0.0;
      for (int64_t k = 0; k < call.depth; ++k) sum += input[row * call.depth + k] * weight[k * kPanel];
      static_cast<double*>(call.output)[row * call.features + column] = sum + (bias == nullptr ? 0.0 : bias[column]);
    }
}

template <class T>
void pack(const PackCall& call) {
  constexpr int kPair = Layout<T>::kPair;
  const int64_t steps = (call.depth + kPair - 1) / kPair, panels = (call.features + kPanel - 1) / kPanel;
  const T* weight = static_cast<const T*>(call.weight);
#pragma omp parallel for schedule(static) num_threads(call.threads)
  for (int64_t panel = 0; panel < panels; ++panel) {
    T* out = static_cast<T*>(call.panels) + panel * steps * kPanel * kPair;
    const int64_t rows = std::min<int64_t>(kPanel, call.features - panel * kPanel);
    for (int64_t step = 0; step < steps; ++step)
      for (int64_t lane = 0; lane < kPanel; ++lane)
        for (int64_t k = step * kPair; k < (step + 1) * kPair; ++k)
          *out++ = lane < rows && k < call.depth ? weight[(panel * kPanel + lane) * call.depth + k] : T{};
  }
}

template <class T>
void embed(const EmbeddingCall& call) {
  constexpr int kPair = Layout<T>::kPair;
  const int threads = useful_threads(call.threads, double(call.count) * call.features);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < call.count; ++i) {
    const int64_t index = call.indices[i];
    const T* lane = static_cast<const T*>(call.panels) + index / kPanel * call.panel_elements + index % kPanel * kPair;
    T* out = static_cast<T*>(call.output) + i * call.features;
    for (int64_t k = 0; k < call.features; ++k) out[k] = lane[k / kPair * kPair * kPanel + k % kPair];
  }
}

}  // namespace

void packed_linear(const LinearCall& call) {
  switch (call.dtype) {
    case DType::kFloat32: return PackedLinear<float>(call).run();
    case DType::kBFloat16: return PackedLinear<bf16>(call).run();
    case DType::kFloat16: return PackedLinear<f16>(call).run();
    case DType::kFloat64: return multiply_doubles(call);
  }
}

void pack_linear(const PackCall& call) {
  switch (call.dtype) {
    case DType::kFloat32: return pack<float>(call);
    case DType::kBFloat16: return pack<bf16>(call);
    case DType::kFloat16: return pack<f16>(call);
    case DType::kFloat64: return pack<double>(call);
  }
}

void packed_embedding(const EmbeddingCall& call) {
  switch (call.dtype) {
    case DType::kFloat32: return embed<float>(call);
    case DType::kBFloat16: return embed<bf16>(call);
    case DType::kFloat16: return embed<f16>(call);
    case DType::kFloat64: return embed<double>(call);
  }
}

}  // namespace enginery
