// Linear layers and attention for a few tokens.
#pragma once

#include <algorithm>
#include <cmath>

#include "common.h"

namespace moyu {

// Several layers on one input: y [N, all outputs] holds theirs side by side, x and y of type X, weights of type W.
// scales: [all outputs], of the rows of the weights, where W is int8.
template <class X, class W>
void run_linears(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                 const float* scales, Tensor& y) {
  const int64_t rows = x.size(0), d = x.size(1), stride = padded(d), width = y.size(1);
  static thread_local Scratch scratch;
  Streamed<W>* input = scratch.take<Streamed<W>>(rows * stride);
  read_input<X, W, Pace::waits>(x, input, stride);
  struct Range {
    Matrix<W> weight;
    const X* bias;
    X* out;
    int64_t count, left;  // rows of this range, and to the end of the matrix
  };
  static thread_local std::vector<Range> ranges;
  ranges.clear();
  const int64_t step = chunk_rows<W>(d);
  X* out = data<X>(y);
  for (size_t layer = 0; layer < weights.size(); ++layer) {
    const W* weight = data<const W>(weights[layer]);
    const X* bias = biases.empty() ? nullptr : data<const X>(biases[layer]);
    const int64_t outputs = weights[layer].size(0);
    for (int64_t row = 0; row < outputs; row += step)
      ranges.push_back({{weight + row * d, d, scales ? scales + row : nullptr},
                        bias ? bias + row : nullptr,
                        out + row,
                        std::min(step, outputs - row),
                        outputs - row});
    out += outputs;
    if (scales) scales += outputs;
  }
  const Range* all = ranges.data();
  for_ranges(ranges.size(), [&](int64_t i) {
    const Range& range = all[i];
    const auto put = [&](int64_t row, int64_t n, float dot) {
      const float value = range.weight.scaled(dot, row);
      const float sum = range.bias ? value + static_cast<float>(range.bias[row]) : value;
      range.out[n * width + row] = static_cast<X>(sum);
    };
    stream_dots(range.weight.rows, d, range.count, range.left, input, rows, stride, d, put);
  });
}

// One query head against the positions first .. last of its key and value rows [positions, d].
template <class W>
void attend_head(const W* k, const W* v, const float* q, const uint8_t* mask, int64_t first, int64_t last, int64_t d,
                 float scale, float* scores, float* acc) {
  float top = -INFINITY;
  for (int64_t p = first; p < last; p += 4)
    dots_tiled(rows_from<4>(k, d, p, last), Rows<W, 0>(), q, 1, 0, d, [&](int m, int64_t, float value) {
      if (p + m >= last) return;
      scores[p + m] = mask[p + m] ? value * scale : -INFINITY;
      top = std::max(top, scores[p + m]);
    });
  float total = 0.0f;
  int64_t p = first;
  for (; p + LANES <= last; p += LANES) {
    const Vec e = exp_negative(load(scores + p) - top);
    store(scores + p, e);
    total += sum(e);
  }
  for (; p < last; ++p) total += scores[p] = std::exp(scores[p] - top);
  for (p = first; p < last; ++p) scores[p] /= total;
  for (p = first; p + 4 <= last; p += 4) add_rows(acc, scores + p, rows_from<4>(v, d, p, last), Rows<W, 0>(), d);
  for (; p < last; ++p) add_rows(acc, scores + p, rows_from<1>(v, d, p, last), Rows<W, 0>(), d);
}

template <class W>
void run_attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, float scale, bool skip_zero,
                Tensor& y) {
  const int64_t batch = q.size(0), heads = q.size(1), d = q.size(3), stride = padded(d);
  const int64_t groups = heads / k.size(1), positions = k.size(2);
  const int64_t mask_stride = mask.size(0) == 1 ? 0 : mask.stride(0);
  static thread_local Scratch scratch;
  float* wide = scratch.take(batch * heads * (2 * stride + positions));
  float *acc = wide + batch * heads * stride, *scores = acc + batch * heads * stride;
  std::fill(wide, scores, 0.0f);
  const W* query = data<const W>(q);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < d; ++i)
        wide[(b * heads + h) * stride + place<W>(i)] =
            static_cast<float>(query[b * q.stride(0) + h * q.stride(1) + i * q.stride(3)]);
  const W *keys = data<const W>(k), *values = data<const W>(v);
  W* out = data<W>(y);
  for_ranges(batch * heads, [&](int64_t item) {
    const float* own = wide + item * stride;
    if (skip_zero && std::all_of(own, own + stride, [](float value) { return value == 0.0f; })) {
      std::fill_n(out + item * d, d, static_cast<W>(0.0f));
      return;
    }
    const int64_t row = item / groups * positions * d;
    const uint8_t* seen = data<const uint8_t>(mask) + item / heads * mask_stride;
    int64_t first = 0, last = positions;
    while (first < last && !seen[first]) ++first;
    while (first < last && !seen[last - 1]) --last;
    float* sum = acc + item * stride;
    attend_head(keys + row, values + row, own, seen, first, last, d, scale, scores + item * positions,
                sum);
    for (int64_t i = 0; i < d; ++i) out[item * d + i] = static_cast<W>(sum[place<W>(i)]);
  });
}

}  // namespace moyu
