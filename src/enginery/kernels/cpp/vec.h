// Sixteen float32 lanes on any CPU: one AVX-512 register, two of AVX2, four of 128 bits elsewhere (GCC/Clang vector
// extensions).
//
// Every kernel computes through these functions, so that one output element sees one sequence of roundings, however
// many rows or threads take part: that is the law of batch invariance (see micro.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace enginery {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define ENGINERY_AVX512 1
constexpr int kWidth = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define ENGINERY_AVX2 1
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

constexpr int kLanes = 16;
constexpr int kParts = kLanes / kWidth;

// 16-bit elements are carried as their bits.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

typedef float Native __attribute__((vector_size(4 * kWidth)));
typedef int32_t NativeInt __attribute__((vector_size(4 * kWidth)));
typedef uint32_t NativeBits __attribute__((vector_size(4 * kWidth)));
typedef uint16_t NativeShort __attribute__((vector_size(2 * kWidth)));

struct Vec {
  Native part[kParts];
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float widen(float value) { return value; }

inline float widen(bf16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

inline float widen(f16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  // 2^112 moves the exponent from bias 15 to 127; subnormals come out exact, infinity and NaN need the top exponent.
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000u);
  const uint32_t special = (value.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return bits_to_float(float_to_bits(scaled) | special | sign);
#endif
}

inline void narrow(float value, float* out) { *out = value; }

// Round to nearest, ties to even; a NaN stays a NaN.
inline void narrow(float value, bf16* out) {
  const uint32_t bits = float_to_bits(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = nan ? uint16_t((bits >> 16) | 0x40) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void narrow(float value, f16* out) {
#if defined(__F16C__)
  out->bits = uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = float_to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // subnormal: let the addition of 0.5 do the rounding
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  } else {
    half = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = uint16_t(half | ((bits >> 16) & 0x8000));
#endif
}

// ---- native registers ----

inline Native native_set(float value) {
#if defined(ENGINERY_AVX512)
  return _mm512_set1_ps(value);
#elif defined(ENGINERY_AVX2)
  return _mm256_set1_ps(value);
#else
  return value - Native{};
#endif
}

inline Native native_load(const float* from) {
  Native out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}

inline Native native_load(const bf16* from) {
  NativeShort bits;
  std::memcpy(&bits, from, sizeof(bits));
  return (Native)(__builtin_convertvector(bits, NativeBits) << 16);
}

inline Native native_load(const f16* from) {
#if defined(ENGINERY_AVX512)
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(ENGINERY_AVX2)
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  Native out;
  for (int i = 0; i < kWidth; ++i) out[i] = widen(from[i]);
  return out;
#endif
}

inline void native_store(float* to, Native value) { std::memcpy(to, &value, sizeof(value)); }

inline void native_store(bf16* to, Native value) {
  const NativeBits bits = (NativeBits)value;
  const NativeBits nan = (NativeBits)((bits & 0x7fffffffu) > 0x7f800000u);
  const NativeBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const NativeBits chosen = (nan & ((bits >> 16) | 0x40)) | (~nan & rounded);
  const NativeShort out = __builtin_convertvector(chosen, NativeShort);
  std::memcpy(to, &out, sizeof(out));
}

inline void native_store(f16* to, Native value) {
#if defined(ENGINERY_AVX512)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(ENGINERY_AVX2)
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kWidth; ++i) narrow(value[i], to + i);
#endif
}

inline Native native_fma(Native a, Native b, Native c) {
#if defined(ENGINERY_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(ENGINERY_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline Native native_select(NativeInt mask, Native yes, Native no) {
  return (Native)((mask & (NativeInt)yes) | (~mask & (NativeInt)no));
}

inline Native native_max(Native a, Native b) {
#if defined(ENGINERY_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(ENGINERY_AVX2)
  return _mm256_max_ps(a, b);
#else
  return native_select((NativeInt)(a > b), a, b);
#endif
}

// exp(x) for x ≤ 0 to 1 ulp or so: 2^n · p(r), |r| ≤ ln2 / 2, p of degree 6 (minimax; Cephes' expf). exp(0) is exactly
// 1 and everything below −87 (−∞ included) is exactly 0, which makes a masked key a no-op of the online softmax.
inline Native native_exp(Native x) {
  const Native shift = native_set(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
  const NativeInt dead = (NativeInt)(x < native_set(-87.0f));
  const Native clamped = native_select(dead, native_set(0.0f), x);
  const Native shifted = native_fma(clamped, native_set(1.44269504088896341f), shift);
  const Native n = shifted - shift;
  const Native r = native_fma(n, native_set(2.12194440e-4f), native_fma(n, native_set(-0.693359375f), clamped));
  Native p = native_set(1.9875691500e-4f);
  p = native_fma(p, r, native_set(1.3981999507e-3f));
  p = native_fma(p, r, native_set(8.3334519073e-3f));
  p = native_fma(p, r, native_set(4.1665795894e-2f));
  p = native_fma(p, r, native_set(1.6666665459e-1f));
  p = native_fma(p, r, native_set(5.0000001201e-1f));
  p = native_fma(p, r * r, r + 1.0f);
  const NativeInt exponent = ((NativeInt)shifted - (NativeInt)shift) << 23;
  return native_select(dead, native_set(0.0f), (Native)((NativeInt)p + exponent));
}

// tanh(x): an odd polynomial near zero (Cephes' tanhf), 1 − 2 e / (1 + e) with e = exp(−2|x|) elsewhere.
inline Native native_tanh(Native x) {
  const NativeInt sign = (NativeInt)x & (NativeInt)native_set(-0.0f);
  const Native size = (Native)((NativeInt)x ^ sign);
  const Native square = x * x;
  Native p = native_set(-5.70498872745e-3f);
  p = native_fma(p, square, native_set(2.06390887954e-2f));
  p = native_fma(p, square, native_set(-5.37397155531e-2f));
  p = native_fma(p, square, native_set(1.33314422036e-1f));
  p = native_fma(p, square, native_set(-3.33332819422e-1f));
  const Native small = native_fma(p * square, x, x);
  const Native e = native_exp(size * -2.0f);
  const Native large = (1.0f - e) / (1.0f + e);
  return native_select((NativeInt)(size < native_set(0.625f)), small, (Native)((NativeInt)large | sign));
}

// ---- sixteen lanes ----

inline Vec broadcast(float value) {
  Vec out;
  for (int i = 0; i < kParts; ++i) out.part[i] = native_set(value);
  return out;
}

template <class T>
inline Vec load(const T* from) {
  Vec out;
  for (int i = 0; i < kParts; ++i) out.part[i] = native_load(from + i * kWidth);
  return out;
}

template <class T>
inline void store(T* to, Vec value) {
  for (int i = 0; i < kParts; ++i) native_store(to + i * kWidth, value.part[i]);
}

template <class T>
inline void store_first(T* to, Vec value, int count) {
  T all[kLanes];
  store(all, value);
  std::memcpy(to, all, count * sizeof(T));
}

#define ENGINERY_LANEWISE(name, expression)                                    \
  inline Vec name(Vec a, Vec b) {                                              \
    Vec out;                                                                   \
    for (int i = 0; i < kParts; ++i) {                                         \
      const Native x = a.part[i], y = b.part[i];                               \
      out.part[i] = expression;                                                \
    }                                                                          \
    return out;                                                                \
  }
ENGINERY_LANEWISE(add, x + y)
ENGINERY_LANEWISE(sub, x - y)
ENGINERY_LANEWISE(mul, x* y)
ENGINERY_LANEWISE(max, native_max(x, y))
#undef ENGINERY_LANEWISE

inline Vec fma(Vec a, Vec b, Vec c) {
  Vec out;
  for (int i = 0; i < kParts; ++i) out.part[i] = native_fma(a.part[i], b.part[i], c.part[i]);
  return out;
}

inline Vec exp(Vec x) {
  for (int i = 0; i < kParts; ++i) x.part[i] = native_exp(x.part[i]);
  return x;
}

inline Vec tanh(Vec x) {
  for (int i = 0; i < kParts; ++i) x.part[i] = native_tanh(x.part[i]);
  return x;
}

// 0, 1, ..., 15
inline Vec lane_numbers() {
  static constexpr float kNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(kNumbers);
}

// Lanes first ≤ lane < last keep their value, the others become −∞, whatever they hold (NaN included).
inline Vec keep_lanes(Vec value, int64_t first, int64_t last) {
  const Vec lanes = lane_numbers();
  const Native low = native_set(float(first < 0 ? 0 : first > kLanes ? kLanes : first));
  const Native high = native_set(float(last < 0 ? 0 : last > kLanes ? kLanes : last));
  for (int i = 0; i < kParts; ++i) {
    const NativeInt kept = (NativeInt)(lanes.part[i] >= low) & (NativeInt)(lanes.part[i] < high);
    value.part[i] = native_select(kept, value.part[i], native_set(-std::numeric_limits<float>::infinity()));
  }
  return value;
}

// Every lane receives the fold of all lanes: halves are folded into each other, in one order.
template <int kDistance, class Fold>
inline Native fold_lanes(Native value, Fold fold) {
  if constexpr (kDistance == 0) {
    return value;
  } else {
    NativeInt order{};
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) order[i] = i ^ kDistance;
    return fold_lanes<kDistance / 2>(fold(value, __builtin_shuffle(value, order)), fold);
  }
}

template <class Fold>
inline float reduce(Vec value, Fold fold) {
  Native all = value.part[0];
  for (int i = 1; i < kParts; ++i) all = fold(all, value.part[i]);
  return fold_lanes<kWidth / 2>(all, fold)[0];
}

inline float reduce_max(Vec value) {
  return reduce(value, [](Native a, Native b) { return native_max(a, b); });
}

inline float reduce_sum(Vec value) {
  return reduce(value, [](Native a, Native b) { return a + b; });
}

// ---- transposition: sixteen rows of any element type -> a float32 panel [count][16] ----

typedef float Quad __attribute__((vector_size(16)));

inline Quad load_quad(const float* from) {
  Quad out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}

inline Quad load_quad(const bf16* from) {
#if defined(__SSE4_1__)
  return (Quad)_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)from)), 16);
