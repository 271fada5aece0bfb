// The gated FFN that reads only the rows of neurons in use.
//
// Neurons are cut into fixed ranges that the threads claim. A range writes its own fp32 partial sum, and the partial
// sums are added in the order of ranges: the result is the same with any number of threads.
#pragma once

#include <cmath>
#include <optional>

#include "predict.h"

namespace moyu {

constexpr int64_t BLOCK = 128;  // most neurons of one range
constexpr int GROUP = 8;        // down rows added in one pass over the accumulator

// The neurons of one range that some row uses: bit n of mask[j] stands for row n, list holds the j with any bit set.
struct Selection {
  int64_t first = 0, size = 0, found = 0;
  uint8_t mask[BLOCK];
  int64_t list[BLOCK];

  void compact() {
    found = 0;
    for (int64_t j = 0; j < size; ++j) {
      list[found] = j;
      found += mask[j] != 0;
    }
  }

  // Sets counts[2 * row] to the neurons of each row.
  void count(int64_t rows, int32_t* counts) const {
    for (int64_t n = 0; n < rows; ++n) {
      int32_t total = 0;
      for (int64_t j = 0; j < size; ++j) total += (mask[j] >> n) & 1;
      counts[2 * n] = total;
    }
  }
};

// The gates of all neurons, before the rule selects by them: up rows are only read where a gate passes.
template <class W>
struct GateFirst {
  const W* weight;
  Gate gate;
  const float* x;
  int64_t rows, d, stride, neurons;
  float* values;  // [rows, padded(neurons)]: x @ weight.T, in each range from its `select` on what the rule makes of it
  float mean[MAX_ROWS] = {}, deviation[MAX_ROWS] = {};

  float* row(int64_t n) const { return values + n * padded(neurons); }

  int64_t parts() const { return (neurons + chunk_rows<W>(d) - 1) / chunk_rows<W>(d); }

  void prepare(int64_t part) const {
    const int64_t begin = part * chunk_rows<W>(d), left = neurons - begin;
    stream_dots(weight + begin * d, std::min(chunk_rows<W>(d), left), left, x, rows, stride, d,
                [&](int64_t j, int64_t n, float value) { row(n)[begin + j] = value; });
  }

  // Once, after all parts.
  void measure() {
    if (!whole_row(gate.rule)) return;
    for (int64_t n = 0; n < rows; ++n) {
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
      gate.all(values, first, size, mean[n], deviation[n]);
      for (int64_t j = 0; j < size; ++j) mask[j] |= (std::fabs(values[j]) > 0.0f) << n;
    }
  }
};

template <class W>
struct Ffn {
  const W *gate, *up, *down;
  const float *threshold, *x;
  std::optional<LowRank> lowrank;
  std::optional<LowBit> lowbit;
  std::optional<GateFirst<W>> first;
  Gate ruled;
  int64_t rows, d, neurons, stride, block;

