// Sums of weight rows, each row of the input over its own: the down projection of the neurons in use.
//
// Neurons are cut into fixed ranges that the threads claim. A range writes its own fp32 partial sum, and the partial
// sums are added in the order of ranges: the result is the same with any number of threads.
#pragma once

#include "common.h"

namespace moyu {

constexpr int64_t BLOCK = 512;  // most neurons of one range
constexpr int64_t RANGES = 32;   // and how many of them there are in mid-sized FFNs: enough for as many threads
constexpr int FRONT = 4;        // rows in front of the activation that are multiplied at once
constexpr int GROUP = 8;        // most rows added in one pass over the accumulator, as `RowSums` has it

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

  // The k-th neuron in use from here on, into the range `after`; neuron `last` where there are no more.
  int64_t neuron(int64_t k, const Selection& after, int64_t last) const {
    if (k < found) return first + list[k];
    return k - found < after.found ? after.first + after.list[k - found] : last;
  }

  // Sets counts[step * row] to the neurons of each row.
  void count(int64_t rows, int32_t* counts, int64_t step) const {
    for (int64_t n = 0; n < rows; ++n) {
      int32_t total = 0;
      for (int64_t j = 0; j < size; ++j) total += (mask[j] >> n) & 1;
      counts[step * n] = total;
    }
  }
};

// Adds the kept rows to the partial sums [rows, stride] of their ranges, a few at a time, oldest first: meanwhile the
// others are on their way from memory, which is up to the caller or, with `fetch`, done here.
template <class W>
class RowSums {
 public:
  RowSums(int64_t rows, int64_t stride, int64_t d, bool fetch) : rows_(rows), stride_(stride), d_(d), fetch_(fetch) {}

  // The row that was pushed `back` pushes ago and is not added yet; `otherwise` where there is none.
  const W* pending(int64_t back, const W* otherwise) const {
    return end_ - begin_ >= back ? row_[(end_ - back) % SIZE] : otherwise;
  }

  // a [rows]: factors; mask: which of the rows it is added to.
  void push(const W* row, uint8_t mask, const float* a, float* partial) {
    const int64_t slot = end_ % SIZE;
    row_[slot] = row;
    mask_[slot] = mask;
    partial_[slot] = partial;
    std::copy(a, a + rows_, a_[slot]);
    if (++end_ - begin_ == SIZE) add_group();
  }

  void finish() {
    while (begin_ < end_) add_group();
  }

 private:
  static constexpr int64_t SIZE = 2 * GROUP;

  // Adds the oldest ones, of one range, to the rows that keep them. A row's sum runs over its own neurons in order,
  // whatever the other rows keep.
  void add_group() {
    float* partial = partial_[begin_ % SIZE];
    int64_t last = begin_ + 1;
    while (last < end_ && last < begin_ + GROUP && partial_[last % SIZE] == partial) ++last;
    Rows<W, GROUP> ahead;
    for (int m = 0; m < GROUP; ++m) ahead.row[m] = row_[std::min(last + m, end_ - 1) % SIZE];
    bool fetch = fetch_;
    for (int64_t n = 0; n < rows_; ++n) {
      const W* row[GROUP];
      float a[GROUP];
      int taken = 0, added = 0;
      for (int64_t k = begin_; k < last; ++k) {
        if (!((mask_[k % SIZE] >> n) & 1)) continue;
        row[taken] = row_[k % SIZE];
        a[taken++] = a_[k % SIZE][n];
      }
      const auto add = [&](auto size) {
        Rows<W, decltype(size)::value> w;
        if (!(taken & decltype(size)::value)) return;
        for (const W*& next : w.row) next = row[added++];
        const float* factors = a + added - decltype(size)::value;
        if (fetch)
          add_rows(partial + n * stride_, factors, w, ahead, d_);
        else
          add_rows(partial + n * stride_, factors, w, Rows<W, 0>(), d_);
        fetch = false;
      };
      add(std::integral_constant<int, 8>());
      add(std::integral_constant<int, 4>());
      add(std::integral_constant<int, 2>());
      add(std::integral_constant<int, 1>());
    }
    begin_ = last;
  }

  int64_t rows_, stride_, d_, begin_ = 0, end_ = 0;
  bool fetch_;
  const W* row_[SIZE];
  uint8_t mask_[SIZE];
  float* partial_[SIZE];
  float a_[SIZE][MAX_ROWS];
};

// out(row, column, sum) of the partial sums [ranges, rows, stride] of those ranges that used(range, row) says.
template <class W, class Used, class Out>
void add_partials(const float* partial, int64_t ranges, int64_t rows, int64_t stride, int64_t d, Used used, Out out) {
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / (ranges * STEP));
  torch::stable::parallel_for(0, rows * stride / STEP, grain, [&](int64_t begin, int64_t end) {
    for (int64_t step = begin; step < end; ++step) {
      const int64_t n = step * STEP / stride, i = step * STEP % stride;
      float total[STEP] = {};
      for (int64_t range = 0; range < ranges; ++range) {
        if (!used(range, n)) continue;
        const float* part = partial + (range * rows + n) * stride + i;
        for (int64_t k = 0; k < STEP; ++k) total[k] += part[k];
      }
      for (int64_t k = 0; k < std::min(STEP, d - i); ++k) out(n, i + k, total[place<W>(k)]);
    }
  });
}

}  // namespace moyu
