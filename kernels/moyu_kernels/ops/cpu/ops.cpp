// The native CPU ops: their checks and registration. Schemas, fake versions and the definition to compare with are in
// Python.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "dense.h"
#include "ffn.h"
#include "heads.h"
#include "inputs.h"
#include "tape.h"

namespace moyu {

void check_predictor(const char* op, const std::vector<Tensor>& predictor, int64_t d, int64_t neurons, bool plain) {
  if (predictor.empty()) return;
  const size_t lowbit = plain ? 4 : 6;
  REQUIRE(predictor.size() == 1 || predictor.size() == 5 || predictor.size() == lowbit, op, ": predictor has ",
          predictor.size(), " tensors, expected none, [mask], [w1, s1, w2, s2, bias] or [",
          plain ? "" : "gate_codes, gate_scales, ", "up_codes, up_scales, weight, bias]");
  if (predictor.size() == 1) {
    check(op, "mask", predictor[0], {neurons}, ScalarType::Byte);
  } else if (predictor.size() == 5) {
    REQUIRE(predictor[0].dim() == 2 && predictor[0].size(0) >= 1, op, ": predictor w1 has shape ",
            shape_of(predictor[0]), ", expected [R, D]");
    const int64_t rank = predictor[0].size(0);
    check(op, "predictor w1", predictor[0], {rank, d}, ScalarType::Char);
    check(op, "predictor s1", predictor[1], {rank}, ScalarType::Float);
    check(op, "predictor w2", predictor[2], {neurons, rank}, ScalarType::Char);
    check(op, "predictor s2", predictor[3], {neurons}, ScalarType::Float);
    check(op, "predictor bias", predictor[4], {neurons}, ScalarType::Float);
  } else {
    const bool one_bit = predictor[0].dim() == 2 && predictor[0].size(1) == (d + 7) / 8 && d > 4;
    const int64_t bytes = one_bit ? (d + 7) / 8 : (d + 3) / 4;
    const char* names[] = {"predictor gate_codes", "predictor gate_scales", "predictor up_codes", "predictor up_scales",
                           "predictor weight",     "predictor bias"};
    for (size_t i = 0; i < lowbit; ++i) {
      const bool copies = i + 2 < lowbit, codes = copies && i % 2 == 0;
      const char* name = names[i + 6 - lowbit];
      if (codes) check(op, name, predictor[i], {neurons, bytes}, ScalarType::Byte);
      else if (copies) check(op, name, predictor[i], {2, neurons}, ScalarType::Float);
      else check(op, name, predictor[i], {neurons}, ScalarType::Float);
    }
  }
}

const float* values_of(const std::optional<Tensor>& t) { return t ? data<const float>(*t) : nullptr; }

// Returns the dtype that the weights must have.
ScalarType check_scales(const char* op, const Tensor& weight, const std::optional<Tensor>& scales,
                        const std::optional<Tensor>& columns, int64_t matrices, const char* names, ScalarType dtype,
                        int64_t d, int64_t neurons) {
  REQUIRE(scales.has_value() == columns.has_value() && (scales || weight.scalar_type() != ScalarType::Char), op,
          ": int8 weights go with scales [", matrices, ", F], of the rows of ", names,
          ", and columns [D], of down's; pass both, or weights of x's dtype and none");
  if (scales) check(op, "scales", *scales, {matrices, neurons}, ScalarType::Float);
  if (columns) check(op, "columns", *columns, {d}, ScalarType::Float);
  return scales ? ScalarType::Char : dtype;
}

void check_rule(const char* op, Rule rule, const std::string& name, int64_t keep, const std::vector<Tensor>& predictor,
                int64_t neurons) {
  REQUIRE(predictor.empty() || !whole_row(rule), op, ": rule '", name,
          "' needs the gates of all neurons, so a predictor has none to skip; pass []");
  REQUIRE(rule != Rule::topk || (keep >= 1 && keep <= neurons), op, ": keep is ", keep,
          ", rule 'topk' takes 1 to F = ", neurons);
}

std::tuple<Tensor, Tensor> gated_ffn(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down,
                                     const Tensor& threshold, std::string act, const std::vector<Tensor>& predictor,
                                     std::string rule, int64_t keep, std::optional<Tensor> scales,
                                     std::optional<Tensor> columns) {
  const char* op = "gated_ffn";
  check_input(op, x);
  REQUIRE(gate.dim() == 2 && gate.size(0) >= 1, op, ": gate has shape ", shape_of(gate), ", expected [F, D]");
  const int64_t d = x.size(1), neurons = gate.size(0);
  const ScalarType dtype = x.scalar_type();
  const Act activation = parse_act(op, act);
  const Rule kept_by = parse_rule(op, rule);
  check_rule(op, kept_by, rule, keep, predictor, neurons);
  const ScalarType stored = check_scales(op, gate, scales, columns, 3, "gate, up and down", dtype, d, neurons);
  Tensor y = torch::stable::new_empty(x, {x.size(0), d});
  Tensor counts = torch::stable::new_empty(x, {x.size(0), 2}, ScalarType::Int);
  dispatch(dtype, op, [&](auto type) {
    check_rows(op, "gate", gate, neurons, d, stored);
    check_rows(op, "up", up, neurons, d, stored);
    check_rows(op, "down", down, neurons, d, stored);
    check(op, "threshold", threshold, {neurons}, ScalarType::Float);
    check_predictor(op, predictor, d, neurons, false);
    using X = decltype(type);
    const auto run = scales ? run_ffn<X, int8_t> : run_ffn<X, X>;
    perform([=]() mutable {
      const float *scale = values_of(scales), *column = values_of(columns);
      run(x, {gate, up, down, false, scale, column, nullptr, nullptr, threshold, activation, predictor, kept_by, keep},
          y, counts);
    });
  });
  return {y, counts};
}

std::tuple<Tensor, Tensor> plain_ffn(const Tensor& x, const Tensor& up, const Tensor& down, const Tensor& threshold,
                                     std::string act, const std::vector<Tensor>& predictor, std::string rule,
                                     int64_t keep, std::optional<Tensor> up_bias, std::optional<Tensor> down_bias,
                                     std::optional<Tensor> scales, std::optional<Tensor> columns) {
  const char* op = "plain_ffn";
  check_input(op, x);
  REQUIRE(up.dim() == 2 && up.size(0) >= 1, op, ": up has shape ", shape_of(up), ", expected [F, D]");
  const int64_t d = x.size(1), neurons = up.size(0);
  const ScalarType dtype = x.scalar_type();
  const Act activation = parse_act(op, act);
  const Rule kept_by = parse_rule(op, rule);
  REQUIRE(kept_by != Rule::drelu, op, ": rule 'drelu' needs a gate, and a plain FFN has none; use another rule");
  check_rule(op, kept_by, rule, keep, predictor, neurons);
  const ScalarType stored = check_scales(op, up, scales, columns, 2, "up and down", dtype, d, neurons);
  Tensor y = torch::stable::new_empty(x, {x.size(0), d});
  Tensor counts = torch::stable::new_empty(x, {x.size(0), 2}, ScalarType::Int);
  dispatch(dtype, op, [&](auto type) {
    using X = decltype(type);
    check_rows(op, "up", up, neurons, d, stored);
    check_rows(op, "down", down, neurons, d, stored);
    if (up_bias) check(op, "up_bias", *up_bias, {neurons}, dtype);
    if (down_bias) check(op, "down_bias", *down_bias, {d}, dtype);
    check(op, "threshold", threshold, {neurons}, ScalarType::Float);
    check_predictor(op, predictor, d, neurons, true);
    const auto run = scales ? run_ffn<X, int8_t> : run_ffn<X, X>;
    perform([=]() mutable {
      const float *scale = values_of(scales), *column = values_of(columns);
      static thread_local std::vector<float> biases;
      biases.resize(neurons + d);
      const auto widened = [](const std::optional<Tensor>& bias, float* out) -> const float* {
        if (!bias) return nullptr;
        std::copy_n(data<const X>(*bias), bias->numel(), out);
        return out;
      };
      const float *first = widened(up_bias, biases.data()), *last = widened(down_bias, biases.data() + neurons);
      run(x, {up, up, down, true, scale, column, first, last, threshold, activation, predictor, kept_by, keep}, y,
          counts);
    });
  });
  return {y, counts};
}

Tensor linears(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
               std::optional<Tensor> scales) {
  const char* op = "linear";
  check_input(op, x);
  REQUIRE(!weights.empty() && (biases.empty() || biases.size() == weights.size()), op, ": ", weights.size(),
          " weights and ", biases.size(), " biases given; give at least one weight, and a bias for each or none");
  const ScalarType dtype = x.scalar_type();
  int64_t width = 0;
  for (size_t layer = 0; layer < weights.size(); ++layer) {
    const Tensor& weight = weights[layer];
    REQUIRE(weight.dim() == 2 && weight.size(0) >= 1, op, ": weight has shape ", shape_of(weight),
            ", expected [outputs, D]");
    check(op, "weight", weight, {weight.size(0), x.size(1)}, scales ? ScalarType::Char : dtype);
    if (!biases.empty()) check(op, "bias", biases[layer], {weight.size(0)}, dtype);
    width += weight.size(0);
  }
  if (scales) check(op, "scales", *scales, {width}, ScalarType::Float);
  Tensor y = torch::stable::new_empty(x, {x.size(0), width});
  dispatch(dtype, op, [&](auto type) {
    using X = decltype(type);
    const auto run = scales ? run_linears<X, int8_t> : run_linears<X, X>;
    perform([=]() mutable { run(x, weights, biases, values_of(scales), y); });
  });
  return y;
}

Tensor linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> scale) {
  return linears(x, {weight}, bias ? std::vector<Tensor>{*bias} : std::vector<Tensor>{}, scale);
}