  // The neurons of a range that predictor or gate select, all of them where there is neither; none of range -1.
  void select(int64_t range, Selection& s) const {
    s.first = std::max<int64_t>(range, 0) * block;
    s.size = range < 0 ? 0 : std::min(block, neurons - s.first);
    std::fill(s.mask, s.mask + s.size, lowrank || lowbit || first ? 0 : (1 << rows) - 1);
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

  // Kept neurons whose down rows are on their way from memory, oldest first.
  struct Kept {
    static constexpr int64_t SIZE = 2 * GROUP;
    int64_t begin = 0, end = 0;
    const W* row[SIZE];
    uint8_t mask[SIZE];
    float* partial[SIZE];
    float a[SIZE][MAX_ROWS];

    const W* last_row(int64_t back) const { return row[(end - back) % SIZE]; }
  };

  // Computes the selected neurons of a range, sets its counts [rows, 2], and adds its kept down rows to its partial sum
  // [rows, stride], the last of them only in a later call or `finish`. Fetches ahead: gate (where it is not known) and
  // up of the coming neurons, into the range `after`, and each down row as soon as its neuron is kept.
  void run(Selection& s, const Selection& after, Kept& kept, float* partial, int32_t* counts) const {
    std::fill(partial, partial + rows * stride, 0.0f);
    s.count(rows, counts);
    const int64_t lead = lookahead_rows<W>(d);
    for (int64_t i = 0; i < s.found; ++i) {
      const int64_t j = s.list[i], f = s.first + j, slot = kept.end % Kept::SIZE;
      const auto later = [&](int64_t k) {
        if (k < s.found) return s.first + s.list[k];
        return k - s.found < after.found ? after.first + after.list[k - s.found] : f;
      };
      const W *nothing = up + f * d, *newest = kept.end > kept.begin ? kept.last_row(1) : nothing;
      const W* recent = kept.end - kept.begin > 2 ? kept.last_row(3) : nothing;
      const int64_t far = later(i + lead) * d, near = later(i + lead / 2) * d;
      float gates[MAX_ROWS], ups[MAX_ROWS], *a = kept.a[slot];
      if (first) {
        dots_tiled(Rows<W, 1>{{up + f * d}}, Rows<W, 4>{{up + far, up + near, newest, recent}}, x, rows, stride, d,
                   [&](int, int64_t n, float value) { ups[n] = value; });
        for (int64_t n = 0; n < rows; ++n) gates[n] = first->row(n)[f];
      } else {
        const Rows<W, 6> ahead{{gate + far, up + far, gate + near, up + near, newest, recent}};
        dots_tiled(Rows<W, 2>{{gate + f * d, up + f * d}}, ahead, x, rows, stride, d,
                   [&](int m, int64_t n, float value) { (m ? ups : gates)[n] = value; });
        for (int64_t n = 0; n < rows; ++n) gates[n] = ruled(gates[n], f);
      }
      const float least = ruled.rule == Rule::threshold ? threshold[f] : 0.0f;
      for (int64_t n = 0; n < rows; ++n) {
        a[n] = gates[n] * (ruled.rule == Rule::drelu ? std::max(ups[n], 0.0f) : ups[n]);
        if (!(std::fabs(a[n]) >= least && a[n] != 0.0f)) s.mask[j] &= ~(1 << n);
      }
      if (!s.mask[j]) continue;
      kept.row[slot] = down + f * d;
      kept.mask[slot] = s.mask[j];
      kept.partial[slot] = partial;
      if (++kept.end - kept.begin == Kept::SIZE) add_group(kept);
    }
    s.count(rows, counts + 1);
  }

  void finish(Kept& kept) const {
    while (kept.begin < kept.end) add_group(kept);
  }

  // Adds the oldest neurons, of one range, to the rows that keep them. A row's sum runs over its own neurons in order,
  // whatever the other rows keep.
  void add_group(Kept& kept) const {
    float* partial = kept.partial[kept.begin % Kept::SIZE];
    int64_t last = kept.begin + 1;
    while (last < kept.end && last < kept.begin + GROUP && kept.partial[last % Kept::SIZE] == partial) ++last;
    for (int64_t n = 0; n < rows; ++n) {
      Rows<W, GROUP> w;
      float a[GROUP];
      int taken = 0;
      for (int64_t k = kept.begin; k < last; ++k) {
        if (!((kept.mask[k % Kept::SIZE] >> n) & 1)) continue;
        w.row[taken] = kept.row[k % Kept::SIZE];
        a[taken++] = kept.a[k % Kept::SIZE][n];
      }
      float* acc = partial + n * stride;
      if (taken == GROUP) {
        add_rows(acc, a, w, d);
      } else {
        for (int k = 0; k < taken; ++k) add_rows(acc, a + k, Rows<W, 1>{{w.row[k]}}, d);
      }
    }
    kept.begin = last;
  }
};

template <class W>
void run_ffn(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down, const Tensor& threshold,
             Act act, const std::vector<Tensor>& predictor, Rule rule, Tensor& y, Tensor& counts) {
  const int64_t rows = x.size(0), d = x.size(1), neurons = gate.size(0), stride = padded(d);
  const bool lowrank = predictor.size() == 5, lowbit = predictor.size() == 6;
  const bool gate_first = predictor.empty() && rule != Rule::threshold;
  const int64_t rank = lowrank ? predictor[0].size(0) : 0, hidden_stride = padded(rank);
  const int64_t code_bytes = lowbit ? predictor[0].size(1) : 0, planes = planes_of(d, code_bytes);
  const int64_t plane = plane_of(d, planes);
  const int64_t block = neurons <= 4096 ? BLOCK / 2 : BLOCK;
  const int64_t ranges = (neurons + block - 1) / block;
  static thread_local std::vector<float> scratch;
  static thread_local std::vector<int32_t> range_counts;
  static thread_local std::vector<int8_t> rounded;
  scratch.resize(rows * (2 * stride + hidden_stride + ranges * stride + (gate_first ? padded(neurons) : 0)));
  range_counts.resize(ranges * rows * 2);
  float *wide = scratch.data(), *plain = wide + rows * stride, *hidden = plain + rows * stride,
        *partial = hidden + rows * hidden_stride, *gates = partial + rows * ranges * stride;
  int32_t *tally = range_counts.data(), sums[MAX_ROWS] = {};
  float steps[MAX_ROWS];
  widen_input<W>(x, wide, stride);

  Ffn<W> ffn{data<const W>(gate),
             data<const W>(up),
             data<const W>(down),
             data<const float>(threshold),
             wide,
             std::nullopt,
             std::nullopt,
             std::nullopt,
             Gate{act, rule, data<const float>(threshold)},
             rows,
             d,
             neurons,
             stride,
             block};
  if (lowrank || lowbit) widen_input<W, int8_t>(x, plain, stride);
  const auto floats = [&](int i) { return data<const float>(predictor[i]); };
  if (lowrank) {
    std::fill(hidden, hidden + rows * hidden_stride, 0.0f);
    ffn.lowrank = LowRank{data<const int8_t>(predictor[0]), data<const int8_t>(predictor[2]), floats(1), floats(3),
                          floats(4), plain, rank, rows, d, stride, neurons, hidden, hidden_stride};
  }
  if (lowbit) {
    rounded.assign(rows * planes * plane, 0);
    for (int64_t n = 0; n < rows; ++n)
      steps[n] = round_row(plain + n * stride, d, planes, rounded.data() + n * planes * plane, sums[n]);
    ffn.lowbit = LowBit{data<const uint8_t>(predictor[0]), data<const uint8_t>(predictor[2]), floats(1), floats(3),
                        floats(4), floats(5), Rounded{rounded.data(), planes, code_bytes, plane, steps, sums}, rows,
                        neurons, ffn.ruled};
  }
  if (gate_first) ffn.first = GateFirst<W>{ffn.gate, ffn.ruled, wide, rows, d, stride, neurons, gates};
  const int64_t parts = ffn.parts();
  Claims claims(ranges), part_claims(parts);
  std::atomic<int64_t> parts_done{0};
  std::atomic<bool> ready{parts == 0};
  claims.run([&](int64_t thread) {
    Selection pair[2];
    typename Ffn<W>::Kept kept;
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
      ffn.run(pair[turn], pair[turn ^ 1], kept, partial + range * rows * stride, tally + range * rows * 2);
      range = after;
    }
    ffn.finish(kept);
  });

  W* out = data<W>(y);
  int32_t* total = data<int32_t>(counts);
  std::fill(total, total + rows * 2, 0);
  for (int64_t i = 0; i < ranges * rows * 2; ++i) total[i % (rows * 2)] += tally[i];
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / (ranges * STEP));
  torch::stable::parallel_for(0, rows * stride / STEP, grain, [&](int64_t begin, int64_t end) {
    for (int64_t step = begin; step < end; ++step) {
      const int64_t n = step * STEP / stride, i = step * STEP % stride;
      float total[STEP] = {};
      for (int64_t range = 0; range < ranges; ++range) {
        if (!tally[(range * rows + n) * 2 + 1]) continue;
        const float* part = partial + (range * rows + n) * stride + i;
        for (int64_t k = 0; k < STEP; ++k) total[k] += part[k];
      }
      for (int64_t k = 0; k < std::min(STEP, d - i); ++k) out[n * d + i + k] = static_cast<W>(total[place<W>(k)]);
    }
  });
}

}  // namespace moyu
