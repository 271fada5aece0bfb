// Vectors of LANES floats and the two inner loops of every op: dot products with weight rows, and sums of weight rows.
// Each input row has its own accumulators in one fixed order, so its result does not depend on the rows beside it.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moyu {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int LANES = 16;
#elif defined(__AVX2__) && defined(__F16C__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

constexpr int64_t LINE = 64;  // bytes of a cache line

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t VecU32 __attribute__((vector_size(LANES * 4)));

// Weights are read STEP at a time, as two vectors.
constexpr int64_t STEP = 2 * LANES;

inline int64_t padded(int64_t n) { return (n + STEP - 1) / STEP * STEP; }

inline Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

// Where element i of a row stands in the fp32 buffers that meet weights of type W (little endian). bfloat16 splits into
// its even and its odd elements with one instruction each, so those buffers hold each step's even elements first.
template <class W>
inline int64_t place(int64_t i) {
  if constexpr (std::is_same_v<W, BFloat16>) return i - i % STEP + i % 2 * LANES + i % STEP / 2;
  return i;
}

inline void load_step(const float* p, Vec& first, Vec& second) {
  first = load(p);
  second = load(p + LANES);
}

inline void load_step(const BFloat16* p, Vec& first, Vec& second) {
  VecU32 bits;
  memcpy(&bits, p, sizeof bits);
  first = (Vec)(bits << 16);
  second = (Vec)(bits & 0xffff0000u);
}

