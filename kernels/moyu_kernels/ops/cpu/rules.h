// Activations, and the rules that say which neurons of a gate count.
#pragma once

#include <cmath>

#include "common.h"

namespace moyu {

enum class Act { silu, relu, relu2, gelu, gelu_tanh };

Act parse_act(const char* op, const std::string& name) {
  if (name == "silu") return Act::silu;
  if (name == "relu") return Act::relu;
  if (name == "relu2") return Act::relu2;
  if (name == "gelu") return Act::gelu;
  if (name == "gelu_tanh") return Act::gelu_tanh;
  REQUIRE(false, op, ": activation '", name, "' is unknown; use silu, relu, relu2, gelu or gelu_tanh");
}

inline float activate(Act act, float g) {
  switch (act) {
    case Act::silu: return g / (1.0f + std::exp(-g));
    case Act::relu: return g > 0.0f ? g : 0.0f;
    case Act::relu2: return g > 0.0f ? g * g : 0.0f;
    case Act::gelu: return 0.5f * g * (1.0f + std::erf(g * 0.70710678f));
    default: return 0.5f * g * (1.0f + std::tanh(0.79788456f * (g + 0.044715f * g * g * g)));
  }
}

// As naive.RULES.
enum class Rule {
  threshold,
  gate_threshold,
  relu,
  fatrelu,
  relu2,
  drelu,
  statistical_topk,
  statistical_topk_soft,
  topk
};

Rule parse_rule(const char* op, const std::string& name) {
  constexpr const char* NAMES[] = {"threshold", "gate_threshold",   "relu",                  "fatrelu", "relu2",
                                   "drelu",     "statistical_topk", "statistical_topk_soft", "topk"};
  for (int i = 0; i < 9; ++i)
    if (name == NAMES[i]) return static_cast<Rule>(i);
  REQUIRE(false, op, ": rule '", name, "' is unknown; use threshold, gate_threshold, relu, fatrelu, relu2, drelu, ",
          "statistical_topk, statistical_topk_soft or topk");
}

inline bool whole_row(Rule rule) { return rule >= Rule::statistical_topk; }

// activate() in place on `count` values, a multiple of LANES: silu, by far the commonest, in vectors.
inline void activate_all(Act act, float* g, int64_t count) {
  if (act != Act::silu) {
    for (int64_t i = 0; i < count; ++i) g[i] = activate(act, g[i]);
    return;
  }
  for (int64_t i = 0; i < count; i += LANES) {
    const Vec v = load(g + i), e = exp_negative(v > 0.0f ? -v : v);
    store(g + i, v * (v > 0.0f ? Vec{} + 1.0f : e) / (1.0f + e));
  }
}

// What a rule puts in place of act(g) (naive.ruled_gate).
struct Gate {
  Act act;
  Rule rule;
  const float* threshold;  // [neurons]

  // Of neuron f; mean and deviation of its row's gates where the rule asks for them.
  float operator()(float g, int64_t f, float mean = 0.0f, float deviation = 0.0f) const {
    const float t = threshold[f], level = mean + t * deviation;
    switch (rule) {
      case Rule::threshold:
      case Rule::topk: return activate(act, g);
      case Rule::gate_threshold: return cut(activate(act, g), t);
      case Rule::fatrelu: return g > 0.0f && g >= t ? g : 0.0f;
      case Rule::relu2: return g > 0.0f ? g * g : 0.0f;
      case Rule::statistical_topk: return g > level ? activate(act, g) : 0.0f;
      case Rule::statistical_topk_soft: return g > level ? activate(act, g - level) : 0.0f;
      default: return g > t ? g - t : 0.0f;
    }
  }

  // In place on `count` values from neuron f on, in a buffer that goes on to a multiple of LANES.
  void all(float* g, int64_t f, int64_t count, float mean = 0.0f, float deviation = 0.0f) const {
    if (rule != Rule::threshold && rule != Rule::gate_threshold) {
      for (int64_t i = 0; i < count; ++i) g[i] = (*this)(g[i], f + i, mean, deviation);
      return;
    }
    activate_all(act, g, (count + LANES - 1) / LANES * LANES);
    if (rule == Rule::gate_threshold)
      for (int64_t i = 0; i < count; ++i) g[i] = cut(g[i], threshold[f + i]);
  }

  static float cut(float value, float t) { return std::fabs(value) >= t ? value : 0.0f; }
};

}  // namespace moyu
