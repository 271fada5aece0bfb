// The gates of all neurons, before the rule selects by them: up rows are only read where a gate passes. The rule topk
// ranks whole activations, so it reads all up rows here too. In a plain FFN up stands for the gate, and nothing for up.
#pragma once

#include <functional>

#include "rules.h"

namespace moyu {

template <class W>
struct GateFirst {
  Matrix<W> weight, up;
  bool plain;
  Gate gate;
  const Streamed<W>* x;
  int64_t rows, d, stride, neurons, keep;
  float* values;  // [rows, padded(neurons)]: x @ weight.T, in each range from its `select` on what the rule makes of it;
                  // under topk the activation
  float mean[MAX_ROWS] = {}, deviation[MAX_ROWS] = {}, least[MAX_ROWS] = {};

  float* row(int64_t n) const { return values + n * padded(neurons); }

  // Whether `values` are activations before the rule selects.
  bool complete() const { return gate.rule == Rule::topk; }

  // Whether no row of gate or up has to be read any more.
  bool known() const { return plain || complete(); }

  int64_t parts() const { return (neurons + chunk_rows<W>(d) - 1) / chunk_rows<W>(d); }

  void prepare(int64_t part) const {
    const int64_t begin = part * chunk_rows<W>(d), left = neurons - begin, count = std::min(chunk_rows<W>(d), left);
    stream_dots(weight.row(begin), weight.step, count, left, x, rows, stride, d,
                [&](int64_t j, int64_t n, float value) { row(n)[begin + j] = weight.output(value, begin + j); });
    if (!complete()) return;
    if (plain) {
      for (int64_t n = 0; n < rows; ++n)
        for (int64_t f = begin; f < begin + count; ++f) row(n)[f] = gate(row(n)[f], f);
      return;
    }
    stream_dots(up.row(begin), up.step, count, left, x, rows, stride, d, [&](int64_t j, int64_t n, float value) {
      float& a = row(n)[begin + j];
      a = gate(a, begin + j) * up.scaled(value, begin + j);
    });
  }

  // What topk ranks by; what is no number comes last.
  float rank(int64_t n, int64_t f) const {
    const float ratio = std::fabs(row(n)[f]) / gate.threshold[f];
    return ratio >= 0.0f ? ratio : -1.0f;
  }

  // Once, after all parts.
  void measure() {
    if (!whole_row(gate.rule)) return;
    static thread_local std::vector<float> ranks;
    for (int64_t n = 0; n < rows; ++n) {
      if (complete()) {
        ranks.resize(neurons);
        for (int64_t f = 0; f < neurons; ++f) ranks[f] = rank(n, f);
        std::nth_element(ranks.begin(), ranks.begin() + keep - 1, ranks.end(), std::greater<float>());
        least[n] = ranks[keep - 1];
        continue;
      }
      double sum = 0.0, squares = 0.0;
      for (int64_t f = 0; f < neurons; ++f) sum += row(n)[f];
      const double middle = sum / neurons;
      for (int64_t f = 0; f < neurons; ++f) squares += (row(n)[f] - middle) * (row(n)[f] - middle);
      mean[n] = static_cast<float>(middle);
      deviation[n] = static_cast<float>(std::sqrt(squares / (neurons - 1)));
    }
  }

  // As LowRank::select.
  void select(int64_t first, int64_t size, uint8_t* mask) const {
    for (int64_t n = 0; n < rows; ++n) {
      float* values = row(n) + first;
      if (!complete()) gate.all(values, first, size, mean[n], deviation[n]);
      for (int64_t j = 0; j < size; ++j) {
        const bool ranked = !complete() || rank(n, first + j) >= least[n];
        mask[j] |= (ranked && std::fabs(values[j]) > 0.0f) << n;
      }
    }
  }
};

}  // namespace moyu
