"""Masks on a live model, put on at the seam: the value a block hands to whatever stands at its down projection."""

from collections.abc import Callable
from functools import partial
from typing import Self

import torch
from moyu_kernels.compensation import Compensated
from moyu_kernels.ops.ffn.naive import predictor_scores
from moyu_kernels.rules import Rule, Substitution
from moyu_kernels.seam import ExpertsSeam, Seam
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import FFNBlock, linear_block

# keep(layer, a, expert) -> bool mask of a's shape, or None to leave `a` as it is. a is [..., F].
Keep = Callable[[int, Tensor, int | None], Tensor | None]


class Masking:
    """Sets the activations that `keep` rejects to zero, in every block, until `remove` (or the end of a `with`).

    A block that has a compensation adds it wherever something is masked.

    Args:
        blocks: from `find_blocks`.
        keep: sees each block's activation `[..., F]` (tokens in front), and the expert's index for experts.
        inputs: also record the FFN's input, so that `keep` may read `self.input(layer)` `[..., D]`.
        rules: put each rule's gate and up on the block, so that `keep` sees the activation that results.
        gates: also record the activated gate before its threshold, for `keep` to read by `self.gate(layer)` `[..., F]`.
        straight_through: the gradient is that of the activation without the mask.
    """

    def __init__(
        self,
        blocks: list[FFNBlock],
        keep: Keep,
        inputs: bool = False,
        rules: list[Rule] | None = None,
        gates: bool = False,
        straight_through: bool = False,
    ) -> None:
        self._blocks, self._inputs, self._gates = blocks, dict[int, Tensor](), dict[int, Tensor]()
        self._rules, self._straight_through = rules, straight_through
        at_gate = gates or any(rule.gate != "stock" for rule in rules or [])
        if at_gate and len({id(block.activation()) for block in blocks}) < len(blocks):
            raise MoyuError(
                "the FFN blocks of this model share one activation module, so a rule on the gate cannot tell them "
                "apart; use the sparsifier 'threshold' or 'topk'"
            )
        self._seams: list[Seam | ExpertsSeam | Substitution | Compensated] = []
        self._masked = [False] * len(blocks)  # in the forward under way
        for layer, block in enumerate(blocks):
            if inputs:
                self._seams.append(Seam(block.module, block.up, self._recorder(layer)))
            if rules or gates:
                rule = rules[layer] if rules else Rule(torch.zeros(()))
                watch = self._gate_recorder(layer) if gates else None
                self._seams.append(Substitution(block.module, block.act, block.up, rule, watch))
            if block.layout == "experts":
                self._seams.append(ExpertsSeam(block.module, self._expert_mask(layer, keep)))
            else:
                self._seams.append(Seam(block.module, block.down, self._mask(layer, keep)))
            if block.layout not in ("linear", "experts"):
                front, on = block.gate or block.up, partial(self._masked.__getitem__, layer)
                self._seams.append(Compensated(block.module, front, block.down, on))

    def input(self, layer: int) -> Tensor:
        return self._inputs[layer]

    def gate(self, layer: int) -> Tensor:
        return self._gates[layer]

    def scores(self, layer: int, predictor: dict[str, Tensor]) -> Tensor:
        """A predictor's score of each neuron on the recorded input, fp32 `[..., F]`."""
        stock, bias = self._blocks[layer].activation().forward, self._blocks[layer].up_bias()
        rule = self._rules[layer] if self._rules else None

        def act(g: Tensor) -> Tensor:
            g = g if bias is None else g + bias.float()
            return rule.activate_gate(g, stock(g), stock) if rule else stock(g)

        x = self._inputs[layer]
        return predictor_scores(x, [tensor.to(x.device) for tensor in predictor.values()], act)

    def _recorder(self, layer: int) -> Callable[[Tensor], Tensor]:
        def record(x: Tensor) -> Tensor:
            self._inputs[layer] = x.detach()
            return x

        return record

    def _gate_recorder(self, layer: int) -> Callable[[Tensor], None]:
        def record(value: Tensor) -> None:
            self._gates[layer] = value

        return record

    def _mask(self, layer: int, keep: Keep) -> Callable[[Tensor], Tensor]:
        def mask(a: Tensor) -> Tensor:
            if self._rules and self._rules[layer].prompt and a.ndim != 3:
                raise MoyuError(
                    f"a mask from the prompt needs sequences, and {self._blocks[layer].path} sees the tokens of all "
                    f"sequences in one row ({list(a.shape)}); use another sparsifier"
                )
            fill = self._rules[layer].fill(a) if self._rules else 0.0
            kept = keep(layer, a, None)
            self._masked[layer] = kept is not None
            return masked(a, kept, self._straight_through, fill)

        return mask

    def _expert_mask(self, layer: int, keep: Keep) -> Callable[[Tensor, int], Tensor]:
        return lambda a, expert: masked(a, keep(layer, a, expert), self._straight_through)

    def remove(self) -> None:
        for seam in self._seams:
            seam.remove()
        self._seams.clear()
        self._inputs.clear()
        self._gates.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


class InputMasks:
    """Sparse inputs of linear layers, until the end of a `with`, with a count of what was kept.

    rules: by the layer's path; none is fine.
    """

    def __init__(self, model: torch.nn.Module, rules: dict[str, Rule]) -> None:
        self.kept = self.seen = 0
        self._rules = list(rules.values())
        self._masking = Masking([linear_block(model, path) for path in rules], self._keep, rules=self._rules)

    def _keep(self, layer: int, x: Tensor, expert: int | None) -> Tensor:
        keep = self._rules[layer].mask(x)
        self.kept += int(keep.count_nonzero())
        self.seen += keep.numel()
        return keep

    def off(self) -> float:
        """Share of the inputs that were off."""
        return 1 - self.kept / max(self.seen, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._masking.remove()


def masked(a: Tensor, keep: Tensor | None, straight_through: bool = False, fill: Tensor | float = 0.0) -> Tensor:
    """`a` where it is kept, else `fill`."""
    if keep is None:
        return a
    return a - torch.where(keep, 0.0, a - fill).detach() if straight_through else torch.where(keep, a, fill)
