// Native CPU kernels of the moyu ops. The schemas, their fake versions and the definition to compare with are in Python.
//
// Work is cut into fixed ranges of neurons (or output rows) that the threads claim one by one. Each range writes its own
// fp32 partial sum, and the partial sums are added in range order: the result is the same with any number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "simd.h"

namespace moyu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t BLOCK = 128;         // most neurons of one range
constexpr int64_t MAX_ROWS = 8;        // tokens of one call: one bit each in a byte of the mask
constexpr int GROUP = 8;               // down rows added in one pass over the accumulator
constexpr int64_t CHUNK = 1 << 14;     // bytes of weights that a thread claims at once in linear
constexpr int64_t LOOKAHEAD = 1 << 13; // bytes of gate, and of up, that are fetched before their use

// ---------------------------------------------------------------------------------------------------------- checks

template <class... Text>
[[noreturn]] void fail(const Text&... text) {
  std::ostringstream message;
  (message << ... << text);
  throw std::runtime_error(message.str());
}

// torch's own macro would begin every message with this file's name.
#define REQUIRE(condition, ...) \
  if (!(condition)) fail(__VA_ARGS__)

std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Char: return "int8";
    case ScalarType::Double: return "float64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

void check(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& shape, ScalarType dtype) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  std::ostringstream wanted;
  wanted << "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    same = same && t.size(i) == shape[i];
    wanted << (i ? ", " : "") << shape[i];
  }
  wanted << "]";
  REQUIRE(same, op, ": ", name, " has shape ", shape_of(t), ", expected ", wanted.str(), " to agree with x and "
                  "the other weights; pass tensors of one FFN block");
  REQUIRE(t.scalar_type() == dtype, op, ": ", name, " is ", dtype_name(t.scalar_type()), ", expected ",
                  dtype_name(dtype), "; convert it with .to()");
  REQUIRE(t.is_contiguous(), op, ": ", name, " ", shape_of(t), " is not contiguous; the kernel reads whole rows, "
                  "so store it contiguous once instead of passing a view");
}

void check_input(const char* op, const Tensor& x) {
  REQUIRE(x.dim() == 2 && x.size(0) >= 1 && x.size(0) <= MAX_ROWS && x.size(1) >= 1, op, ": x has shape ",
                  shape_of(x), ", expected [N, D] with N from 1 to ", MAX_ROWS,
                  "; use the dense matmul for more rows");
}

// ---------------------------------------------------------------------------------------------------------- helpers

// Hands out 0 .. count to the threads: each first takes its own contiguous share in order, as the hardware prefetcher
// likes it, then helps with the others' shares.
class Claims {
 public:
  explicit Claims(int64_t count)
      : count_(count), threads_(std::clamp<int64_t>(torch::stable::get_num_threads(), 1, MAX_THREADS)) {
    for (int64_t t = 0; t < threads_; ++t) next_[t].value.store(count_ * t / threads_, std::memory_order_relaxed);
  }

  // The next item for a thread, or -1 when none is left.
  int64_t claim(int64_t thread) {
    for (int64_t k = 0; k < threads_; ++k) {
      const int64_t t = (thread + k) % threads_, end = count_ * (t + 1) / threads_;
      if (next_[t].value.load(std::memory_order_relaxed) >= end) continue;
      const int64_t i = next_[t].value.fetch_add(1, std::memory_order_relaxed);
      if (i < end) return i;
    }
    return -1;
  }

  // Calls worker(thread) on every thread.
  template <class F>
  void run(const F& worker) const {
    torch::stable::parallel_for(0, std::min(threads_, count_), 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) worker(thread);
    });
  }

 private:
  static constexpr int64_t MAX_THREADS = 128;
  int64_t count_, threads_;
  struct alignas(LINE) Next {
    std::atomic<int64_t> value;
  } next_[MAX_THREADS];
};

template <class F>
void for_ranges(int64_t count, const F& work) {
  Claims claims(count);
  claims.run([&](int64_t thread) {
    for (int64_t i; (i = claims.claim(thread)) >= 0;) work(i);
  });
}

