"""CATS (arXiv 2404.08763): keeps a neuron where `abs(act(gate))` reaches its layer's level.

The mask is known before up and down are read, so exact kernels may skip their rows, and never the gate's.
"""

from moyu_kernels.rules import Rule
from torch import Tensor

from moyu_train.sparsifiers.base import HeldSparsifier


class GateThreshold(HeldSparsifier):
    """CATS (arXiv 2404.08763): keeps a neuron where `abs(act(gate))` reaches its layer's level."""

    name = "gate_threshold"
    calibrates = "gate"
    layouts = ("gated", "fused", "plain")

    def rule(self, threshold: Tensor) -> Rule:
        return Rule(threshold, gate="threshold", keep="nonzero")
