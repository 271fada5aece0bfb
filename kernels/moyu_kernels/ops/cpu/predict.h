// Predictors of a range of neurons: scores from the FFN's input, before any of its weights is read.
#pragma once

#include <cmath>
#include <limits>

#include "rules.h"

namespace moyu {

// Two matrices (naive.lowrank_scores).
struct LowRank {
  static constexpr int64_t PART = 16;  // rows of the first matrix that a thread claims at once
  const int8_t *w1, *w2;
  const float *s1, *s2, *bias, *x;  // x [rows, stride] in plain order
  int64_t rank, rows, d, stride, neurons;
  float* hidden;  // [rows, hidden_stride]
  int64_t hidden_stride;

  int64_t parts() const { return (rank + PART - 1) / PART; }

  // Shared work before any score: rows of the first matrix.
  void prepare(int64_t part) const {
    const int64_t end = std::min(rank, (part + 1) * PART);
    for (int64_t r = part * PART; r < end; r += 4)
      dots_tiled(rows_from<4>(w1, d, r, end), Rows<int8_t, 0>(), x, rows, stride, d,
                 [&](int m, int64_t n, float value) {
                   const int64_t j = std::min(r + m, end - 1);
                   hidden[n * hidden_stride + j] = value * s1[j];
                 });
  }

  // Sets bit n of mask[j] where neuron first + j scores above zero for row n. `ahead`: the distance to the neurons that
  // this thread scores next as a rule, whose rows are fetched.
  template <int64_t SIZE>
  void select(int64_t first, int64_t size, int64_t ahead, uint8_t* mask) const {
    float scores[MAX_ROWS][SIZE];
    for (int64_t f = first; f < first + size; f += 4)
      dots_tiled(rows_from<4>(w2, rank, f, first + size), rows_from<4>(w2, rank, f + ahead, neurons), hidden, rows,
                 hidden_stride, rank, [&](int m, int64_t n, float value) { scores[n][f - first + m] = value; });
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t j = 0; j < size; ++j) mask[j] |= (scores[n][j] * s2[first + j] + bias[first + j] > 0.0f) << n;
  }
};

// x rounded to int8, as codes of 2 bits or 1 ask for it, `planes` = 4 or 8 to a byte: column k * bytes + j of a row at
// k * plane + j.
struct Rounded {
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
  static constexpr int64_t STEP = 64;  // bytes of codes that are multiplied at once
  static constexpr int64_t TILE = 4;   // rows of x that codes are unpacked for at once: as many sums as registers hold
#else
  static constexpr int64_t STEP = 32, TILE = 2;
#endif
  const int8_t* values;                // [rows, planes, plane], zero from column D on
  int64_t planes, bytes, plane;
  const float *step, *norms;  // [rows]
  const int32_t* sums;        // [rows]

  const int8_t* row(int64_t n) const { return values + n * planes * plane; }
};

// As naive.code_bits: what a row of `bytes` codes of d columns packs into a byte.
inline int64_t planes_of(int64_t d, int64_t bytes) { return bytes == (d + 3) / 4 ? 4 : 8; }

inline int64_t plane_of(int64_t d, int64_t planes) {
  return ((d + planes - 1) / planes + Rounded::STEP - 1) / Rounded::STEP * Rounded::STEP;
}

// x [d] in plain order: its rounded values into out [planes, plane], their sum and, times the step, their norm; returns
// the step. Both are NaN, which selects no neuron, where x is not finite.
inline float round_row(const float* x, int64_t d, int64_t planes, int8_t* out, int32_t& sum, float& norm) {
  const int64_t bytes = (d + planes - 1) / planes, plane = plane_of(d, planes);
  float top = 0.0f;
  for (int64_t i = 0; i < d; ++i) {
    const float size = std::fabs(x[i]);
    if (!(size <= std::numeric_limits<float>::max())) return norm = std::numeric_limits<float>::quiet_NaN();
    top = std::max(top, size);
  }
  const float inverse = top > 1e-30f ? 1.0f / top * 127.0f : 0.0f, step = top * (1.0f / 127.0f);
  int64_t squares = 0;
  for (int64_t k = 0; k < planes; ++k)
    for (int64_t j = 0; j < std::min(bytes, d - k * bytes); ++j) {
      const auto value = static_cast<int32_t>(std::nearbyint(x[k * bytes + j] * inverse));
      out[k * plane + j] = static_cast<int8_t>(value);
      sum += value;
      squares += value * value;
    }
  norm = std::sqrt(static_cast<float>(squares)) * step;
  return step;
}

