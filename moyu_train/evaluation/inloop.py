"""The masks that a sparse model runs with, on a stock model: rule, predicted, and the oracle at the same density.

Counts come from the very pass that is scored, so perplexity, density and bytes belong together.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from moyu_kernels.ffn import GATED_LAYOUTS
from moyu_kernels.ops.ffn.naive import ON_GATE, predictor_family
from moyu_kernels.rules import Rule
from moyu_kernels.seam import Seam
from torch import Tensor

from moyu_train.analysis.uplift import largest
from moyu_train.errors import MoyuError
from moyu_train.models.blocks import FFNBlock, ffn_bytes, find_blocks, scale_bytes
from moyu_train.models.compensation import compensation_bytes
from moyu_train.models.masking import InputMasks, Masking
from moyu_train.models.state import stored_bytes

LINE = 64  # bytes of a cache line


@dataclass
class Counts:
    """Neurons selected (up read; gate too where a predictor selects) and kept (down read), and tokens: fp64 `[L]`.

    The same once more for the rows that decode steps read: at a batch, of the union of its tokens' neurons. Tokens that
    a mask is taken from are no decode steps.
    """

    selected: Tensor
    kept: Tensor
    tokens: Tensor
    mass_kept: Tensor  # contribution of the kept neurons
    mass_rule: Tensor  # contribution of the neurons that the rule keeps
    ruled: Tensor  # neurons that the rule keeps, selected or not
    selected_rows: Tensor
    kept_rows: Tensor
    steps: Tensor

    @classmethod
    def zeros(cls, layers: int) -> "Counts":
        return cls(*(torch.zeros(layers, dtype=torch.float64) for _ in fields(cls)))


def row_bytes(block: FFNBlock, itemsize: int) -> int:
    """Bytes fetched for one neuron's row of one matrix, in whole cache lines (rows start where the last one ends)."""
    return line_bytes(block.hidden * itemsize)


def line_bytes(size: int) -> int:
    """Bytes of the cache lines that a row of `size` bytes touches, where rows start where the last one ends."""
    return size if size % LINE == 0 else (math.ceil(size / LINE) + 1) * LINE


def bytes_skipped(
    blocks: list[FFNBlock],
    counts: Counts,
    predictors: list[dict[str, Tensor]] | None,
    itemsize: int,
    from_prompt: bool = False,
) -> float:
    """Share of the FFN weight bytes that a decode step does not read, at the batch that was counted.

    Read are: up rows of selected neurons, gate rows of the same or, without a predictor, of all, down rows of kept
    ones, all of the predictor and compensation, all thresholds, and of int8 rows (`itemsize` 1) all scales. A plain
    block has no gate: without a predictor it reads all up rows. A mask from the prompt selects as a predictor of one
    byte a neuron does.

    Raises: MoyuError where no decode step was counted.
    """
    if not counts.steps.all():
        raise MoyuError(
            "no token comes after those that masks are taken from, so no decode step was counted: give longer text, or "
            "lower sparsifier.prompt"
        )
    read = dense = 0.0
    for layer, block in enumerate(blocks):
        row = row_bytes(block, itemsize)
        steps, selected = counts.steps[layer].item(), counts.selected_rows[layer].item()
        gated = block.layout != "plain"
        gates = (selected if predictors or from_prompt else steps * block.neurons) if gated else 0
        read += row * (gates + selected + counts.kept_rows[layer].item()) / steps
        read += 4 * block.neurons + (stored_bytes(predictors[layer]) if predictors else 0)
        read += block.neurons if from_prompt else 0
        read += scale_bytes(block, itemsize) + compensation_bytes(block, itemsize)
        dense += ffn_bytes(block, itemsize)
    return 1 - read / dense


