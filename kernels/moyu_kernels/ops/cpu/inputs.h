// The linear layer that reads only the weight rows of inputs in use.
#pragma once

#include <cmath>

#include "down.h"

namespace moyu {

template <class W>
void run_sparse_linear(const Tensor& x, const Tensor& weight, const W* bias, const float* threshold, Tensor& y,
                       Tensor& counts) {
  const int64_t rows = x.size(0), inputs = x.size(1), d = weight.size(1), stride = padded(d), width = padded(inputs);
  const int64_t block = inputs <= 1024 ? BLOCK / 2 : BLOCK, ranges = (inputs + block - 1) / block;
  static thread_local std::vector<float> scratch;
  static thread_local std::vector<int32_t> tally;
  scratch.resize(rows * (width + ranges * stride));
  tally.resize(ranges * rows);
  float *wide = scratch.data(), *partial = wide + rows * width;
  int32_t* kept = tally.data();
  widen_input<W, float>(x, wide, width);
  const W* w = data<const W>(weight);

  Claims claims(ranges);
  claims.run([&](int64_t thread) {
    RowSums<W> sums(rows, stride, d, true);
    for (int64_t range; (range = claims.claim(thread)) >= 0;) {
      Selection s;
      s.first = range * block;
      s.size = std::min(block, inputs - s.first);
      float* sum = partial + range * rows * stride;
      std::fill(sum, sum + rows * stride, 0.0f);
      for (int64_t j = 0; j < s.size; ++j) {
        const int64_t f = s.first + j;
        float a[MAX_ROWS];
        s.mask[j] = 0;
        for (int64_t n = 0; n < rows; ++n) {
          a[n] = wide[n * width + f];
          s.mask[j] |= (std::fabs(a[n]) >= threshold[f] && a[n] != 0.0f) << n;
        }
        if (s.mask[j]) sums.push(w + f * d, s.mask[j], a, sum);
      }
      s.count(rows, kept + range * rows, 1);
    }
    sums.finish();
  });

  W* out = data<W>(y);
  int32_t* total = data<int32_t>(counts);
  std::fill(total, total + rows, 0);
  for (int64_t i = 0; i < ranges * rows; ++i) total[i % rows] += kept[i];
  add_partials<W>(
      partial, ranges, rows, stride, d, [&](int64_t range, int64_t n) { return kept[range * rows + n] > 0; },
      [&](int64_t n, int64_t i, float sum) {
        out[n * d + i] = static_cast<W>(bias ? sum + static_cast<float>(bias[i]) : sum);
      });
}

}  // namespace moyu