inline void pause(int spins) {
  if (spins > 1000) return std::this_thread::yield();
#if defined(__x86_64__)
  _mm_pause();
#endif
}

inline void fetch_bytes(const void* p, int64_t size) {
  for (int64_t byte = 0; byte < size; byte += LINE) __builtin_prefetch(static_cast<const char*>(p) + byte, 0, 2);
}

// x as fp32 in the order that weights of type `As` ask for, rows padded with zeros to whole steps.
template <class W, class As = W>
void widen_input(const Tensor& x, float* out, int64_t stride) {
  const W* p = static_cast<const W*>(x.data_ptr());
  const int64_t rows = x.size(0), d = x.size(1), sn = x.stride(0), sd = x.stride(1);
  std::fill(out, out + rows * stride, 0.0f);
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t i = 0; i < d; ++i) out[n * stride + place<As>(i)] = static_cast<float>(p[n * sn + i * sd]);
}

// Rows row .. row + M of a matrix; those past its end repeat the last one.
template <int M, class W>
Rows<W, M> rows_from(const W* base, int64_t d, int64_t row, int64_t end) {
  Rows<W, M> rows;
  for (int m = 0; m < M; ++m) rows.row[m] = base + std::min(row + m, end - 1) * d;
  return rows;
}

enum class Act { silu, relu, gelu, gelu_tanh };

Act parse_act(const std::string& name) {
  if (name == "silu") return Act::silu;
  if (name == "relu") return Act::relu;
  if (name == "gelu") return Act::gelu;
  if (name == "gelu_tanh") return Act::gelu_tanh;
  REQUIRE(false, "gated_ffn: activation '", name, "' is unknown; use silu, relu, gelu or gelu_tanh");
}

inline float activate(Act act, float g) {
  switch (act) {
    case Act::silu: return g / (1.0f + std::exp(-g));
    case Act::relu: return g > 0.0f ? g : 0.0f;
    case Act::gelu: return 0.5f * g * (1.0f + std::erf(g * 0.70710678f));
    default: return 0.5f * g * (1.0f + std::tanh(0.79788456f * (g + 0.044715f * g * g * g)));
  }
}

template <class F>
void dispatch(ScalarType dtype, const char* op, const F& call) {
  switch (dtype) {
    case ScalarType::Float: return call(float());
    case ScalarType::BFloat16: return call(BFloat16());
    case ScalarType::Half: return call(Half());
    default:
      REQUIRE(false, op, ": x is ", dtype_name(dtype), ", supported are bfloat16, float16 and float32; convert "
                      "the model with .to()");
  }
}

// -------------------------------------------------------------------------------------------------------- gated FFN

struct Predictor {
  const int8_t *w1, *w2;
  const float *s1, *s2, *bias;
  int64_t rank;
};

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

template <class W>
struct Ffn {
  const W *gate, *up, *down;
  const float *threshold, *x, *hidden;
  std::optional<Predictor> predictor;
  Act act;
  int64_t rows, d, neurons, stride, hidden_stride, block;

  // Rows r .. end of the predictor's first matrix: writes them to `out` [rows, hidden_stride]. plain: x in plain order.
  void hidden_rows(int64_t r, int64_t end, const float* plain, float* out) const {
    for (; r < end; r += 4)
      dots_tiled(rows_from<4>(predictor->w1, d, r, end), Rows<int8_t, 0>(), plain, rows, stride, d,
                 [&](int m, int64_t n, float value) {
                   const int64_t j = std::min(r + m, end - 1);
                   out[n * hidden_stride + j] = value * predictor->s1[j];
                 });
  }

