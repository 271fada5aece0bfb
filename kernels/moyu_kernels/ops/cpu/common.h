// What the ops share: checks, threads and the input as fp32.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "simd.h"

namespace moyu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Bytes of a stream that are fetched before their use.
constexpr int64_t LOOKAHEAD = 1 << 14;
constexpr int64_t CHUNK = 1 << 15;  // bytes of a matrix that a thread claims at once
constexpr int64_t MAX_ROWS = 8;  // tokens of one call: one bit each in a byte of the mask

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
    case ScalarType::Byte: return "uint8";
    case ScalarType::Double: return "float64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

std::string text_of(std::initializer_list<int64_t> shape) {
  std::ostringstream text;
  for (int64_t size : shape) text << (text.tellp() ? ", " : "[") << size;
  text << "]";
  return text.str();
}

void check_kind(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                ScalarType dtype) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(i) == shape.begin()[i];
  REQUIRE(same, op, ": ", name, " has shape ", shape_of(t), ", expected ", text_of(shape),
          " to agree with x and the other "
          "weights; pass tensors of one FFN block");
  REQUIRE(t.scalar_type() == dtype, op, ": ", name, " is ", dtype_name(t.scalar_type()), ", expected ",
          dtype_name(dtype), "; convert it with .to()");
}

void check(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype) {
  check_kind(op, name, t, shape, dtype);
  REQUIRE(t.is_contiguous(), op, ": ", name, " ", shape_of(t),
          " is not contiguous; the kernel reads whole rows, so store it "
          "contiguous once instead of passing a view");
}

// Of weights [neurons, d]: their rows may lie apart.
void check_rows(const char* op, const char* name, const Tensor& t, int64_t neurons, int64_t d, ScalarType dtype) {
  check_kind(op, name, t, {neurons, d}, dtype);
  REQUIRE((d == 1 || t.stride(1) == 1) && (neurons == 1 || t.stride(0) >= d), op, ": ", name, " ", shape_of(t),
          " has rows that are not contiguous, or not apart; the kernel reads whole rows, so store it [F, D]");
}

void check_input(const char* op, const Tensor& x) {
  REQUIRE(x.dim() == 2 && x.size(0) >= 1 && x.size(0) <= MAX_ROWS && x.size(1) >= 1, op, ": x has shape ", shape_of(x),
          ", expected [N, D] with N from 1 to ", MAX_ROWS, "; use the dense matmul for more rows");
}

// Memory from the start of a cache line on: a vector that crosses two lines is read twice.
class Scratch {
 public:
  // What was in it may be lost.
  template <class T = float>
  T* take(int64_t count) {
    const size_t needed = (count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line);
    if (lines_.size() < needed) lines_.resize(needed);
    return reinterpret_cast<T*>(lines_.data());
  }

 private:
  struct alignas(LINE) Line {
    char bytes[LINE];
  };
  std::vector<Line> lines_;
};

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

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

// Where element i of an input row stands to meet weights of type W in `dots`.
template <class W, Pace PACE>
int64_t operand_place(int64_t i) {
  return std::is_same_v<Operand<W, PACE>, W> ? i : place<W>(i);
}

// x, of type X, as weights of type W ask for it, rows padded with zeros to whole steps.
template <class X, class W, Pace PACE = Pace::free>
void read_input(const Tensor& x, Operand<W, PACE>* out, int64_t stride) {
  const X* p = data<const X>(x);
  const int64_t rows = x.size(0), d = x.size(1), sn = x.stride(0), sd = x.stride(1);
  std::fill(out, out + rows * stride, static_cast<Operand<W, PACE>>(0.0f));
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t i = 0; i < d; ++i)
      out[n * stride + operand_place<W, PACE>(i)] = static_cast<Operand<W, PACE>>(p[n * sn + i * sd]);
}

// A matrix whose rows may be int8 codes: what they stand for is the codes times the row's scale.
template <class W>
struct Matrix {
  const W* rows;
  int64_t step;                 // elements from row to row
  const float* scale;           // [rows] for int8, else not used
  const float* bias = nullptr;  // [rows] or none

  const W* row(int64_t i) const { return rows + i * step; }

  // A row's output, of its dot product.
  float output(float dot, int64_t row) const { return bias ? scaled(dot, row) + bias[row] : scaled(dot, row); }

  // What stands for `value`, which is linear in the stored row.
  float scaled(float value, int64_t row) const {
    if constexpr (std::is_same_v<W, int8_t>) {
      // Volatile, or compilers fuse it with an addition that follows, and not for every number of rows.
      volatile float product = value * scale[row];
      return product;
    } else {
      return value;
    }
  }
};

// LOOKAHEAD in rows of d elements.
template <class W>
int64_t lookahead_rows(int64_t d) {
  return std::max<int64_t>(2, LOOKAHEAD / (d * static_cast<int64_t>(sizeof(W))));
}

// Rows row .. row + M of a matrix, `step` elements apart; those past its end repeat the last one.
template <int M, class W>
Rows<W, M> rows_from(const W* base, int64_t step, int64_t row, int64_t end) {
  Rows<W, M> rows;
  for (int m = 0; m < M; ++m) rows.row[m] = base + std::min(row + m, end - 1) * step;
  return rows;
}

// CHUNK in rows of d elements.
template <class W>
int64_t chunk_rows(int64_t d) {
  return std::max<int64_t>(1, CHUNK / (d * static_cast<int64_t>(sizeof(W))));
}

// out(row, n, dot(weight row, x[n])) for `count` rows in order, `step` elements apart; fetches ahead within the `left`
// rows that follow.
template <class W, class Out>
void stream_dots(const W* weight, int64_t step, int64_t count, int64_t left, const Streamed<W>* x, int64_t rows,
                 int64_t stride, int64_t d, Out out) {
  const int64_t lead = lookahead_rows<W>(d);
  const auto later = [&](int64_t row) { return weight + std::min(row, left - 1) * step; };
  for (int64_t row = 0; row < count; row += 2) {
    const Rows<W, 2> ahead{{later(row + lead + 0), later(row + lead + 1)}};
    const auto put = [&](int m, int64_t n, float value) {
      if (row + m < count) out(row + m, n, value);
    };
    dots_tiled<Pace::waits>(rows_from<2>(weight, step, row, count), ahead, x, rows, stride, d, put);
  }
}

template <class F>
void dispatch(ScalarType dtype, const char* op, const F& call) {
  switch (dtype) {
    case ScalarType::Float: return call(float());
    case ScalarType::BFloat16: return call(BFloat16());
    case ScalarType::Half: return call(Half());
    default:
      REQUIRE(false, op, ": x is ", dtype_name(dtype),
              ", supported are bfloat16, float16 and float32; convert "
              "the model with .to()");
  }
}

}  // namespace moyu