// The compiler's own vector conversions of int8 go through scalars, hence the intrinsics.
#if defined(__AVX512F__) && defined(__AVX512BW__)
inline Vec widen(const Half* p) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline Vec widen(const int8_t* p) {
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline float sum(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
#elif defined(__AVX2__) && defined(__F16C__)
inline Vec widen(const Half* p) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline Vec widen(const int8_t* p) {
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline float sum(Vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
#else
template <class W>
inline Vec widen(const W* p) {
  Vec v;
  for (int i = 0; i < LANES; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}
inline float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
#endif

template <class W>
inline void load_step(const W* p, Vec& first, Vec& second) {
  first = widen(p);
  second = widen(p + LANES);
}

// The last n < STEP elements of a row, followed by zeros.
template <class W>
inline void load_tail(const W* p, int64_t n, Vec& first, Vec& second) {
  alignas(LINE) W buffer[STEP];
  memset(static_cast<void*>(buffer), 0, sizeof buffer);
  memcpy(static_cast<void*>(buffer), p, n * sizeof(W));
  load_step(buffer, first, second);
}

// The sums of four vectors at once, which takes a third of the instructions of four sums.
inline void sum_four(const Vec* v, float* out) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__) && defined(__F16C__)
  const __m256 ab = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]), cd = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
  const __m256 all = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  for (int k = 0; k < 4; ++k) out[k] = sum(v[k]);
#endif
}

// e^x of each lane to about 2 ulp, for x <= 0; 0 below -87, where softmax weights no longer count.
inline Vec exp_negative(Vec x) {
  typedef int32_t VecS32 __attribute__((vector_size(LANES * 4)));
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec in_range = x > -87.0f ? x : Vec{} - 87.0f;
  const Vec shifted = in_range * 1.44269504f + round, n = shifted - round;
  const Vec r = in_range - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Vec scale = (Vec)(((VecS32)shifted << 23) + (127 << 23));
  return x > -87.0f ? p * scale : Vec{};
}

// A few weight rows: those of one step, or those to fetch for a later one.
template <class W, int M>
struct Rows {
  const W* row[M];
};

// Into the second-level cache: fetching into the first one is limited to its few open misses, and is slower here. Always
// inline: gcc (12.2) takes a function that only fetches for one without effects, and leaves calls of it out.
template <class W, int M>
[[gnu::always_inline]] inline void fetch_step(const Rows<W, M>& rows, int64_t i) {
  if (i * static_cast<int64_t>(sizeof(W)) % LINE) return;  // a step of less than a line, in one that is on its way
  for (int m = 0; m < M; ++m)
    for (int64_t byte = 0; byte < STEP * static_cast<int64_t>(sizeof(W)); byte += LINE)
      __builtin_prefetch(reinterpret_cast<const char*>(rows.row[m] + i) + byte, 0, 2);
}

// Rows of fewer bytes are read at a pace: a core that runs far ahead in them, over their ends, seems to fill its queue of
// misses with loads that come before what was fetched for them, and takes 1.25 times as long (D 576 in bfloat16, AMD EPYC
// of family 26; log 56). Longer rows take 1.1 times as long at a pace; so do int8 ones, whose widening is pace enough.
constexpr int64_t SHORT_ROW = 2048;

template <class W>
inline bool paced(int64_t d) {
  return sizeof(W) > 1 && d * static_cast<int64_t>(sizeof(W)) < SHORT_ROW;
}

// out[m][r] = dot(w.row[m], x[r]) over d elements; fetches the rows `ahead` while it works.
// x: fp32 in the order of `place`, row stride `stride`, zero-padded to whole steps.
template <bool PACED, int R, class W, int M, int A>
inline void dots(Rows<W, M> w, Rows<W, A> ahead, const float* x, int64_t stride, int64_t d, float (&out)[M][R]) {
  Vec even[M][R] = {}, odd[M][R] = {};
  const auto step = [&](int64_t i, auto load_weights) {
    for (int m = 0; m < M; ++m) {
      Vec first, second;
      load_weights(w.row[m] + i, first, second);
      for (int r = 0; r < R; ++r) {
        even[m][r] += first * load(x + r * stride + i);
        odd[m][r] += second * load(x + r * stride + i + LANES);
      }
    }
  };
  int64_t i = 0;
  for (; i + STEP <= d; i += STEP) {
    step(i, [](const W* p, Vec& first, Vec& second) { load_step(p, first, second); });
    if constexpr (PACED) asm volatile("" ::: "memory");  // has the sums go through memory
    fetch_step(ahead, i);
  }
  if (i < d) step(i, [&](const W* p, Vec& first, Vec& second) { load_tail(p, d - i, first, second); });
  for (int r = 0; r < R; ++r) {
    Vec total[M];
    float sums[M];
    for (int m = 0; m < M; ++m) total[m] = even[m][r] + odd[m][r];
    if constexpr (M == 4)
      sum_four(total, sums);
    else
      for (int m = 0; m < M; ++m) sums[m] = sum(total[m]);
    for (int m = 0; m < M; ++m) out[m][r] = sums[m];
  }
}

// The same for any number of input rows: out(m, row, value). The weights come from the cache after the first tile.
template <class W, int M, int A, class Out>
inline void dots_tiled(Rows<W, M> w, Rows<W, A> ahead, const float* x, int64_t rows, int64_t stride, int64_t d,
                       Out out) {
  constexpr int MOST = M < 4 ? 4 : LANES == 16 ? 2 : 1;  // that have registers for their sums
  int64_t row = 0;
  const auto tile = [&](auto size, auto fetched) {
    constexpr int R = decltype(size)::value;
    float values[M][R];
    if (R == 1 && row == 0 && paced<W>(d))
      dots<R == 1>(w, fetched, x + row * stride, stride, d, values);
    else
      dots<false>(w, fetched, x + row * stride, stride, d, values);
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) out(m, row + r, values[m][r]);
    row += R;
  };
  const auto tiles = [&](auto size) {
    if constexpr (decltype(size)::value <= MOST) {
      if (row == 0 && rows >= size) tile(size, ahead);
      while (rows - row >= size) tile(size, Rows<W, 0>());
    }
  };
  tiles(std::integral_constant<int, 4>());
  tiles(std::integral_constant<int, 2>());
  tiles(std::integral_constant<int, 1>());
}

// acc += a[0] * row[0], then a[1] * row[1], and so on: the order is that of one row at a time, whatever M is. Fetches the
// rows `ahead` while it works. acc: fp32 in the order of `place`, padded to whole steps.
template <class W, int M, int A>
inline void add_rows(float* acc, const float* a, Rows<W, M> w, Rows<W, A> ahead, int64_t d) {
  const auto step = [&](int64_t i, auto load_weights) {
    Vec v = load(acc + i), u = load(acc + i + LANES);
    for (int m = 0; m < M; ++m) {
      Vec first, second;
      load_weights(w.row[m] + i, first, second);
      v += a[m] * first;
      u += a[m] * second;
    }
    store(acc + i, v);
    store(acc + i + LANES, u);
  };
  int64_t i = 0;
  for (; i + STEP <= d; i += STEP) {
    fetch_step(ahead, i);
    step(i, [](const W* p, Vec& first, Vec& second) { load_step(p, first, second); });
  }
  if (i < d) step(i, [&](const W* p, Vec& first, Vec& second) { load_tail(p, d - i, first, second); });
}

}  // namespace moyu