  // The selected neurons of a range, all of them without a predictor; none of range -1.
  void select(int64_t range, Selection& s) const {
    s.first = std::max<int64_t>(range, 0) * block;
    s.size = range < 0 ? 0 : std::min(block, neurons - s.first);
    std::fill(s.mask, s.mask + s.size, predictor ? 0 : (1 << rows) - 1);
    if (predictor) {
      const int64_t end = s.first + s.size, rank = predictor->rank;
      float scores[MAX_ROWS][BLOCK];
      for (int64_t f = s.first; f < end; f += 4)
        dots_tiled(rows_from<4>(predictor->w2, rank, f, end), Rows<int8_t, 0>(), hidden, rows, hidden_stride, rank,
                      [&](int m, int64_t n, float value) { scores[n][f - s.first + m] = value; });
      const float *s2 = predictor->s2 + s.first, *bias = predictor->bias + s.first;
      for (int64_t n = 0; n < rows; ++n)
        for (int64_t j = 0; j < s.size; ++j) s.mask[j] |= (scores[n][j] * s2[j] + bias[j] > 0.0f) << n;
      fetch_predictor(range + 1);
    }
    s.compact();
  }

  // Fetches what the selection of a range reads.
  void fetch_predictor(int64_t range) const {
    if (range < 0) return;
    const int64_t first = range * block, size = std::min(block, neurons - first);
    if (size <= 0) return;
    fetch_bytes(predictor->w2 + first * predictor->rank, size * predictor->rank);
    fetch_bytes(predictor->s2 + first, size * sizeof(float));
    fetch_bytes(predictor->bias + first, size * sizeof(float));
  }

  // Fetches gate and up of the first selected neurons of a range.
  void prime(const Selection& s) const {
    for (int64_t i = 0; i < std::min(distance(), s.found); ++i)
      for (const W* weight : {gate, up}) fetch_bytes(weight + (s.first + s.list[i]) * d, d * sizeof(W));
  }

  // Neurons between the fetch of a gate and up row and its use.
  int64_t distance() const { return std::max<int64_t>(1, LOOKAHEAD / (d * static_cast<int64_t>(sizeof(W)))); }

  // Kept neurons whose down rows are on their way from memory, oldest first.
  struct Kept {
    static constexpr int64_t SIZE = 2 * GROUP;
    int64_t begin = 0, end = 0;
    const W* coming = nullptr;  // the newest one's row, which is not fetched yet
    const W* row[SIZE];
    uint8_t mask[SIZE];
    float* partial[SIZE];
    float a[SIZE][MAX_ROWS];
  };

