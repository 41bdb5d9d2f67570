#include "micro.h"

#include <array>
#include <utility>

namespace enginery {
namespace {

// One step for R rows and V vectors; unrolled completely, the accumulators never leave the registers.
template <class T, int R, int V>
struct Step {
  static constexpr int kElements = 1;
  static void run(Vec (&acc)[R][V], const float* a, const T* b, ptrdiff_t b_vector) {
    Vec operand[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) operand[v] = load(b + v * b_vector);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec x = broadcast(a[r * kChunk]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] = fma(x, operand[v], acc[r][v]);
    }
  }
};

struct Pair {
  bf16 even, odd;
};

template <int R, int V>
struct Step<Pair, R, V> {
#if defined(ENGINERY_AVX512) && defined(__AVX512BF16__)
  // vdpbf16ps adds the two exact products one after the other in float32: as accurate as widening, at twice the rate.
  static constexpr int kElements = 1;
  static void run(Vec (&acc)[R][V], const float* a, const Pair* b, ptrdiff_t b_vector) {
    __m512bh operand[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) operand[v] = (__m512bh)_mm512_loadu_si512(b + v * b_vector);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512bh x = (__m512bh)_mm512_set1_ps(a[r * kChunk]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v].part[0] = _mm512_dpbf16_ps(acc[r][v].part[0], operand[v], x);
    }
  }
#else
  static constexpr int kElements = 2;
  static void run(Vec (&acc)[R][V], const float* a, const Pair* b, ptrdiff_t b_vector) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      Vec even, odd;
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) {
        NativeBits bits;
        std::memcpy(&bits, b + v * b_vector + i * kWidth, sizeof(bits));
        even.part[i] = (Native)(bits << 16);
        odd.part[i] = (Native)(bits & 0xffff0000u);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][v] = fma(broadcast(a[r * kChunk]), even, acc[r][v]);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][v] = fma(broadcast(a[r * kChunk + 1]), odd, acc[r][v]);
    }
  }
#endif
};

template <class T, int R, int V>
void run(const Product& product) {
  constexpr int kElements = Step<T, R, V>::kElements, kSteps = kChunk / kElements;
  const ptrdiff_t b_step = product.b_step, b_vector = product.b_vector, c_row = product.c_row;
  const ptrdiff_t ahead_step = product.ahead_step, ahead_second = ahead_step > 64 ? 64 : 0;
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      acc[r][v] = product.accumulate ? load(product.c + r * c_row + v * kLanes) : broadcast(0.0f);
  const float* a = product.a;
  const T* b = static_cast<const T*>(product.b);
  const char* ahead = product.ahead;
  for (int64_t left = product.steps; left > 0; left -= kSteps, a += R * kChunk) {
    const float* end = a + (left < kSteps ? left : kSteps) * kElements;
    for (const float* row = a; row < end; row += kElements, b += b_step, ahead += ahead_step) {
      __builtin_prefetch(ahead, 0, 0);  // weights pass once: not through the second cache
      __builtin_prefetch(ahead + ahead_second, 0, 0);
      Step<T, R, V>::run(acc, row, b, b_vector);
    }
  }
  float* c = product.c;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(c + r * c_row + v * kLanes, acc[r][v]);
}

using Micro = void (*)(const Product&);

template <class T, int V, size_t... I>
constexpr std::array<Micro, sizeof...(I)> table(std::index_sequence<I...>) {
  return {&run<T, int(I) + 1, V>...};
}

template <class T>
Micro choose(int rows, int vectors) {
  static constexpr auto kOne = table<T, 1>(std::make_index_sequence<kMaxRows>());
  static constexpr auto kTwo = table<T, 2>(std::make_index_sequence<kWideRows>());
  return vectors == 2 ? kTwo[rows - 1] : kOne[rows - 1];
}

Micro choose(Format format, int rows, int vectors) {
  switch (format) {
    case Format::kFloat: return choose<float>(rows, vectors);
    case Format::kHalf: return choose<f16>(rows, vectors);
    case Format::kBfloat: return choose<bf16>(rows, vectors);
    default: return choose<Pair>(rows, vectors);
  }
}

}  // namespace

void multiply(Format format, int rows, int vectors, const Product& product) {
  Product part = product;
  // The inner loop always prefetches; what is at hand already costs it nothing.
  if (part.ahead == nullptr) part.ahead = reinterpret_cast<const char*>(product.c);
  for (int vector = 0; vector < vectors;) {
    const int count = rows <= kWideRows && vectors - vector >= 2 ? 2 : 1;
    part.b = static_cast<const char*>(product.b) + vector * product.b_vector * bytes_per_column(format);
    part.c = product.c + vector * kLanes;
    choose(format, rows, count)(part);
    vector += count;
  }
}

}  // namespace enginery