#else
  typedef uint16_t Short4 __attribute__((vector_size(8)));
  typedef uint32_t Bits4 __attribute__((vector_size(16)));
  Short4 bits;
  std::memcpy(&bits, from, sizeof(bits));
  return (Quad)(__builtin_convertvector(bits, Bits4) << 16);
#endif
}

inline Quad load_quad(const f16* from) {
#if defined(__F16C__)
  return _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)from));
#else
  return Quad{widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3])};
#endif
}

template <class T>
inline void transpose_panel(const T* const* rows, int64_t count, float* panel) {
  int64_t at = 0;
  for (; at + 4 <= count; at += 4) {
#if defined(ENGINERY_AVX512)
    __m512 t[4];
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_castps128_ps512(load_quad(rows[i] + at));
      t[i] = _mm512_insertf32x4(t[i], load_quad(rows[i + 4] + at), 1);
      t[i] = _mm512_insertf32x4(t[i], load_quad(rows[i + 8] + at), 2);
      t[i] = _mm512_insertf32x4(t[i], load_quad(rows[i + 12] + at), 3);
    }
    const __m512 a = _mm512_unpacklo_ps(t[0], t[1]), b = _mm512_unpackhi_ps(t[0], t[1]);
    const __m512 c = _mm512_unpacklo_ps(t[2], t[3]), d = _mm512_unpackhi_ps(t[2], t[3]);
    float* out = panel + at * kLanes;
    _mm512_storeu_ps(out, _mm512_shuffle_ps(a, c, 0x44));
    _mm512_storeu_ps(out + kLanes, _mm512_shuffle_ps(a, c, 0xee));
    _mm512_storeu_ps(out + 2 * kLanes, _mm512_shuffle_ps(b, d, 0x44));
    _mm512_storeu_ps(out + 3 * kLanes, _mm512_shuffle_ps(b, d, 0xee));
#elif defined(ENGINERY_AVX2)
    for (int half = 0; half < 2; ++half) {
      __m256 t[4];
      for (int i = 0; i < 4; ++i) {
        const __m256 low = _mm256_castps128_ps256(load_quad(rows[8 * half + i] + at));
        t[i] = _mm256_insertf128_ps(low, load_quad(rows[8 * half + i + 4] + at), 1);
      }
      const __m256 a = _mm256_unpacklo_ps(t[0], t[1]), b = _mm256_unpackhi_ps(t[0], t[1]);
      const __m256 c = _mm256_unpacklo_ps(t[2], t[3]), d = _mm256_unpackhi_ps(t[2], t[3]);
      float* out = panel + at * kLanes + 8 * half;
      _mm256_storeu_ps(out, _mm256_shuffle_ps(a, c, 0x44));
      _mm256_storeu_ps(out + kLanes, _mm256_shuffle_ps(a, c, 0xee));
      _mm256_storeu_ps(out + 2 * kLanes, _mm256_shuffle_ps(b, d, 0x44));
      _mm256_storeu_ps(out + 3 * kLanes, _mm256_shuffle_ps(b, d, 0xee));
    }
#else
    for (int quarter = 0; quarter < 4; ++quarter) {
      Quad t[4];
      for (int i = 0; i < 4; ++i) t[i] = load_quad(rows[4 * quarter + i] + at);
      for (int column = 0; column < 4; ++column)
        for (int i = 0; i < 4; ++i) panel[(at + column) * kLanes + 4 * quarter + i] = t[i][column];
    }
#endif
  }
  for (; at < count; ++at)
    for (int row = 0; row < kLanes; ++row) panel[at * kLanes + row] = widen(rows[row][at]);
}

}  // namespace enginery
