// Queries of the attention heads that a router chooses: only their weight rows are read.
#pragma once

#include "common.h"

namespace moyu {

// Bit n of chosen[u]: row n keeps unit u, one of its `keep` largest scores; of equals the first ones.
inline void choose_units(std::vector<float>& scores, int64_t rows, int64_t units, int64_t keep, uint8_t* chosen) {
  std::fill(chosen, chosen + units, 0);
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t k = 0; k < keep; ++k) {
      int64_t best = -1;
      for (int64_t u = 0; u < units; ++u)
        if (!(chosen[u] >> n & 1) && (best < 0 || scores[n * units + u] > scores[n * units + best])) best = u;
      chosen[best] |= 1 << n;
    }
}

template <class W>
void run_head_linear(const Tensor& x, const Tensor& weight, const W* bias, const Tensor& router, const float* scale,
                     const float* offset, int64_t keep, Tensor& y) {
  const int64_t rows = x.size(0), d = x.size(1), stride = padded(d), units = router.size(0), outputs = weight.size(0);
  const int64_t size = outputs / units;
  static thread_local Scratch scratch;
  static thread_local std::vector<float> scores;
  static thread_local std::vector<uint8_t> chosen;
  float* wide = scratch.take(rows * stride);
  scores.resize(rows * units);
  chosen.resize(units);
  read_input<W, int8_t>(x, wide, stride);
  const Matrix<int8_t> matrix{data<const int8_t>(router), d, scale};
  stream_dots(matrix.rows, d, units, units, wide, rows, stride, d, [&](int64_t unit, int64_t n, float dot) {
    scores[n * units + unit] = matrix.scaled(dot, unit) + offset[unit];
  });
  choose_units(scores, rows, units, keep, chosen.data());

  Streamed<W>* input = scratch.take<Streamed<W>>(rows * stride);  // the router is through with what was there
  read_input<W, W, Pace::waits>(x, input, stride);
  const uint8_t* masks = chosen.data();
  W* out = data<W>(y);
  for_ranges(units, [&](int64_t unit) {
    const int64_t first = unit * size;
    const uint8_t mask = masks[unit];
    if (!mask) {
      for (int64_t n = 0; n < rows; ++n) std::fill_n(out + n * outputs + first, size, static_cast<W>(0.0f));
      return;
    }
    const auto put = [&](int64_t row, int64_t n, float dot) {
      const float value = bias ? dot + static_cast<float>(bias[first + row]) : dot;
      out[n * outputs + first + row] = static_cast<W>(mask >> n & 1 ? value : 0.0f);
    };
    stream_dots(data<const W>(weight) + first * d, d, size, size, input, rows, stride, d, put);
  });
}

}  // namespace moyu
