"""Rules: what a sparse FFN computes in place of the stock one, and which of its neurons it keeps.

A rule is data, three names and two numbers with a threshold per neuron, so that a checkpoint can hold it. The functions
here are its definition; where an op computes the same, `loading` uses that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from .ops.ffn.naive import ruled_gate
from .prompt import PromptState
from .seam import ExpertsSeam, Seam

GATES = ("stock", "threshold", "relu", "fatrelu", "relu2", "statistical_topk", "statistical_topk_soft")
UPS = ("stock", "relu")
KEEPS = ("nonzero", "threshold", "topk", "prompt_threshold", "prompt_topk")
SUBSTITUTES = ("relu", "fatrelu", "relu2")  # gates that need no mask to be what the model was trained as


@dataclass
class Rule:
    """The rule of one block.

    Args:
        threshold: fp32 `[F]`, or `[E, F]` for experts.
        gate: stands for `act(g)`, g the gate's output, or up's in a plain FFN: "threshold" is "gate_threshold" of
            `ops.ffn.naive.ruled_gate`, and the other names are the same there; the number of deviations of
            "statistical_topk" and "statistical_topk_soft" is `ndtri(1 - share)`.
        up: "relu" makes it `relu(u)`; with gate "relu" that is dReLU (arXiv 2406.05955).
        keep: of the resulting a, "nonzero" keeps `a != 0`, "threshold" keeps `abs(a) >= theta`, "topk" the
            `round(share * F)` neurons whose `abs(a) / theta` is largest (ties at the last place are all kept).
            "prompt_threshold" and "prompt_topk" keep all in the first `prompt` tokens of a sequence, and later what the
            statistic of these (prompt.py) says, above theta or among the largest.
        share: of neurons kept, for the rules that count them.
        prompt: number of tokens that a mask is taken from.
        blend: 0 computes the stock gate and up, 1 the rule's, between them a mixture (for training only).
        centre: fp32 `[F]`, for inputs of linear layers: "threshold" and "topk" look at `a - centre` in a's place, and
            what is off is centre and not 0, as in SCAP (arXiv 2412.07174), which has one centre for all inputs.
    """

    threshold: Tensor
    gate: str = "stock"
    up: str = "stock"
    keep: str = "threshold"
    share: float = 1.0
    prompt: int = 0
    blend: float = 1.0
    centre: Tensor | None = None

    def __post_init__(self) -> None:
        for value, known in ((self.gate, GATES), (self.up, UPS), (self.keep, KEEPS)):
            if value not in known:
                raise ValueError(f"rule {value!r} is unknown; known: {', '.join(known)}")

    def describe(self) -> dict[str, Any]:
        """What a checkpoint records beside the threshold."""
        formula = {"gate": self.gate, "up": self.up, "keep": self.keep, "share": self.share}
        return formula | ({"prompt": self.prompt} if self.prompt else {})

    @property
    def stock_activation(self) -> str | None:
        """transformers' name of the activation under which stock code computes exactly this; None where none does."""
        plain = self.up == "stock" and self.keep == "nonzero" and not self.threshold.any()
        return {"relu": "relu", "relu2": "relu2"}.get(self.gate) if plain else None

    @property
    def op(self) -> str | None:
        """The name under which the ops compute this rule, in a gated FFN, and skip what it drops; None: simulated."""
        if (self.gate, self.up) == ("stock", "stock") and self.keep != "nonzero":
            return "prompt" if self.keep.startswith("prompt") else self.keep
        if self.keep != "nonzero" or self.gate == "stock":
            return None
        if self.up == "relu":
            return "drelu" if self.gate == "relu" else None
        return self.gate_name

    def count(self, neurons: int) -> int:
        """Neurons that "topk" keeps of `neurons`, ties aside."""
        return max(round(self.share * neurons), 1)

    @property
    def op_threshold(self) -> Tensor:
        """The threshold as `ruled_gate` takes it: for the statistical rules a number of deviations, fp32 `[F]`."""
        if not self.gate.startswith("statistical_topk"):
            return self.threshold
        return torch.full(self.threshold.shape[-1:], NormalDist().inv_cdf(1 - self.share))

    @property
    def gate_name(self) -> str:
        """The gate as `ruled_gate` names it."""
        return "gate_threshold" if self.gate == "threshold" else self.gate

    @property
    def substitutes(self) -> bool:
        """Whether gate or up is another function also where nothing is masked."""
        return self.gate in SUBSTITUTES or self.up != "stock"

    @property
    def unmasked(self) -> "Rule":
        """What is left in mode "dense": gate and up where they are other functions, and no mask."""
        gate, up = (self.gate, self.up) if self.substitutes else ("stock", "stock")
        return Rule(self.threshold, gate, up, keep="nonzero")

    def activate_gate(self, g: Tensor, stock: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """What stands for `stock = act(g)`; g `[..., F]`."""
        if self.gate == "stock":
            return stock
        threshold = self.op_threshold.to(g.device)
        return self._blend(stock, ruled_gate(self.gate_name, g, stock, act, threshold))

    def activate_up(self, u: Tensor) -> Tensor:
        """What stands for u; u `[..., F]`."""
        return u if self.up == "stock" else self._blend(u, torch.relu(u))

    def _blend(self, stock: Tensor, ruled: Tensor) -> Tensor:
        return ruled if self.blend >= 1 else torch.lerp(stock, ruled, self.blend)

    def mask(self, a: Tensor, expert: int | None = None, state: PromptState | None = None) -> Tensor:
        """Which neurons of `a` `[..., F]` are kept, bool of its shape.

        state: of the sequence that `a` goes on with, for the rules that keep by its first tokens; default a new one.

        Raises: ValueError for these where the block does not see sequences.
        """
        if self.keep == "nonzero":
            return a != 0
        if self.prompt:
            return self._prompt_mask(a, state or PromptState(self.prompt))
        threshold = (self.threshold if expert is None else self.threshold[expert]).to(a.device)
        if self.keep == "threshold":
            return self.distance(a).abs() >= threshold
        return self._largest(self.distance(a).detach().abs() / threshold)

    def distance(self, a: Tensor) -> Tensor:
        """From the centre, signed, of a's shape and dtype."""
        return a if self.centre is None else a - self.centre.to(a)

    def fill(self, a: Tensor) -> Tensor | float:
        """What stands for the values of `a` that are off."""
        return 0.0 if self.centre is None else self.centre.to(a)

    def _largest(self, statistic: Tensor) -> Tensor:
        statistic = statistic.nan_to_num(-1.0, torch.inf)  # what is not a number is not kept
        least = statistic.topk(self.count(statistic.shape[-1]), dim=-1).values[..., -1:]
        return (statistic >= least) & (statistic >= 0)

    def _prompt_mask(self, a: Tensor, state: PromptState) -> Tensor:
        if a.ndim != 3:
            raise ValueError(
                f"masks from the prompt need blocks that see sequences [B, T, F], and here is {list(a.shape)}; use "
                "another sparsifier"
            )
        first = state.take(a)
        keep = torch.ones_like(a, dtype=torch.bool)
        if first < a.shape[1]:
            keep[:, first:] = self.prompt_keeps(state.statistic)
        return keep

    def prompt_keeps(self, statistic: Tensor) -> Tensor:
        """What is kept after the first tokens, bool of the shape of their statistic `[B, 1, F]`."""
        if self.keep == "prompt_topk":
            return self._largest(statistic)
        return statistic >= self.threshold.to(statistic.device)


class Substitution:
    """Puts a rule's gate and up on a live FFN block, until `remove`.

    Args:
        block: the FFN block's module.
        act: name of its attribute that holds the activation.
        up: name of the projection whose output the rule's `up` acts on.
        observe: sees on every call what stands for `act(g)` before the rule's threshold.
    """

    def __init__(
        self, block: nn.Module, act: str, up: str, rule: Rule, observe: Callable[[Tensor], None] | None = None
    ) -> None:
        self._seams: list[Seam] = []

        def gate(args: tuple[Tensor, ...], stock: Tensor) -> Tensor:
            # The class's own forward: the instance's would call this hook again.
            if observe:
                observe((torch.relu(args[0]) if rule.gate in SUBSTITUTES else stock).detach())
            return rule.activate_gate(args[0], stock, getattr(block, act).forward)

        if rule.gate != "stock" or observe:
            self._seams.append(Seam(block, act, output=gate))
        if rule.up != "stock":
            self._seams.append(Seam(block, up, output=lambda _, u: rule.activate_up(u)))

    def remove(self) -> None:
        """Undo: the block computes its stock gate and up again."""
        for seam in self._seams:
            seam.remove()
        self._seams.clear()


def simulate(
    block: Any, names: dict[str, str], layout: str, rule: Rule, masked: bool, state: PromptState | None = None
) -> None:
    """Put a whole rule on a live block for good, in plain PyTorch: a dense matmul, then a mask. Skips nothing.

    Args: names: attributes of `block` that hold its "act", "up" and "down"; masked: False only substitutes gate and up;
        state: of the sequence being decoded, for the rules that keep by its first tokens.
    """
    Substitution(block, names["act"], names["up"], rule)
    if masked and layout == "experts":
        ExpertsSeam(block, lambda a, expert: torch.where(rule.mask(a, expert), a, 0.0))
    elif masked:
        Seam(block, names["down"], lambda a: torch.where(rule.mask(a, state=state), a, rule.fill(a)))
