// The gated or plain FFN that reads only the rows of neurons in use.
#pragma once

#include <cmath>
#include <optional>

#include "down.h"
#include "gate.h"
#include "predict.h"

namespace moyu {

template <class W>
struct Ffn {
  Matrix<W> gate, up, down;
  bool plain;  // then up stands for the gate, and nothing for up
  const float *threshold, *x;
  const uint8_t* given;  // [neurons]: the mask, where it was known before the call, else null
  std::optional<LowRank> lowrank;
  std::optional<LowBit> lowbit;
  std::optional<GateFirst<W>> first;
  Gate ruled;
  int64_t rows, d, neurons, stride, block;

  // The neurons of a range that predictor or gate select, all of them where there is neither; none of range -1.
  void select(int64_t range, Selection& s) const {
    s.first = std::max<int64_t>(range, 0) * block;
    s.size = range < 0 ? 0 : std::min(block, neurons - s.first);
    const uint8_t all = (1 << rows) - 1;
    std::fill(s.mask, s.mask + s.size, lowrank || lowbit || first ? 0 : all);
    for (int64_t j = 0; given && j < s.size; ++j) s.mask[j] = given[s.first + j] & all;
    if (lowrank) lowrank->select<BLOCK>(s.first, s.size, block, s.mask);
    if (lowbit && s.size) lowbit->select<BLOCK>(s.first, s.size, block, s.mask);
    if (first) first->select(s.first, s.size, s.mask);
    s.compact();
  }

  // What must be done before the first `select`, in parts.
  int64_t parts() const { return lowrank ? lowrank->parts() : first ? first->parts() : 0; }

  void prepare(int64_t part) const {
    if (lowrank) lowrank->prepare(part);
    if (first) first->prepare(part);
  }

  // Computes the selected neurons of a range, sets its counts [rows, 2], and adds its kept down rows to its partial sum
  // [rows, stride], the last of them only in a later call or `finish`. Fetches ahead: rows in front of the activation of
  // the coming neurons, into the range `after`, and down rows as soon as their neurons are kept.
  void run(Selection& s, const Selection& after, RowSums<W>& sums, float* partial, int32_t* counts) const {
    const bool known = first && first->known();
    std::fill(partial, partial + rows * stride, 0.0f);
    s.count(rows, counts, 2);
    for (int64_t n = 0; known && n < rows; ++n) counts[2 * n] = static_cast<int32_t>(s.size);
    const bool pairs = !first && !plain;
    const Matrix<W>* front[] = {first ? &up : &gate, &up};
    const int64_t group = known ? 1 : pairs ? FRONT / 2 : FRONT;
    const int64_t lead = std::max(group, lookahead_rows<W>((pairs ? 3 : 2) * d));
    for (int64_t i = 0; i < s.found; i += group) {
      const int64_t size = std::min(group, s.found - i), last = s.first + s.list[i + size - 1];
      Rows<W, FRONT> now;
      Rows<W, FRONT + 2> ahead;
      float dots[FRONT][MAX_ROWS];  // gates of two neurons and their ups, or of four neurons what is read of them
      for (int64_t m = 0; !known && m < FRONT; ++m) {
        const Matrix<W>* matrix = front[m / group];
        now.row[m] = matrix->row(s.neuron(std::min(i + m % group, s.found - 1), after, last));
        ahead.row[m] = matrix->row(s.neuron(i + m % group + lead, after, last));
      }
      for (int m = 0; m < 2; ++m) ahead.row[FRONT + m] = sums.pending(m + 1, front[0]->row(last));
      if (!known)
        dots_tiled(now, ahead, x, rows, stride, d, [&](int m, int64_t n, float value) { dots[m][n] = value; });
      for (int64_t k = 0; k < size; ++k) {
        const int64_t j = s.list[i + k], f = s.first + j;
        const float least = ruled.rule == Rule::threshold ? threshold[f] : 0.0f;
        float a[MAX_ROWS];
        for (int64_t n = 0; n < rows; ++n) {
          a[n] = known ? first->row(n)[f] : activation(f, n, dots[k][n], dots[(k + group) % FRONT][n]);
          if (!(std::fabs(a[n]) >= least && a[n] != 0.0f)) s.mask[j] &= ~(1 << n);
          a[n] = down.scaled(a[n], f);
        }
        if (s.mask[j]) sums.push(down.row(f), s.mask[j], a, partial);
      }
    }
    s.count(rows, counts + 1, 2);
  }

