"""A model under measurement: its forward, and what every FFN block of it had active at each token.

A neuron of a dense model is active where its contribution reaches the layer's level (over_activation.py finds that), of
a sparse checkpoint where its own rule and predictor keep it. Nothing is stored here: `run` hands each layer's
activation on as it is produced.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moyu_kernels.heads import HeadRouters
from moyu_kernels.rules import Rule
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from moyu_train.checkpoints.export import read_heads, read_inputs, read_state
from moyu_train.data import Documents
from moyu_train.evaluation.head_masks import HeadMasks
from moyu_train.models.blocks import FFNBlock, device_of, find_blocks
from moyu_train.models.loading import load_dense
from moyu_train.models.masking import InputMasks, Masking
from moyu_train.models.structure import base_layer
from moyu_train.progress import track

SKIP = 4  # first positions of a sequence that no measure counts: attention sinks, abnormally dense


@dataclass(frozen=True)
class Seen:
    """What one layer did in one forward.

    a: fp32 `[B, T, F]`, 0 where the model's own mask (a sparse checkpoint's) drops it; for experts `[N, F]`.
    n: contribution `abs(a_i) * norm(W_down[:, i])`, of a's shape.
    active: bool, of a's shape.
    ratio: fp32, of a's shape: how far above its threshold a neuron is, before the mask; None without one.
    x: the block's input `[B, T, D]`, where it was asked for.
    """

    layer: int
    expert: int | None
    a: Tensor
    n: Tensor
    active: Tensor
    ratio: Tensor | None
    x: Tensor | None = None


class Subject:
    """A dense model, or with `rules` a sparse one.

    Args:
        name: for tables and plots.
        rules, predictors, inputs, heads: as in a sparse checkpoint.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        rules: list[Rule] | None = None,
        predictors: list[dict[str, Tensor]] | None = None,
        inputs: dict[str, Rule] | None = None,
        heads: HeadRouters | None = None,
    ) -> None:
        self.name, self.model, self.rules, self.predictors = name, model, rules, predictors
        self.inputs, self.heads = inputs, heads
        self.blocks = find_blocks(model)
        self.levels = [0.0] * len(self.blocks)  # of a dense model's contributions; 0: whatever is not exactly zero
        self.norms = [block.down_norms() for block in self.blocks]
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    @classmethod
    def checkpoint(cls, name: str, folder: Path) -> "Subject":
        rules, predictors = read_state(folder)
        return cls(name, load_dense(folder), rules, predictors, read_inputs(folder), read_heads(folder))

    @property
    def ordered(self) -> bool:
        """Whether blocks see tokens in their order, which experts do not."""
        return all(block.layout != "experts" for block in self.blocks)

    def embeddings(self) -> Tensor:
        """Input embeddings, `[V, D]`."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight.detach()

    @contextlib.contextmanager
    def masked(self, see: Callable[[Seen], Tensor | None], inputs: bool = False) -> Iterator[None]:
        """The model's own masks on it, if any. `see` gets every layer of every forward, and may narrow its mask.

        inputs: with the blocks' inputs.
        """

        def keep(layer: int, a: Tensor, expert: int | None) -> Tensor | None:
            norm = self.norms[layer] if expert is None else self.norms[layer][expert]
            raw, mask, ratio = a.float(), None, None
            if self.rules:
                rule = self.rules[layer]
                mask = rule.mask(a, expert) & (a != 0)
                if rule.keep == "threshold":
                    ratio = raw.abs() / (rule.threshold if expert is None else rule.threshold[expert])
                if self.predictors:
                    mask = mask & (masking.scores(layer, self.predictors[layer]).view_as(a) > 0)
                raw = torch.where(mask, raw, 0.0)
            n = raw.abs() * norm
            if self.rules is None and self.levels[layer]:
                ratio = n / self.levels[layer]
            active = mask if mask is not None else (n >= self.levels[layer]) & (n > 0)
            narrower = see(Seen(layer, expert, raw, n, active, ratio, masking.input(layer) if inputs else None))
            return mask if narrower is None else narrower if mask is None else mask & narrower

        masking = Masking(self.blocks, keep, inputs=inputs or bool(self.predictors), rules=self.rules)
        with masking, InputMasks(self.model, self.inputs or {}), HeadMasks.of(self.model, self.heads):
            yield

    @torch.no_grad()
    def run(
        self,
        ids: Tensor,
        see: Callable[[Seen], Tensor | None],
        positions: Tensor | None = None,
        inputs: bool = False,
    ) -> None:
        """One forward of int64 `[B, T]`; positions, of its shape, where the architecture takes them."""
        more = {}
        if positions is not None and self._takes_positions:
            # Without a mask transformers takes a jump in the positions for the start of another, packed sequence.
            more = {"position_ids": positions, "attention_mask": torch.ones_like(ids)}
        with self.masked(see, inputs):
            self.model(input_ids=ids.to(device_of(self.model)), use_cache=False, logits_to_keep=1, **more)


@dataclass(frozen=True)
class Window:
    """One sequence: its document, the index of its first token among all that are read, and its tokens `[T]`."""

    document: int
    start: int
    ids: Tensor


def windows(documents: Documents, length: int) -> list[Window]:
    """Sequences of up to `length` tokens; those no longer than `SKIP` are left out."""
    found, start = [], 0
    for document, ids in documents.windows(length):
        if len(ids) > SKIP + 1:
            found.append(Window(document, start, ids))
            start += len(ids)
    return found


def read(
    subject: Subject, sequences: list[Window], see: Callable[[Window, Seen], None], what: str, inputs: bool = False
) -> None:
    """Run all sequences, one at a time; `see` gets every layer of each."""
    for window in track(sequences, f"analyze {subject.name}: {what}"):
        subject.run(window.ids[None], lambda seen: see(window, seen), inputs=inputs)  # noqa: B023 - called within this run


def neuron_outputs(block: FFNBlock, expert: int | None) -> Tensor:
    """What each neuron adds to the output per unit of activation, fp32 `[F, D]`."""
    down = block.weights()[-1].float()
    if expert is not None:
        return down[expert].T
    return down if isinstance(base_layer(getattr(block.module, block.down)), Conv1D) else down.T
