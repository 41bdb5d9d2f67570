// packed_linear: GotoBLAS's blocking (Goto & van de Geijn, 2008) with B packed once and for all, and no split of the depth:
// a tile's accumulators stay in registers from the first depth to the last, for one row as for two thousand.
#include <omp.h>

#include <algorithm>

#include "kernels.h"
#include "rows.h"
#include "scratch.h"

namespace enginery {
namespace {

constexpr int64_t kBlockBytes = 1 << 20;  // rows of A that stay in cache while all panels pass
constexpr int64_t kWidenFrom = 3;         // tiles that pay for widening a 16-bit panel to float32 once

// How T's weights are stored and fed to the inner loop.
template <class T>
struct Layout {
  static constexpr Format kFormat = Format::kFloat;
  static constexpr int kPair = 1;
  static constexpr bool kCopied = true;  // A elements are the input's own bits
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
        steps_((call.depth + kPair - 1) / kPair),
        elements_(steps_ * elements_per_step(Layout<T>::kFormat)),
        chunks_((elements_ + kChunk - 1) / kChunk),
        panels_((call.features + kLanes - 1) / kLanes),
        groups_((panels_ + kPanels - 1) / kPanels),
        tiles_(call.rows) {
    const int64_t tile_bytes = kMaxRows * chunks_ * kChunk * int64_t(sizeof(float));
    tiles_per_block_ = std::clamp<int64_t>(kBlockBytes / std::max<int64_t>(tile_bytes, 1), 1, tiles_.count);
    widened_ = !std::is_same_v<T, float> && !(kDotPairs && kPair == 2) && tiles_per_block_ >= kWidenFrom;
  }

  void run() {
    const size_t packed_bytes = round_up(tiles_per_block_ * kMaxRows * chunks_ * kChunk * sizeof(float), kLine);
    const size_t panel_bytes = widened_ ? kColumns * steps_ * kPair * sizeof(float) : 0;
    char* scratch = thread_scratch().reserve(packed_bytes + call_.threads * panel_bytes);
    float* packed = reinterpret_cast<float*>(scratch);
    const bool direct = call_.rows == 1 && Layout<T>::kCopied && call_.depth % kPair == 0;
#pragma omp parallel num_threads(call_.threads)
    {
      float* wide = reinterpret_cast<float*>(scratch + packed_bytes + omp_get_thread_num() * panel_bytes);
      for (int64_t first = 0; first < tiles_.count; first += tiles_per_block_) {
        const int64_t last = std::min(first + tiles_per_block_, tiles_.count);
        if (direct) {
          multiply(first, last, static_cast<const float*>(call_.input), wide);
        } else {
          pack(first, last, packed);
          multiply(first, last, packed, wide);
#pragma omp barrier
        }
      }
    }
  }

 private:
  static constexpr int kPair = Layout<T>::kPair;

  // Where a tile of the block lies in the packed rows.
  int64_t offset(int64_t first, int64_t tile) const { return (tiles_.begin(tile) - tiles_.begin(first)) * chunks_ * kChunk; }

  void pack(int64_t first, int64_t last, float* packed) const {
#pragma omp for schedule(static) collapse(2)
    for (int64_t tile = first; tile < last; ++tile)
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        const int rows = tiles_.size(tile);
        float* out = packed + offset(first, tile) + chunk * rows * kChunk;
        for (int r = 0; r < rows; ++r) {
          const T* row = static_cast<const T*>(call_.input) + (tiles_.begin(tile) + r) * call_.depth;
          pack_chunk(row, chunk, out + r * kChunk);
        }
      }
  }

  void pack_chunk(const T* row, int64_t chunk, float* out) const {
    if constexpr (std::is_same_v<T, bf16> && kDotPairs) {
      const int64_t begin = chunk * kChunk * 2, end = std::min(begin + kChunk * 2, call_.depth);
      std::memcpy(out, row + begin, (end - begin) * sizeof(T));
      if ((end - begin) % 2) reinterpret_cast<T*>(out)[end - begin] = T{0};
    } else {
      pack_row_chunk(row, call_.depth, elements_, chunk, out);
    }
  }

  // Each thread takes a contiguous range of (group of panels, tiles); a group's tiles are divided only where groups are few.
  void multiply(int64_t first, int64_t last, const float* packed, float* wide) const {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t parts = std::clamp<int64_t>(2 * threads / groups_, 1, last - first);
    const int64_t tasks = groups_ * parts;
    for (int64_t task = tasks * thread / threads; task < tasks * (thread + 1) / threads; ++task) {
      const int64_t group = task / parts, part = task % parts, count = last - first;
      multiply_group(group, first, first + count * part / parts, first + count * (part + 1) / parts, packed, wide);
    }
  }