  // Of neuron f and row n, by its dot products: with a gate that is known that of up, else gate's and, not of a plain
  // FFN, up's.
  float activation(int64_t f, int64_t n, float dot, float other) const {
    if (plain) return ruled(gate.output(dot, f), f);
    const float u = up.scaled(first ? dot : other, f), g = first ? first->row(n)[f] : ruled(gate.scaled(dot, f), f);
    return g * (ruled.rule == Rule::drelu ? std::max(u, 0.0f) : u);
  }
};

// What an op is given beside x. Of a plain FFN `gate` is up and `up` is not used.
struct FfnArguments {
  const Tensor &gate, &up, &down;
  bool plain;
  const float *scales, *columns;       // of int8 rows: [matrices, neurons], of down's last; [d], of down's columns
  const float *gate_bias, *down_bias;  // of a plain FFN, [neurons] and [d], or null
  const Tensor& threshold;
  Act act;
  const std::vector<Tensor>& predictor;
  Rule rule;
  int64_t keep;
};

// x and y of type X on weights of type W.
template <class X, class W>
void run_ffn(const Tensor& x, const FfnArguments& given, Tensor& y, Tensor& counts) {
  const int64_t rows = x.size(0), d = x.size(1), neurons = given.gate.size(0), stride = padded(d);
  const std::vector<Tensor>& predictor = given.predictor;
  const bool lowrank = predictor.size() == 5, lowbit = predictor.size() == 6 || predictor.size() == 4;
  const bool gate_first = predictor.empty() && (given.plain ? whole_row(given.rule) : given.rule != Rule::threshold);
  const int64_t rank = lowrank ? predictor[0].size(0) : 0, hidden_stride = padded(rank);
  const int64_t code_bytes = lowbit ? predictor[0].size(1) : 0, planes = planes_of(d, code_bytes);
  const int64_t plane = plane_of(d, planes);
  const int64_t block = std::clamp((neurons + 64 * RANGES - 1) / (64 * RANGES) * 64, BLOCK / 4, BLOCK);
  const int64_t ranges = (neurons + block - 1) / block;
  static thread_local Scratch scratch, inputs, codes;
  static thread_local std::vector<int32_t> range_counts;
  range_counts.resize(ranges * rows * 2);
  float* wide = scratch.take(rows * (2 * stride + hidden_stride + ranges * stride + (gate_first ? padded(neurons) : 0)));
  float *ordered = wide + rows * stride, *hidden = ordered + rows * stride, *partial = hidden + rows * hidden_stride,
        *gates = partial + rows * ranges * stride;
  int32_t *tally = range_counts.data(), sums[MAX_ROWS] = {};
  float steps[MAX_ROWS], norms[MAX_ROWS];
  read_input<X, W>(x, wide, stride);

  const auto matrix = [&](const Tensor& rows, int64_t which) {
    return Matrix<W>{data<const W>(rows), rows.stride(0), given.scales ? given.scales + which * neurons : nullptr};
  };
  Matrix<W> front = matrix(given.gate, 0);
  front.bias = given.gate_bias;
  Ffn<W> ffn{front,
             matrix(given.up, given.plain ? 0 : 1),
             matrix(given.down, given.plain ? 1 : 2),
             given.plain,
             data<const float>(given.threshold),
             wide,
             predictor.size() == 1 ? data<const uint8_t>(predictor[0]) : nullptr,
             std::nullopt,
             std::nullopt,
             std::nullopt,
             Gate{given.act, given.rule, data<const float>(given.threshold)},
             rows,
             d,
             neurons,
             stride,
             block};
  if (lowrank || lowbit) read_input<X, int8_t>(x, ordered, stride);
  const auto floats = [&](int i) { return data<const float>(predictor[i]); };
  if (lowrank) {
    std::fill(hidden, hidden + rows * hidden_stride, 0.0f);
    ffn.lowrank = LowRank{data<const int8_t>(predictor[0]), data<const int8_t>(predictor[2]), floats(1), floats(3),
                          floats(4), ordered, rank, rows, d, stride, neurons, hidden, hidden_stride};
  }
  if (lowbit) {
    int8_t* rounded = codes.take<int8_t>(rows * planes * plane);
    std::fill(rounded, rounded + rows * planes * plane, int8_t{0});
    for (int64_t n = 0; n < rows; ++n)
      steps[n] = round_row(ordered + n * stride, d, planes, rounded + n * planes * plane, sums[n], norms[n]);
    const size_t last = predictor.size() - 2;
    ffn.lowbit = LowBit{data<const uint8_t>(predictor[0]),
                        given.plain ? nullptr : data<const uint8_t>(predictor[2]),
                        floats(1),
                        floats(3),
                        floats(last),
                        floats(last + 1),
                        given.gate_bias,
                        Rounded{rounded, planes, code_bytes, plane, steps, norms, sums},
                        rows,
                        neurons,
                        ffn.ruled};
  }
  if (gate_first) {
    auto* streamed = inputs.take<Streamed<W>>(rows * stride);
    read_input<X, W, Pace::waits>(x, streamed, stride);
    ffn.first = GateFirst<W>{ffn.gate, ffn.up, given.plain, ffn.ruled, streamed, rows, d,
                             stride,   neurons, given.keep, gates};
  }
  const int64_t parts = ffn.parts();
  Claims claims(ranges), part_claims(parts);
  std::atomic<int64_t> parts_done{0};
  std::atomic<bool> ready{parts == 0};
  claims.run([&](int64_t thread) {
    Selection pair[2];
    RowSums<W> sums(rows, stride, d, ffn.first && ffn.first->known());
    int64_t range = claims.claim(thread);
    for (int64_t part; (part = part_claims.claim(thread)) >= 0;) {
      ffn.prepare(part);
      if (parts_done.fetch_add(1, std::memory_order_acq_rel) + 1 < parts) continue;
      if (ffn.first) ffn.first->measure();
      ready.store(true, std::memory_order_release);
    }
    // What is not done now is being done by a thread that runs: this cannot wait for ever.
    for (int spins = 0; !ready.load(std::memory_order_acquire); ++spins) pause(spins);
    ffn.select(range, pair[0]);
    for (int turn = 0; range >= 0; turn ^= 1) {
      const int64_t after = claims.claim(thread);
      ffn.select(after, pair[turn ^ 1]);
      ffn.run(pair[turn], pair[turn ^ 1], sums, partial + range * rows * stride, tally + range * rows * 2);
      range = after;
    }
    sums.finish();
  });

  X* out = data<X>(y);
  int32_t* total = data<int32_t>(counts);
  std::fill(total, total + rows * 2, 0);
  for (int64_t i = 0; i < ranges * rows * 2; ++i) total[i % (rows * 2)] += tally[i];
  const auto used = [&](int64_t range, int64_t n) { return tally[(range * rows + n) * 2 + 1] > 0; };
  add_partials<W>(partial, ranges, rows, stride, d, used, [&](int64_t n, int64_t i, float sum) {
    const float value = given.columns ? sum * given.columns[i] : sum;
    out[n * d + i] = static_cast<X>(given.down_bias ? value + given.down_bias[i] : value);
  });
}

}  // namespace moyu
