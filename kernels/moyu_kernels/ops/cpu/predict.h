// Predictors of a range of neurons: scores from the FFN's input, before any of its weights is read.
#pragma once

#include <cmath>
#include <limits>

#include "common.h"

namespace moyu {

enum class Act { silu, relu, relu2, gelu, gelu_tanh };

Act parse_act(const char* op, const std::string& name) {
  if (name == "silu") return Act::silu;
  if (name == "relu") return Act::relu;
  if (name == "relu2") return Act::relu2;
  if (name == "gelu") return Act::gelu;
  if (name == "gelu_tanh") return Act::gelu_tanh;
  REQUIRE(false, op, ": activation '", name, "' is unknown; use silu, relu, relu2, gelu or gelu_tanh");
}

inline float activate(Act act, float g) {
  switch (act) {
    case Act::silu: return g / (1.0f + std::exp(-g));
    case Act::relu: return g > 0.0f ? g : 0.0f;
    case Act::relu2: return g > 0.0f ? g * g : 0.0f;
    case Act::gelu: return 0.5f * g * (1.0f + std::erf(g * 0.70710678f));
    default: return 0.5f * g * (1.0f + std::tanh(0.79788456f * (g + 0.044715f * g * g * g)));
  }
}

// As naive.RULES.
enum class Rule {
  threshold,
  gate_threshold,
  relu,
  fatrelu,
  relu2,
  drelu,
  statistical_topk,
  statistical_topk_soft,
  topk
};

Rule parse_rule(const char* op, const std::string& name) {
  constexpr const char* NAMES[] = {"threshold", "gate_threshold",   "relu",                  "fatrelu", "relu2",
                                   "drelu",     "statistical_topk", "statistical_topk_soft", "topk"};
  for (int i = 0; i < 9; ++i)
    if (name == NAMES[i]) return static_cast<Rule>(i);
  REQUIRE(false, op, ": rule '", name, "' is unknown; use threshold, gate_threshold, relu, fatrelu, relu2, drelu, ",
          "statistical_topk, statistical_topk_soft or topk");
}

inline bool whole_row(Rule rule) { return rule >= Rule::statistical_topk; }

// activate() in place on `count` values, a multiple of LANES: silu, by far the commonest, in vectors.
inline void activate_all(Act act, float* g, int64_t count) {
  if (act != Act::silu) {
    for (int64_t i = 0; i < count; ++i) g[i] = activate(act, g[i]);
    return;
  }
  for (int64_t i = 0; i < count; i += LANES) {
    const Vec v = load(g + i), e = exp_negative(v > 0.0f ? -v : v);
    store(g + i, v * (v > 0.0f ? Vec{} + 1.0f : e) / (1.0f + e));
  }
}

// What a rule puts in place of act(g) (naive.ruled_gate).
struct Gate {
  Act act;
  Rule rule;
  const float* threshold;  // [neurons]

  // Of neuron f; mean and deviation of its row's gates where the rule asks for them.
  float operator()(float g, int64_t f, float mean = 0.0f, float deviation = 0.0f) const {
    const float t = threshold[f], level = mean + t * deviation;
    switch (rule) {
      case Rule::threshold:
      case Rule::topk: return activate(act, g);
      case Rule::gate_threshold: return cut(activate(act, g), t);
      case Rule::fatrelu: return g > 0.0f && g >= t ? g : 0.0f;
      case Rule::relu2: return g > 0.0f ? g * g : 0.0f;
      case Rule::statistical_topk: return g > level ? activate(act, g) : 0.0f;
      case Rule::statistical_topk_soft: return g > level ? activate(act, g - level) : 0.0f;
      default: return g > t ? g - t : 0.0f;
    }
  }

  // In place on `count` values from neuron f on, in a buffer that goes on to a multiple of LANES.
  void all(float* g, int64_t f, int64_t count, float mean = 0.0f, float deviation = 0.0f) const {
    if (rule != Rule::threshold && rule != Rule::gate_threshold) {
      for (int64_t i = 0; i < count; ++i) g[i] = (*this)(g[i], f + i, mean, deviation);
      return;
    }
    activate_all(act, g, (count + LANES - 1) / LANES * LANES);
    if (rule == Rule::gate_threshold)
      for (int64_t i = 0; i < count; ++i) g[i] = cut(g[i], threshold[f + i]);
  }