#if defined(__AVX2__)
inline void store_sums(const __m256i* sums, int32_t* out) {
  const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
  const __m128i all = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), all);
}
#endif

// Codes are fetched into the first-level cache on AMD's family 26, which is up to 1.2 times as fast where another core
// is at work, and no slower where none is (log 64).
constexpr int NEAR = WAITS ? 3 : 2;

// code_dots: out[r * out_stride + m] = sum of code * x over rows codes.row[m] of `bytes` bytes and row n + r of x, r < R.
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
template <int PLANES, int R, int A>
inline void code_dots(Rows<uint8_t, 4> codes, Rows<uint8_t, A> ahead, const Rounded& x, int64_t n, int32_t* out,
                      int64_t out_stride) {
  constexpr int BITS = 8 / PLANES;
  const __m512i low = _mm512_set1_epi8((1 << BITS) - 1);
  __m512i sums[R][4] = {};
  for (int64_t j = 0; j < x.bytes; j += Rounded::STEP) {
    const int64_t left = x.bytes - j;
    const __mmask64 inside = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      if (A > 0 && j % LINE == 0) __builtin_prefetch(ahead.row[m] + j, 0, NEAR);
      const __m512i c = _mm512_maskz_loadu_epi8(inside, codes.row[m] + j);
#pragma GCC unroll 8
      for (int k = 0; k < PLANES; ++k) {
        const __m512i part = _mm512_and_si512(_mm512_srli_epi16(c, k * BITS), low);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          sums[r][m] = _mm512_dpbusd_epi32(sums[r][m], part, _mm512_loadu_si512(x.row(n + r) + k * x.plane + j));
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    __m256i halves[4];
    for (int m = 0; m < 4; ++m)
      halves[m] = _mm256_add_epi32(_mm512_castsi512_si256(sums[r][m]), _mm512_extracti64x4_epi64(sums[r][m], 1));
    store_sums(halves, out + r * out_stride);
  }
}
#elif defined(__AVX2__)
inline __m256i load_codes(const uint8_t* p, int64_t left) {
  if (left >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if (left == 8) return _mm256_zextsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  if (left == 16) return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  alignas(32) uint8_t buffer[32] = {};
  memcpy(buffer, p, left);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(buffer));
}

inline __m256i add_products(__m256i sum, __m256i codes, const int8_t* x) {
  const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpbusd_epi32(sum, codes, values);
#else  // two products of at most 3 * 127 stay far below what 16 bits hold
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, values), _mm256_set1_epi16(1)));
#endif
}

template <int PLANES, int R, int A>
inline void code_dots(Rows<uint8_t, 4> codes, Rows<uint8_t, A> ahead, const Rounded& x, int64_t n, int32_t* out,
                      int64_t out_stride) {
  constexpr int BITS = 8 / PLANES;
  const __m256i low = _mm256_set1_epi8((1 << BITS) - 1);
  __m256i sums[R][4] = {};
  for (int64_t j = 0; j < x.bytes; j += Rounded::STEP)
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      if (A > 0 && j % LINE == 0) __builtin_prefetch(ahead.row[m] + j, 0, NEAR);
      const __m256i c = load_codes(codes.row[m] + j, x.bytes - j);
#pragma GCC unroll 8
      for (int k = 0; k < PLANES; ++k) {
        const __m256i part = _mm256_and_si256(_mm256_srli_epi16(c, k * BITS), low);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) sums[r][m] = add_products(sums[r][m], part, x.row(n + r) + k * x.plane + j);
      }
    }
  for (int r = 0; r < R; ++r) store_sums(sums[r], out + r * out_stride);
}
#else
template <int PLANES, int R, int A>
inline void code_dots(Rows<uint8_t, 4> codes, Rows<uint8_t, A> ahead, const Rounded& x, int64_t n, int32_t* out,
                      int64_t out_stride) {
  constexpr int BITS = 8 / PLANES;
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < 4; ++m) {
      int32_t sum = 0;
      for (int k = 0; k < PLANES; ++k)
        for (int64_t j = 0; j < x.bytes; ++j)
          sum += ((codes.row[m][j] >> k * BITS) & ((1 << BITS) - 1)) * x.row(n + r)[k * x.plane + j];
      out[r * out_stride + m] = sum;
    }
}
#endif