  // Computes the selected neurons of a range, sets its counts [rows, 2], and adds its kept down rows to its partial sum
  // [rows, stride], the last of them only in a later call or `finish`. Fetches ahead: gate and up of the coming neurons,
  // into the range `after`, and each down row as soon as its neuron is kept.
  void run(Selection& s, const Selection& after, Kept& kept, float* partial, int32_t* counts) const {
    std::fill(partial, partial + rows * stride, 0.0f);
    s.count(rows, counts);
    const int64_t lead = distance();
    for (int64_t i = 0; i < s.found; ++i) {
      const int64_t j = s.list[i], f = s.first + j, ahead = i + lead - s.found, slot = kept.end % Kept::SIZE;
      int64_t g = f;
      if (ahead < 0) g = s.first + s.list[i + lead];
      else if (ahead < after.found) g = after.first + after.list[ahead];
      float gates[MAX_ROWS], ups[MAX_ROWS], *a = kept.a[slot];
      dots_tiled(Rows<W, 2>{{gate + f * d, up + f * d}},
                    Rows<W, 3>{{gate + g * d, up + g * d, kept.coming ? kept.coming : gate + g * d}}, x, rows, stride, d,
                    [&](int m, int64_t n, float value) { (m ? ups : gates)[n] = value; });
      kept.coming = nullptr;
      for (int64_t n = 0; n < rows; ++n) {
        a[n] = activate(act, gates[n]) * ups[n];
        if (!(std::fabs(a[n]) >= threshold[f] && a[n] != 0.0f)) s.mask[j] &= ~(1 << n);
      }
      if (!s.mask[j]) continue;
      kept.row[slot] = kept.coming = down + f * d;
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
void run_ffn(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down, const Tensor& threshold, Act act,
             const std::vector<Tensor>& predictor, Tensor& y, Tensor& counts) {
  const int64_t rows = x.size(0), d = x.size(1), neurons = gate.size(0), stride = padded(d);
  const int64_t rank = predictor.empty() ? 0 : predictor[0].size(0), hidden_stride = padded(rank);
  const int64_t block = neurons <= 4096 ? BLOCK / 2 : BLOCK;
  const int64_t ranges = (neurons + block - 1) / block;
  static thread_local std::vector<float> scratch;
  static thread_local std::vector<int32_t> range_counts;
  scratch.resize(rows * (2 * stride + hidden_stride + ranges * stride));
  range_counts.resize(ranges * rows * 2);
  float *wide = scratch.data(), *plain = wide + rows * stride, *hidden = plain + rows * stride, *partial = hidden + rows * hidden_stride;
  int32_t* tally = range_counts.data();
  widen_input<W>(x, wide, stride);

  Ffn<W> ffn{static_cast<const W*>(gate.data_ptr()), static_cast<const W*>(up.data_ptr()),
             static_cast<const W*>(down.data_ptr()), static_cast<const float*>(threshold.data_ptr()), wide, hidden,
             std::nullopt, act, rows, d, neurons, stride, hidden_stride, block};
  if (rank > 0) {
    ffn.predictor = Predictor{
        static_cast<const int8_t*>(predictor[0].data_ptr()), static_cast<const int8_t*>(predictor[2].data_ptr()),
        static_cast<const float*>(predictor[1].data_ptr()), static_cast<const float*>(predictor[3].data_ptr()),
        static_cast<const float*>(predictor[4].data_ptr()), rank};
    widen_input<W, int8_t>(x, plain, stride);
    std::fill(hidden, hidden + rows * hidden_stride, 0.0f);
  }
  constexpr int64_t PART = 16;  // rows of the predictor's first matrix that a thread claims at once
  const int64_t parts = (rank + PART - 1) / PART;
  Claims claims(ranges), part_claims(parts);
  std::atomic<int64_t> parts_done{0};
  claims.run([&](int64_t thread) {
    Selection pair[2];
    typename Ffn<W>::Kept kept;
    int64_t range = claims.claim(thread);
    if (rank > 0) {
      ffn.fetch_predictor(range);
      for (int64_t part; (part = part_claims.claim(thread)) >= 0; parts_done.fetch_add(1, std::memory_order_release))
        ffn.hidden_rows(part * PART, std::min(rank, (part + 1) * PART), plain, hidden);
      // What is not done now is being done by a thread that runs: this cannot wait for ever.
      for (int spins = 0; parts_done.load(std::memory_order_acquire) < parts; ++spins) pause(spins);
    }
    ffn.select(range, pair[0]);
    ffn.prime(pair[0]);
    for (int turn = 0; range >= 0; turn ^= 1) {
      const int64_t after = claims.claim(thread);
      ffn.select(after, pair[turn ^ 1]);
      ffn.run(pair[turn], pair[turn ^ 1], kept, partial + range * rows * stride, tally + range * rows * 2);
      range = after;
    }
    ffn.finish(kept);
  });

  W* out = static_cast<W*>(y.data_ptr());
  int32_t* total = static_cast<int32_t*>(counts.data_ptr());
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

std::tuple<Tensor, Tensor> gated_ffn(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down,
                                     const Tensor& threshold, std::string act, const std::vector<Tensor>& predictor) {
  const char* op = "gated_ffn";
  check_input(op, x);
  REQUIRE(gate.dim() == 2 && gate.size(0) >= 1, op, ": gate has shape ", shape_of(gate), ", expected [F, D]");
  const int64_t d = x.size(1), neurons = gate.size(0);
  const ScalarType dtype = x.scalar_type();
  const Act activation = parse_act(act);
  Tensor y = torch::stable::new_empty(x, {x.size(0), d});
  Tensor counts = torch::stable::new_empty(x, {x.size(0), 2}, ScalarType::Int);
  dispatch(dtype, op, [&](auto type) {
    check(op, "gate", gate, {neurons, d}, dtype);
    check(op, "up", up, {neurons, d}, dtype);
    check(op, "down", down, {neurons, d}, dtype);
    check(op, "threshold", threshold, {neurons}, ScalarType::Float);
    REQUIRE(predictor.empty() || predictor.size() == 5, op, ": predictor has ", predictor.size(),
                    " tensors, expected none or [w1, s1, w2, s2, bias]");
    if (!predictor.empty()) {
      REQUIRE(predictor[0].dim() == 2 && predictor[0].size(0) >= 1, op, ": predictor w1 has shape ",
                      shape_of(predictor[0]), ", expected [R, D]");
      const int64_t rank = predictor[0].size(0);
      check(op, "predictor w1", predictor[0], {rank, d}, ScalarType::Char);
      check(op, "predictor s1", predictor[1], {rank}, ScalarType::Float);
      check(op, "predictor w2", predictor[2], {neurons, rank}, ScalarType::Char);
      check(op, "predictor s2", predictor[3], {neurons}, ScalarType::Float);
      check(op, "predictor bias", predictor[4], {neurons}, ScalarType::Float);
    }
    run_ffn<decltype(type)>(x, gate, up, down, threshold, activation, predictor, y, counts);
  });
  return {y, counts};
}

// ----------------------------------------------------------------------------------------------------------- linear

template <class W>
void run_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Tensor& y) {
  const int64_t rows = x.size(0), d = x.size(1), outputs = weight.size(0), stride = padded(d);
  static thread_local std::vector<float> scratch;
  scratch.resize(rows * stride);
  float* wide = scratch.data();
  widen_input<W>(x, wide, stride);
  const W* w = static_cast<const W*>(weight.data_ptr());
  const W* b = bias ? static_cast<const W*>(bias->data_ptr()) : nullptr;
  W* out = static_cast<W*>(y.data_ptr());
  const int64_t step = std::max<int64_t>(1, CHUNK / (d * static_cast<int64_t>(sizeof(W))));
  for_ranges((outputs + step - 1) / step, [&](int64_t range) {
    const int64_t end = std::min(outputs, (range + 1) * step);
    for (int64_t row = range * step; row < end; ++row)
      dots_tiled(Rows<W, 1>{{w + row * d}}, Rows<W, 0>(), wide, rows, stride, d, [&](int, int64_t n, float value) {
        out[n * outputs + row] = static_cast<W>(b ? value + static_cast<float>(b[row]) : value);
      });
  });
}

Tensor linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  const char* op = "linear";
  check_input(op, x);
  REQUIRE(weight.dim() == 2 && weight.size(0) >= 1, op, ": weight has shape ", shape_of(weight),
                  ", expected [outputs, D]");
  const ScalarType dtype = x.scalar_type();
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  dispatch(dtype, op, [&](auto type) {
    check(op, "weight", weight, {weight.size(0), x.size(1)}, dtype);
    if (bias) check(op, "bias", *bias, {weight.size(0)}, dtype);
    run_linear<decltype(type)>(x, weight, bias, y);
  });
  return y;
}

// -------------------------------------------------------------------------------------------------------- attention

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
  for (p = first; p + 4 <= last; p += 4) add_rows(acc, scores + p, rows_from<4>(v, d, p, last), d);
  for (; p < last; ++p) add_rows(acc, scores + p, rows_from<1>(v, d, p, last), d);
}

template <class W>
void run_attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, float scale, Tensor& y) {
  const int64_t batch = q.size(0), heads = q.size(1), d = q.size(3), stride = padded(d);
  const int64_t groups = heads / k.size(1), positions = k.size(2);
  const int64_t mask_stride = mask.size(0) == 1 ? 0 : mask.stride(0);
  static thread_local std::vector<float> scratch;
  scratch.resize(batch * heads * (2 * stride + positions));
  float *wide = scratch.data(), *acc = wide + batch * heads * stride, *scores = acc + batch * heads * stride;
  std::fill(wide, scores, 0.0f);
  const W* query = static_cast<const W*>(q.data_ptr());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < d; ++i)
        wide[(b * heads + h) * stride + place<W>(i)] =
            static_cast<float>(query[b * q.stride(0) + h * q.stride(1) + i * q.stride(3)]);
  const W *keys = static_cast<const W*>(k.data_ptr()), *values = static_cast<const W*>(v.data_ptr());
  W* out = static_cast<W*>(y.data_ptr());
  for_ranges(batch * heads, [&](int64_t item) {
    const int64_t row = item / groups * positions * d;
    const uint8_t* seen = static_cast<const uint8_t*>(mask.data_ptr()) + item / heads * mask_stride;
    int64_t first = 0, last = positions;
    while (first < last && !seen[first]) ++first;
    while (first < last && !seen[last - 1]) --last;
    float* sum = acc + item * stride;
    attend_head(keys + row, values + row, wide + item * stride, seen, first, last, d, scale, scores + item * positions, sum);
    for (int64_t i = 0; i < d; ++i) out[item * d + i] = static_cast<W>(sum[place<W>(i)]);
  });
}

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, double scale) {
  const char* op = "attend";
  REQUIRE(q.dim() == 4 && q.size(2) == 1 && k.dim() == 4 && k.size(1) >= 1 && q.size(1) % k.size(1) == 0, op,
                  ": q has shape ", shape_of(q), " and k ", shape_of(k), ", expected [B, H, 1, D] and [B, G, L, D] with G "
                  "a divisor of H; use scaled_dot_product_attention for anything else");
  const int64_t batch = q.size(0), positions = k.size(2);
  check(op, "k", k, {batch, k.size(1), positions, q.size(3)}, q.scalar_type());
  check(op, "v", v, {batch, k.size(1), positions, q.size(3)}, q.scalar_type());
  REQUIRE(mask.scalar_type() == ScalarType::Bool && mask.dim() == 4 && (mask.size(0) == 1 || mask.size(0) == batch) &&
              mask.size(1) == 1 && mask.size(2) == 1 && mask.size(3) == positions && mask.stride(3) == 1,
          op, ": mask is ", dtype_name(mask.scalar_type()), " ", shape_of(mask), ", expected bool [", batch, " or 1, 1, 1, ",
          positions, "], dense in its last dimension");
  Tensor y = torch::stable::new_empty(q, {batch, 1, q.size(1), q.size(3)});
  dispatch(q.scalar_type(), op, [&](auto type) { run_attend<decltype(type)>(q, k, v, mask, scale, y); });
  return y;
}