class SparseMasks:
    """Puts a sparse model's masks on a stock model and counts them.

    Args:
        rules: one a layer.
        predictors: storage form a layer, or None for the rule mask alone.
        cuts: per layer the score above which a neuron is selected, default 0.
        oracle: keep as many neurons per token and layer as the mask would, but those of largest contribution.
        observe: sees every layer's scores `[..., F]`.
        inputs: rules of the inputs of other linear layers, by path.
        batch: sequences that a decode step takes together; above 1 the model must see activations `[batch, T, F]`.
    """

    def __init__(
        self,
        model: Any,
        rules: list[Rule],
        predictors: list[dict[str, Tensor]] | None,
        cuts: list[float] | None = None,
        oracle: bool = False,
        observe: Callable[[int, Tensor], None] | None = None,
        inputs: dict[str, Rule] | None = None,
        batch: int = 1,
    ) -> None:
        self.inputs = InputMasks(model, inputs or {})
        self.blocks = find_blocks(model)
        self.rules, self.predictors, self.oracle, self.observe = rules, predictors, oracle, observe
        family = predictor_family([*predictors[0].values()]) if predictors else ""
        self.looks_back = family == "history" or any(rule.prompt for rule in rules)  # over the tokens of a sequence
        self.batch = batch
        self.cuts = cuts or [0.0] * len(self.blocks)
        self.norms = [block.down_norms() for block in self.blocks]
        self.counts = Counts.zeros(len(self.blocks))
        self._masking = Masking(self.blocks, self._keep, inputs=bool(predictors), rules=rules)
        self._gate_seams: dict[int, Seam] = {}
        if not predictors:  # then a rule's gate, seen here after `masking` has put it there, says whose up is read
            for layer, (block, rule) in enumerate(zip(self.blocks, rules, strict=True)):
                if block.layout in GATED_LAYOUTS and rule.op in ON_GATE:
                    self._gate_seams[layer] = Seam(block.module, block.act, output=self._gate_counter(layer))

    def _gate_counter(self, layer: int) -> Callable[[tuple[Tensor, ...], Tensor], Tensor]:
        def count(args: tuple[Tensor, ...], gate: Tensor) -> Tensor:
            self._count(layer, gate != 0, gate != 0, self.counts.selected, self.counts.selected_rows)
            return gate

        return count

    def _count(self, layer: int, mask: Tensor, decoded: Tensor, neurons: Tensor, rows: Tensor) -> None:
        """decoded: of `mask`, the tokens that decode steps take."""
        neurons[layer] += mask.sum().item()
        rows[layer] += (decoded.any(0) if self.batch > 1 else decoded).sum().item()

    def _keep(self, layer: int, a: Tensor, expert: int | None) -> Tensor:
        norm = self.norms[layer] if expert is None else self.norms[layer][expert]
        masked = self.rules[layer].mask(a, expert)
        rule, prompt = masked & (a != 0), self.rules[layer].prompt
        contribution = a.abs().float() * norm
        if self.predictors:
            scores = self._masking.scores(layer, self.predictors[layer]).view_as(a)
            if self.observe:
                self.observe(layer, scores)
            selected = scores > self.cuts[layer]
            keep = rule & selected
        elif prompt:
            selected, keep = masked, rule
        else:
            selected, keep = torch.full_like(rule, layer not in self._gate_seams), rule
        if self.oracle:
            keep = largest(contribution, keep.sum(-1))
        counts = self.counts
        after = slice(prompt, None) if a.ndim == 3 else slice(None)
        self._count(layer, selected, selected[..., after, :], counts.selected, counts.selected_rows)
        self._count(layer, keep, keep[..., after, :], counts.kept, counts.kept_rows)
        counts.tokens[layer] += a[..., 0].numel()
        counts.steps[layer] += a[..., after, 0].numel() / self.batch
        counts.mass_kept[layer] += (contribution * keep).sum(dtype=torch.float64).item()
        counts.mass_rule[layer] += (contribution * rule).sum(dtype=torch.float64).item()
        counts.ruled[layer] += rule.sum().item()
        return keep

    def __enter__(self) -> "SparseMasks":
        return self

    def __exit__(self, *exc: object) -> None:
        for seam in self._gate_seams.values():
            seam.remove()
        self._masking.remove()
        self.inputs.__exit__(*exc)

    def per_layer(self) -> list[dict[str, Any]]:
        """Per layer: density selected and kept, recall of the rule by contribution and by count, precision by count."""
        c = self.counts
        rows = []
        for i, block in enumerate(self.blocks):
            places = c.tokens[i].item() * block.neurons
            rows.append(
                {
                    "block": block.path,
                    "selected": c.selected[i].item() / places,
                    "kept": c.kept[i].item() / places,
                    "mass_kept": (c.mass_kept[i] / c.mass_rule[i].clamp_min(1e-30)).item(),
                    "recall": (c.kept[i] / c.ruled[i].clamp_min(1)).item(),
                    "precision": (c.kept[i] / c.selected[i].clamp_min(1)).item(),
                }
            )
        return rows

    def bytes_skipped(self, itemsize: int) -> float:
        """`bytes_skipped` of what was counted."""
        from_prompt = any(rule.prompt for rule in self.rules)
        return bytes_skipped(self.blocks, self.counts, self.predictors, itemsize, from_prompt)

    def neurons_off(self) -> float:
        return 1 - self._share(self.counts.kept)

    def share_selected(self) -> float:
        return self._share(self.counts.selected)

    def _share(self, neurons: Tensor) -> float:
        places = sum(t * block.neurons for t, block in zip(self.counts.tokens.tolist(), self.blocks, strict=True))
        return float(neurons.sum().item() / places)


@contextmanager
def generating(model: Any, masks: SparseMasks | None) -> Iterator[None]:
    """Within, `model.generate` sees whole sequences at each step where masks look back over them: the steps of a cache
    would be taken for sequences of their own."""
    if masks is None or not masks.looks_back:
        yield
        return
    stock = model.generate
    model.generate = lambda *args, **named: stock(*args, **named | {"use_cache": False})
    try:
        yield
    finally:
        del model.generate