std::tuple<Tensor, Tensor> sparse_linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                         const Tensor& threshold) {
  const char* op = "sparse_linear";
  check_input(op, x);
  REQUIRE(weight.dim() == 2 && weight.size(1) >= 1, op, ": weight has shape ", shape_of(weight), ", expected [D, F]");
  const int64_t inputs = x.size(1), outputs = weight.size(1);
  check(op, "weight", weight, {inputs, outputs}, x.scalar_type());
  if (bias) check(op, "bias", *bias, {outputs}, x.scalar_type());
  check(op, "threshold", threshold, {inputs}, ScalarType::Float);
  Tensor y = torch::stable::new_empty(x, {x.size(0), outputs});
  Tensor counts = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Int);
  dispatch(x.scalar_type(), op, [&](auto type) {
    using W = decltype(type);
    perform([=]() mutable {
      run_sparse_linear<W>(x, weight, bias ? data<const W>(*bias) : nullptr, data<const float>(threshold), y, counts);
    });
  });
  return {y, counts};
}

Tensor head_linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& router,
                   const Tensor& scale, const Tensor& offset, int64_t keep) {
  const char* op = "head_linear";
  check_input(op, x);
  REQUIRE(weight.dim() == 2 && weight.size(0) >= 1 && router.dim() == 2 && router.size(0) >= 1 &&
              weight.size(0) % router.size(0) == 0,
          op, ": weight has shape ", shape_of(weight), " and router ", shape_of(router),
          ", expected [U S, D] and [U, D], S rows a unit");
  const int64_t d = x.size(1), outputs = weight.size(0), units = router.size(0);
  REQUIRE(keep >= 1 && keep <= units, op, ": keep is ", keep, ", expected 1 to the ", units, " units of the router");
  check(op, "weight", weight, {outputs, d}, x.scalar_type());
  if (bias) check(op, "bias", *bias, {outputs}, x.scalar_type());
  check(op, "router", router, {units, d}, ScalarType::Char);
  check(op, "scale", scale, {units}, ScalarType::Float);
  check(op, "offset", offset, {units}, ScalarType::Float);
  Tensor y = torch::stable::new_empty(x, {x.size(0), outputs});
  dispatch(x.scalar_type(), op, [&](auto type) {
    using W = decltype(type);
    perform([=]() mutable {
      run_head_linear<W>(x, weight, bias ? data<const W>(*bias) : nullptr, router, data<const float>(scale),
                         data<const float>(offset), keep, y);
    });
  });
  return y;
}

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, double scale,
              bool skip_zero) {
  const char* op = "attend";
  REQUIRE(q.dim() == 4 && q.size(2) == 1 && k.dim() == 4 && k.size(1) >= 1 && q.size(1) % k.size(1) == 0, op,
          ": q has shape ", shape_of(q), " and k ", shape_of(k),
          ", expected [B, H, 1, D] and [B, G, L, D] with G "
          "a divisor of H; use scaled_dot_product_attention for anything else");
  const int64_t batch = q.size(0), positions = k.size(2);
  check(op, "k", k, {batch, k.size(1), positions, q.size(3)}, q.scalar_type());
  check(op, "v", v, {batch, k.size(1), positions, q.size(3)}, q.scalar_type());
  REQUIRE(mask.scalar_type() == ScalarType::Bool && mask.dim() == 4 && (mask.size(0) == 1 || mask.size(0) == batch) &&
              mask.size(1) == 1 && mask.size(2) == 1 && mask.size(3) == positions && mask.stride(3) == 1,
          op, ": mask is ", dtype_name(mask.scalar_type()), " ", shape_of(mask), ", expected bool [", batch,
          " or 1, 1, 1, ", positions, "], dense in its last dimension");
  Tensor y = torch::stable::new_empty(q, {batch, 1, q.size(1), q.size(3)});
  dispatch(q.scalar_type(), op, [&](auto type) {
    perform([=]() mutable { run_attend<decltype(type)>(q, k, v, mask, scale, skip_zero, y); });
  });
  return y;
}

