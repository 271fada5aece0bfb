// Vectors of LANES floats and the two inner loops of every op: dot products with weight rows, and sums of weight rows.
// Each input row has its own accumulators in one fixed order, so its result does not depend on the rows beside it.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
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

// Where element i of a row stands in fp32 buffers that meet weights of type W (little endian). bfloat16 splits into its
// even and its odd elements with one instruction each, so those buffers hold each step's even elements first.
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

// The last elements of a row, followed by zeros.
template <class W>
struct Tail {
  alignas(LINE) W elements[STEP];

  const W* of(const W* p, int64_t n) {
    memset(static_cast<void*>(elements), 0, sizeof elements);
    memcpy(static_cast<void*>(elements), p, n * sizeof(W));
    return elements;
  }
};

#if defined(MOYU_WAITS)  // by build.py
constexpr bool WAITS = true;
#else
constexpr bool WAITS = false;
#endif

// How far a core that reads rows may run ahead. If far, one of AMD's family 26 seems to fill its queue of misses with
// loads that come before what was fetched for them, and takes up to 1.4 times as long (log 56 and 58); one of Intel's
// with 480 MB of cache does not, and takes up to 1.2 times as long where it waits (log 59).
enum class Pace {
  free,
  stores,  // its sums pass through memory: for short rows that lie apart
  waits,   // it waits for its loads every few steps, on cores that gain by it: for rows that follow each other
};

// One step of a weight row's dot products with R input rows, `stride` apart. Operand: what these are stored as for it.
template <class W, Pace PACE>
struct Products {
  using Operand = float;  // in the order of `place`

  template <int R>
  [[gnu::always_inline]] static void add(Vec (&even)[R], Vec (&odd)[R], const W* w, const Operand* x, int64_t stride) {
    Vec first, second;
    load_step(w, first, second);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      even[r] += first * load(x + r * stride);
      odd[r] += second * load(x + r * stride + LANES);
    }
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__)
// One instruction multiplies 32 pairs and adds them in fp32, with one rounding for each, as above; what is below the
// least normal number counts as zero.
template <>
struct Products<BFloat16, Pace::waits> {
  using Operand = BFloat16;  // in plain order

  template <int R>
  [[gnu::always_inline]] static void add(Vec (&sums)[R], Vec (&)[R], const BFloat16* w, const Operand* x,
                                         int64_t stride) {
    const auto weights = (__m512bh)_mm512_loadu_si512(w);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      sums[r] = (Vec)_mm512_dpbf16_ps((__m512)sums[r], weights, (__m512bh)_mm512_loadu_si512(x + r * stride));
  }
};
#endif

template <class W, Pace PACE = Pace::free>
using Operand = typename Products<W, PACE>::Operand;
template <class W>
using Streamed = Operand<W, Pace::waits>;

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

// e^x of each lane to about 2 ulp, for x <= 0 or NaN; 0 below -87, where softmax weights no longer count.
inline Vec exp_negative(Vec x) {
  typedef int32_t VecS32 __attribute__((vector_size(LANES * 4)));
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec in_range = x < -87.0f ? Vec{} - 87.0f : x;
  const Vec shifted = in_range * 1.44269504f + round, n = shifted - round;
  const Vec r = in_range - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Vec scale = (Vec)(((VecS32)shifted << 23) + (127 << 23));
  return x < -87.0f ? Vec{} : p * scale;
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

// Rows of fewer bytes are read at the pace of stores: 1.25 times as fast at D 576 in bfloat16 (log 56). Longer rows take
// 1.1 times as long so; so do int8 ones, whose widening is pace enough.
constexpr int64_t SHORT_ROW = 2048;

template <class W>
inline bool paced(int64_t d) {
  return sizeof(W) > 1 && d * static_cast<int64_t>(sizeof(W)) < SHORT_ROW;
}

// Steps that read M rows and fetch A, between two waits; 0: none. Even, as is the number of steps of most rows.
template <class W, int R, int M, int A>
constexpr int64_t steps_between_waits() {
  constexpr int64_t most = 24 * LINE;  // bytes asked for
  constexpr bool slow = sizeof(W) == 1 || (R > 1 && !std::is_same_v<Streamed<W>, W>);  // by its widening
  return !WAITS || A == 0 || slow ? 0 : std::max<int64_t>(1, most / ((M + A) * STEP * sizeof(W)) / 2 * 2);
}

inline void wait_for_loads() {
#if defined(__x86_64__)
  _mm_lfence();
#endif
}

// out[m][r] = dot(w.row[m], x[r]) over d elements; fetches the rows `ahead` while it works.
// x: row stride `stride`, zero-padded to whole steps.
template <Pace PACE, int R, class W, int M, int A>
inline void dots(Rows<W, M> w, Rows<W, A> ahead, const Operand<W, PACE>* x, int64_t stride, int64_t d,
                 float (&out)[M][R]) {
  Vec even[M][R] = {}, odd[M][R] = {};
  const auto step = [&](int64_t i, auto from) {
#pragma GCC unroll 8  // or the sums are kept in memory
    for (int m = 0; m < M; ++m) Products<W, PACE>::add(even[m], odd[m], from(w.row[m] + i), x + i, stride);
  };
  int64_t i = 0;
  for (; i + STEP <= d; i += STEP) {
    step(i, [](const W* p) { return p; });
    constexpr int64_t steps = PACE == Pace::waits ? steps_between_waits<W, R, M, A>() : 0;
    if constexpr (steps > 0)
      if (i / STEP % steps == steps - 1) wait_for_loads();
    if constexpr (PACE == Pace::stores) asm volatile("" ::: "memory");
    fetch_step(ahead, i);
  }
  Tail<W> tail;
  if (i < d) step(i, [&](const W* p) { return tail.of(p, d - i); });
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Vec total[M];
    float sums[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) total[m] = even[m][r] + odd[m][r];
    if constexpr (M == 4)
      sum_four(total, sums);
    else
      for (int m = 0; m < M; ++m) sums[m] = sum(total[m]);
    for (int m = 0; m < M; ++m) out[m][r] = sums[m];
  }
}

// The same for any number of input rows: out(m, row, value). The weights come from the cache after the first tile.
template <Pace PACE = Pace::free, class W, int M, int A, class Out>
inline void dots_tiled(Rows<W, M> w, Rows<W, A> ahead, const Operand<W, PACE>* x, int64_t rows, int64_t stride,
                       int64_t d, Out out) {
  constexpr int MOST = M < 4 ? 4 : LANES == 16 ? 2 : 1;  // that have registers for their sums
  int64_t row = 0;
  const auto tile = [&](auto size, auto fetched) {
    constexpr int R = decltype(size)::value;
    float values[M][R];
    constexpr bool single = PACE == Pace::free && R == 1;
    if (single && row == 0 && paced<W>(d))
      dots<single ? Pace::stores : PACE>(w, fetched, x, stride, d, values);
    else
      dots<PACE>(w, fetched, x + row * stride, stride, d, values);
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
  const auto step = [&](int64_t i, auto from) {
    Vec v = load(acc + i), u = load(acc + i + LANES);
    for (int m = 0; m < M; ++m) {
      Vec first, second;
      load_step(from(w.row[m] + i), first, second);
      v += a[m] * first;
      u += a[m] * second;
    }
    store(acc + i, v);
    store(acc + i + LANES, u);
  };
  int64_t i = 0;
  for (; i + STEP <= d; i += STEP) {
    fetch_step(ahead, i);
    step(i, [](const W* p) { return p; });
  }
  Tail<W> tail;
  if (i < d) step(i, [&](const W* p) { return tail.of(p, d - i); });
}

}  // namespace moyu
