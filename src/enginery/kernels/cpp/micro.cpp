#include "micro.h"

#include <array>
#include <utility>

namespace enginery {
namespace {

constexpr int kPrefetch = 2048;  // bytes ahead of the B stream; crosses the page boundaries at which hardware stops

template <class T, int R>
struct Step {
  static constexpr int kElements = 1;
  static void run(Vec (&acc)[R][kPanels], const float* a, const T* b, ptrdiff_t b_panel) {
    Vec operand[kPanels];
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) operand[p] = load(b + p * b_panel);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec x = broadcast(a[r * kChunk]);
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) acc[r][p] = fma(x, operand[p], acc[r][p]);
    }
  }
};

struct Pair {
  bf16 even, odd;
};

template <int R>
struct Step<Pair, R> {
#if defined(ENGINERY_AVX512) && defined(__AVX512BF16__)
  // vdpbf16ps adds the two exact products one after the other in float32: as accurate as widening, at twice the rate.
  static constexpr int kElements = 1;
  static void run(Vec (&acc)[R][kPanels], const float* a, const Pair* b, ptrdiff_t b_panel) {
    __m512bh operand[kPanels];
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) operand[p] = (__m512bh)_mm512_loadu_si512(b + p * b_panel);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512bh x = (__m512bh)_mm512_set1_ps(a[r * kChunk]);
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) acc[r][p].part[0] = _mm512_dpbf16_ps(acc[r][p].part[0], operand[p], x);
    }
  }
#else
  static constexpr int kElements = 2;
  static void run(Vec (&acc)[R][kPanels], const float* a, const Pair* b, ptrdiff_t b_panel) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
      Vec even, odd;
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) {
        NativeBits bits;
        std::memcpy(&bits, b + p * b_panel + i * kWidth, sizeof(bits));
        even.part[i] = (Native)(bits << 16);
        odd.part[i] = (Native)(bits & 0xffff0000u);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][p] = fma(broadcast(a[r * kChunk]), even, acc[r][p]);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][p] = fma(broadcast(a[r * kChunk + 1]), odd, acc[r][p]);
    }
  }
#endif
};

template <class T, int R>
void run(const Product& product) {
  constexpr int kSteps = kChunk / Step<T, R>::kElements;
  Vec acc[R][kPanels];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p)
      acc[r][p] = product.accumulate ? load(product.c + r * product.c_row + p * kLanes) : broadcast(0.0f);
  const float* a = static_cast<const float*>(product.a);
  const T* b = static_cast<const T*>(product.b);
  const ptrdiff_t b_step = product.b_step, b_panel = product.b_panel;
  for (int64_t left = product.steps; left > 0; left -= kSteps, a += R * kChunk) {
    const float* row = a;
    const float* end = a + (left < kSteps ? left : kSteps) * Step<T, R>::kElements;
    for (; row < end; row += Step<T, R>::kElements, b += b_step) {
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) __builtin_prefetch((const char*)(b + p * b_panel) + kPrefetch);
      Step<T, R>::run(acc, row, b, b_panel);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) store(product.c + r * product.c_row + p * kLanes, acc[r][p]);
}

template <class T, size_t... I>
constexpr std::array<Micro, sizeof...(I)> table(std::index_sequence<I...>) {
  return {&run<T, int(I) + 1>...};
}

template <class T>
Micro choose(int rows) {
  static constexpr auto kTable = table<T>(std::make_index_sequence<kMaxRows>());
  return kTable[rows - 1];
}

}  // namespace

Micro micro(Format format, int rows) {
  switch (format) {
    case Format::kFloat: return choose<float>(rows);
    case Format::kHalf: return choose<f16>(rows);
    case Format::kBfloat: return choose<bf16>(rows);
    default: return choose<Pair>(rows);
  }
}

}  // namespace enginery