// Sum of a buffer as 32-bit integers, modulo 2^32: it reads every byte once and does nothing else.
Tensor read_sum(const Tensor& buffer) {
  REQUIRE(buffer.is_contiguous() && buffer.scalar_type() == ScalarType::Int, "read_sum: the buffer is ",
          dtype_name(buffer.scalar_type()), ", expected contiguous int32");
  constexpr int64_t PART = 1 << 18, WIDTH = 4 * LANES;
  const int32_t* p = data<const int32_t>(buffer);
  const int64_t size = buffer.numel();
  REQUIRE(size % WIDTH == 0, "read_sum: ", size, " elements, expected a multiple of ", WIDTH);
  std::atomic<uint32_t> total{0};
  for_ranges((size + PART - 1) / PART, [&](int64_t range) {
    VecU32 acc[4] = {};
    for (int64_t i = range * PART; i < std::min(size, (range + 1) * PART); i += WIDTH) {
      fetch_step(Rows<int32_t, 1>{{p + LOOKAHEAD / 4}}, i);
      fetch_step(Rows<int32_t, 1>{{p + LOOKAHEAD / 4}}, i + STEP);
      for (int k = 0; k < 4; ++k) {
        VecU32 v;
        memcpy(&v, p + i + k * LANES, sizeof v);
        acc[k] += v;
      }
    }
    const VecU32 all = (acc[0] + acc[1]) + (acc[2] + acc[3]);
    uint32_t partial = 0;
    for (int lane = 0; lane < LANES; ++lane) partial += all[lane];
    total += partial;
  });
  Tensor out = torch::stable::new_empty(buffer, {}, ScalarType::Int);
  *data<int32_t>(out) = static_cast<int32_t>(total.load());
  return out;
}

}  // namespace moyu

STABLE_TORCH_LIBRARY_IMPL(moyu, CPU, m) {
  m.impl("gated_ffn", TORCH_BOX(&moyu::gated_ffn));
  m.impl("plain_ffn", TORCH_BOX(&moyu::plain_ffn));
  m.impl("linear", TORCH_BOX(&moyu::linear));
  m.impl("linears", TORCH_BOX(&moyu::linears));
  m.impl("sparse_linear", TORCH_BOX(&moyu::sparse_linear));
  m.impl("head_linear", TORCH_BOX(&moyu::head_linear));
  m.impl("attend", TORCH_BOX(&moyu::attend));
  m.impl("read_sum", TORCH_BOX(&moyu::read_sum));
}