  void multiply_group(int64_t group, int64_t first, int64_t begin, int64_t end, const float* packed, float* wide) const {
    const int64_t panel = group * kPanels, panel_elements = steps_ * kLanes * kPair;
    const T* panels = static_cast<const T*>(call_.panels) + panel * panel_elements;
    const bool whole = panel + kPanels <= panels_;
    float c[kMaxRows * kColumns];
    Product product{};
    Format format = Layout<T>::kFormat;
    product.b = panels;
    product.b_step = kLanes;
    product.b_panel = whole ? steps_ * kLanes : 0;  // a missing last panel repeats the one before; its columns are dropped
    product.steps = steps_;
    product.c = c;
    product.c_row = kColumns;
    if (widened_) {
      widen_panels(panels, whole ? kPanels : 1, wide);
      format = Format::kFloat;
      product.b = wide;
      product.b_panel *= kPair;
      product.steps *= kPair;
    }
    const int64_t column = group * kColumns, columns = std::min<int64_t>(kColumns, call_.features - column);
    const T* bias = call_.bias == nullptr ? nullptr : static_cast<const T*>(call_.bias) + column;
    for (int64_t tile = begin; tile < end; ++tile) {
      product.a = packed + offset(first, tile);
      micro(format, tiles_.size(tile))(product);
      for (int r = 0; r < tiles_.size(tile); ++r) {
        T* out = static_cast<T*>(call_.output) + (tiles_.begin(tile) + r) * call_.features + column;
        finish_row(c + r * kColumns, bias, columns, out);
      }
    }
  }

  void widen_panels(const T* panels, int count, float* wide) const {
    if constexpr (kPair == 1) {
      for (int64_t at = 0; at < count * steps_; ++at) store(wide + at * kLanes, load(panels + at * kLanes));
    } else {
      for (int64_t at = 0; at < count * steps_ * kLanes; ++at) {
        const int64_t step = at / kLanes, lane = at % kLanes;
        wide[(2 * step) * kLanes + lane] = widen(panels[2 * at]);
        wide[(2 * step + 1) * kLanes + lane] = widen(panels[2 * at + 1]);
      }
    }
  }

  const LinearCall& call_;
  int64_t steps_, elements_, chunks_, panels_, groups_;
  Tiles tiles_;
  int64_t tiles_per_block_;
  bool widened_;
};

template <class T>
void pack(const PackCall& call) {
  constexpr int kPair = Layout<T>::kPair;
  const int64_t steps = (call.depth + kPair - 1) / kPair, panels = (call.features + kLanes - 1) / kLanes;
  const T* weight = static_cast<const T*>(call.weight);
#pragma omp parallel for schedule(static) num_threads(call.threads)
  for (int64_t panel = 0; panel < panels; ++panel) {
    T* out = static_cast<T*>(call.panels) + panel * steps * kLanes * kPair;
    const int64_t rows = std::min<int64_t>(kLanes, call.features - panel * kLanes);
    for (int64_t step = 0; step < steps; ++step)
      for (int64_t lane = 0; lane < kLanes; ++lane)
        for (int64_t k = step * kPair; k < (step + 1) * kPair; ++k)
          *out++ = lane < rows && k < call.depth ? weight[(panel * kLanes + lane) * call.depth + k] : T{};
  }
}

template <class T>
void embed(const EmbeddingCall& call) {
  constexpr int kPair = Layout<T>::kPair;
#pragma omp parallel for schedule(static) num_threads(call.threads)
  for (int64_t i = 0; i < call.count; ++i) {
    const int64_t index = call.indices[i];
    const T* lane = static_cast<const T*>(call.panels) + index / kLanes * call.panel_elements + index % kLanes * kPair;
    T* out = static_cast<T*>(call.output) + i * call.features;
    for (int64_t k = 0; k < call.features; ++k) out[k] = lane[k / kPair * kPair * kLanes + k % kPair];
  }
}

}  // namespace

void packed_linear(const LinearCall& call) {
  switch (call.dtype) {
    case DType::kFloat32: return PackedLinear<float>(call).run();
    case DType::kBFloat16: return PackedLinear<bf16>(call).run();
    case DType::kFloat16: return PackedLinear<f16>(call).run();
  }
}

void pack_linear(const PackCall& call) {
  switch (call.dtype) {
    case DType::kFloat32: return pack<float>(call);
    case DType::kBFloat16: return pack<bf16>(call);
    case DType::kFloat16: return pack<f16>(call);
  }
}

void packed_embedding(const EmbeddingCall& call) {
  switch (call.dtype) {
    case DType::kFloat32: return embed<float>(call);
    case DType::kBFloat16: return embed<bf16>(call);
    case DType::kFloat16: return embed<f16>(call);
  }
}

}  // namespace enginery
