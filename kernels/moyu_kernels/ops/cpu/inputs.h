// The linear layer that reads only the weight rows of inputs in use.
#pragma once

#include <cmath>

#include "down.h"

namespace moyu {

template <class W>
void run_sparse_linear(const Tensor& x, const Tensor& weight, const W* bias, const float* threshold, Tensor& y,
                       Tensor& counts) {
  const int64_t rows = x.size(0), inputs = x.size(1), d = weight.size(1), stride = padded(d), width = padded(inputs);
  const int64_t block = inputs <= 4096 ? BLOCK / 2 : BLOCK, ranges = (inputs + block - 1) / block;
  static thread_local std::vector<float> scratch;
  static thread_local std::vector<int32_t> tally;
  scratch.resize(rows * (width + ranges * stride));
  tally.resize(ranges * rows);
  float *wide = scratch.data(), *partial = wide + rows * width;
  int32_t* kept = tally.data();
  widen_input<W, float>(x, wide, width);
  const W* w = data<const W>(weight);

  const auto select = [&](int64_t range, Selection& s) {
    s.first = std::max<int64_t>(range, 0) * block;
    s.size = range < 0 ? 0 : std::min(block, inputs - s.first);
    for (int64_t j = 0; j < s.size; ++j) {
      s.mask[j] = 0;
      for (int64_t n = 0; n < rows; ++n) {
        const float size = std::fabs(wide[n * width + s.first + j]);
        s.mask[j] |= (size >= threshold[s.first + j] && size != 0.0f) << n;
      }
    }
    s.compact();
  };
  Claims claims(ranges);
  claims.run([&](int64_t thread) {
    Selection pair[2];
    RowSums<W> sums(rows, stride, d);
    const int64_t lead = lookahead_rows<W>(d);
    int64_t range = claims.claim(thread);
    select(range, pair[0]);
    for (int turn = 0; range >= 0; turn ^= 1) {
      const int64_t later = claims.claim(thread);
      const Selection &s = pair[turn], &after = pair[turn ^ 1];
      select(later, pair[turn ^ 1]);
      float* sum = partial + range * rows * stride;
      std::fill(sum, sum + rows * stride, 0.0f);
      s.count(rows, kept + range * rows, 1);
      for (int64_t i = 0; i < s.found; ++i) {
        const int64_t f = s.first + s.list[i];
        fetch_rows(Rows<W, 2>{{w + s.neuron(i + lead, after, f) * d, w + s.neuron(i + lead / 2, after, f) * d}}, d);
        float a[MAX_ROWS];
        for (int64_t n = 0; n < rows; ++n) a[n] = wide[n * width + f];
        sums.push(w + f * d, s.mask[s.list[i]], a, sum);
      }
      range = later;
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