  static float cut(float value, float t) { return std::fabs(value) >= t ? value : 0.0f; }
};

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
#else
  static constexpr int64_t STEP = 32;
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

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
// out[m] = sum of code * x over rows codes.row[m] of `bytes` bytes.
template <int PLANES>
inline void code_dots(Rows<uint8_t, 4> codes, const int8_t* x, int64_t bytes, int64_t plane, int32_t* out) {
  constexpr int BITS = 8 / PLANES;
  const __m512i low = _mm512_set1_epi8((1 << BITS) - 1);
  __m512i sums[4] = {};
  for (int64_t j = 0; j < bytes; j += Rounded::STEP) {
    const __mmask64 inside = bytes - j >= 64 ? ~__mmask64(0) : (__mmask64(1) << (bytes - j)) - 1;
    for (int m = 0; m < 4; ++m) {
      const __m512i c = _mm512_maskz_loadu_epi8(inside, codes.row[m] + j);
      for (int k = 0; k < PLANES; ++k)
        sums[m] = _mm512_dpbusd_epi32(sums[m], _mm512_and_si512(_mm512_srli_epi16(c, k * BITS), low),
                                      _mm512_loadu_si512(x + k * plane + j));
    }
  }
  __m256i halves[4];
  for (int m = 0; m < 4; ++m)
    halves[m] = _mm256_add_epi32(_mm512_castsi512_si256(sums[m]), _mm512_extracti64x4_epi64(sums[m], 1));
  store_sums(halves, out);
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

// out[m] = sum of code * x over rows codes.row[m] of `bytes` bytes.
template <int PLANES>
inline void code_dots(Rows<uint8_t, 4> codes, const int8_t* x, int64_t bytes, int64_t plane, int32_t* out) {
  constexpr int BITS = 8 / PLANES;
  const __m256i low = _mm256_set1_epi8((1 << BITS) - 1);
  __m256i sums[4] = {};
  for (int64_t j = 0; j < bytes; j += Rounded::STEP)
    for (int m = 0; m < 4; ++m) {
      const __m256i c = load_codes(codes.row[m] + j, bytes - j);
      for (int k = 0; k < PLANES; ++k)
        sums[m] = add_products(sums[m], _mm256_and_si256(_mm256_srli_epi16(c, k * BITS), low), x + k * plane + j);
    }
  store_sums(sums, out);
}
#else
template <int PLANES>
inline void code_dots(Rows<uint8_t, 4> codes, const int8_t* x, int64_t bytes, int64_t plane, int32_t* out) {
  constexpr int BITS = 8 / PLANES;
  for (int m = 0; m < 4; ++m) {
    out[m] = 0;
    for (int k = 0; k < PLANES; ++k)
      for (int64_t j = 0; j < bytes; ++j)
        out[m] += ((codes.row[m][j] >> k * BITS) & ((1 << BITS) - 1)) * x[k * plane + j];
  }
}
#endif

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
    alignas(LINE) int32_t dots[2][SIZE + 4];
    alignas(LINE) float above[SIZE + LANES] = {}, below[SIZE + LANES] = {}, ups[SIZE];
    for (int64_t n = 0; n < rows; ++n) {
      const auto products = [&](const uint8_t* codes, int64_t f, int32_t* out) {
        const uint8_t* later = codes + std::min(f + ahead, neurons - 1) * x.bytes;
        for (int64_t byte = 0; n == 0 && byte < 4 * x.bytes; byte += LINE) __builtin_prefetch(later + byte, 0, 2);
        const auto rows_of = rows_from<4>(codes, x.bytes, f, end);
        if (x.planes == 4) code_dots<4>(rows_of, x.row(n), x.bytes, x.plane, out + f - first);
        else code_dots<8>(rows_of, x.row(n), x.bytes, x.plane, out + f - first);
      };
      const auto scaled = [&](const int32_t* sums, const float* scale, float* out) {
        const int32_t offset = top * x.sums[n];
        for (int64_t j = 0; j < size; ++j)
          out[j] = static_cast<float>(2 * sums[j] - offset) * x.step[n] * scale[first + j];
      };
      for (int64_t f = first; f < end; f += 4) {
        products(gate_codes, f, dots[0]);
        if (up_codes) products(up_codes, f, dots[1]);
      }
      const float* gate_errors = gate_scales + neurons + first;
      scaled(dots[0], gate_scales, above);
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
        scaled(dots[1], up_scales, ups);
        for (int64_t j = 0; j < size; ++j) {
          const float error = x.norms[n] * up_errors[j];
          square[j] *= ups[j] * ups[j] + error * error;
        }
      }
      for (int64_t j = 0; j < size; ++j)
        mask[j] |= (weight[first + j] * std::sqrt(std::sqrt(square[j])) + bias[first + j] > 0.0f) << n;
    }
  }
};

}  // namespace moyu
