// The linear layer that reads only the weight rows of inputs in use.
//
// Threads claim slabs of columns, so an output is one sum over its row's kept inputs in order, whoever computes it.
#pragma once

#include <cmath>

#include "down.h"

namespace moyu {

constexpr int64_t SLAB = 1024;  // most columns of one slab

template <class W>
void run_sparse_linear(const Tensor& x, const Tensor& weight, const W* bias, const float* threshold, Tensor& y,
                       Tensor& counts) {
  const int64_t rows = x.size(0), inputs = x.size(1), d = weight.size(1), width = padded(inputs);
  const int64_t share = padded((d + 1) / (2 * std::max<int64_t>(torch::stable::get_num_threads(), 1)));
  const int64_t slab = std::clamp(share, 2 * STEP, SLAB), slabs = (d + slab - 1) / slab;
  struct Input {
    const W* row;
    uint8_t mask;  // bit n: row n of x keeps it
    float a[MAX_ROWS];
  };
  static thread_local Scratch inputs_scratch, sums_scratch;
  static thread_local std::vector<Input> kept;
  float* wide = inputs_scratch.take(rows * width);
  read_input<W, float>(x, wide, width);
  float* sums_of_slabs = sums_scratch.take(slabs * rows * slab);
  kept.clear();
  int32_t* total = data<int32_t>(counts);
  std::fill(total, total + rows, 0);
  for (int64_t f = 0; f < inputs; ++f) {
    Input input{data<const W>(weight) + f * d, 0, {}};
    for (int64_t n = 0; n < rows; ++n) {
      input.a[n] = wide[n * width + f];
      const bool used = std::fabs(input.a[n]) >= threshold[f] && input.a[n] != 0.0f;
      input.mask |= used << n;
      total[n] += used;
    }
    if (input.mask) kept.push_back(input);
  }

  const std::vector<Input>& all = kept;
  W* out = data<W>(y);
  for_ranges(slabs, [&](int64_t i) {
    const int64_t first = i * slab, size = std::min(slab, d - first);
    float* sum = sums_of_slabs + i * rows * slab;
    std::fill(sum, sum + rows * slab, 0.0f);
    RowSums<W> sums(rows, slab, size, true);
    for (const Input& input : all) sums.push(input.row + first, input.mask, input.a, sum);
    sums.finish();
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t k = 0; k < size; ++k) {
        const float value = sum[n * slab + place<W>(k)];
        out[n * d + first + k] = static_cast<W>(bias ? value + static_cast<float>(bias[first + k]) : value);
      }
  });
}

}  // namespace moyu