// As code_dots, of up to TILE rows.
template <int PLANES, int A, int R = Rounded::TILE>
inline void code_dots_tile(Rows<uint8_t, 4> codes, Rows<uint8_t, A> ahead, const Rounded& x, int64_t n, int64_t count,
                           int32_t* out, int64_t out_stride) {
  if (count >= R) return code_dots<PLANES, R>(codes, ahead, x, n, out, out_stride);
  if constexpr (R > 1) code_dots_tile<PLANES, A, R - 1>(codes, ahead, x, n, count, out, out_stride);
}

// Copies of gate and up in 2 bits or 1 (naive.lowbit_scores). All products are integers, so their order does not matter.
// Of a plain FFN up stands for the gate, with its bias, and nothing for up (naive.lowbit_up_scores).
struct LowBit {
  const uint8_t *gate_codes, *up_codes;
  const float *gate_scales, *up_scales;  // [2, neurons]
  const float *weight, *bias, *gate_bias;
  Rounded x;
  int64_t rows, neurons;
  Gate gate;

  // As LowRank::select.
  template <int64_t SIZE>
  void select(int64_t first, int64_t size, int64_t ahead, uint8_t* mask) const {
    const int64_t end = first + size;
    const int32_t top = x.planes == 4 ? 3 : 1;
    constexpr int64_t TILE = Rounded::TILE, STRIDE = SIZE + 4;
    alignas(LINE) int32_t dots[2][TILE * STRIDE];
    alignas(LINE) float above[SIZE + LANES] = {}, below[SIZE + LANES] = {}, ups[SIZE];
    for (int64_t n = 0; n < rows; ++n) {
      const auto products = [&](const uint8_t* codes, int64_t f, int32_t* out) {
        const auto now = rows_from<4>(codes, x.bytes, f, end);
        const auto tile = [&](auto later) {
          if (x.planes == 4) code_dots_tile<4>(now, later, x, n, rows - n, out + f - first, STRIDE);
          else code_dots_tile<8>(now, later, x, n, rows - n, out + f - first, STRIDE);
        };
        n == 0 ? tile(rows_from<4>(codes, x.bytes, f + ahead, neurons)) : tile(Rows<uint8_t, 0>());
      };
      const auto scaled = [&](const int32_t* sums, const float* scale, float* out) {
        const int32_t offset = top * x.sums[n];
        for (int64_t j = 0; j < size; ++j)
          out[j] = static_cast<float>(2 * sums[j] - offset) * x.step[n] * scale[first + j];
      };
      for (int64_t f = first; n % TILE == 0 && f < end; f += 4) {
        products(gate_codes, f, dots[0]);
        if (up_codes) products(up_codes, f, dots[1]);
      }
      const int32_t* row_dots[] = {dots[0] + n % TILE * STRIDE, dots[1] + n % TILE * STRIDE};
      const float* gate_errors = gate_scales + neurons + first;
      scaled(row_dots[0], gate_scales, above);
      for (int64_t j = 0; gate_bias && j < size; ++j) above[j] += gate_bias[first + j];
      for (int64_t j = 0; j < size; ++j) {
        const float error = x.norms[n] * gate_errors[j];
        below[j] = above[j] - error;
        above[j] += error;
      }
      gate.all(above, first, size);
      gate.all(below, first, size);
      float* square = above;
      for (int64_t j = 0; j < size; ++j) square[j] = (above[j] * above[j] + below[j] * below[j]) * 0.5f;
      if (up_codes) {
        const float* up_errors = up_scales + neurons + first;
        scaled(row_dots[1], up_scales, ups);
        for (int64_t j = 0; j < size; ++j) {
          const float error = x.norms[n] * up_errors[j];
          square[j] *= ups[j] * ups[j] + error * error;
        }
      }
      const bool finite = !std::isnan(x.norms[n]);  // relu and fatrelu make zero of what is not
      for (int64_t j = 0; j < size; ++j)
        mask[j] |= (finite && weight[first + j] * std::sqrt(std::sqrt(square[j])) + bias[first + j] > 0.0f) << n;
    }
  }
};

}  // namespace moyu