// -------------------------------------------------------------------------------------------------------- yardstick

// Sum of a buffer as 32-bit integers, modulo 2^32: it reads every byte once and does nothing else.
Tensor read_sum(const Tensor& buffer) {
  REQUIRE(buffer.is_contiguous() && buffer.scalar_type() == ScalarType::Int, "read_sum: the buffer is ",
                  dtype_name(buffer.scalar_type()), ", expected contiguous int32");
  constexpr int64_t PART = 1 << 18, WIDTH = 4 * LANES;
  const int32_t* p = static_cast<const int32_t*>(buffer.data_ptr());
  const int64_t size = buffer.numel();
  REQUIRE(size % WIDTH == 0, "read_sum: ", size, " elements, expected a multiple of ", WIDTH);
  std::atomic<uint32_t> total{0};
  for_ranges((size + PART - 1) / PART, [&](int64_t range) {
    VecU32 acc[4] = {};
    for (int64_t i = range * PART; i < std::min(size, (range + 1) * PART); i += WIDTH)
      for (int k = 0; k < 4; ++k) {
        VecU32 v;
        memcpy(&v, p + i + k * LANES, sizeof v);
        acc[k] += v;
      }
    const VecU32 all = (acc[0] + acc[1]) + (acc[2] + acc[3]);
    uint32_t partial = 0;
    for (int lane = 0; lane < LANES; ++lane) partial += all[lane];
    total += partial;
  });
  Tensor out = torch::stable::new_empty(buffer, {}, ScalarType::Int);
  *static_cast<int32_t*>(out.data_ptr()) = static_cast<int32_t>(total.load());
  return out;
}

}  // namespace moyu

STABLE_TORCH_LIBRARY_IMPL(moyu, CPU, m) {
  m.impl("gated_ffn", TORCH_BOX(&moyu::gated_ffn));
  m.impl("linear", TORCH_BOX(&moyu::linear));
  m.impl("attend", TORCH_BOX(&moyu::attend));
  m.impl("read_sum", TORCH_BOX(&moyu::read_sum));
}
