"""Holds a sparsifier on a live model during training: masks at the seam, density statistics, closed-loop thresholds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moyu_train.models.blocks import FFNBlock, find_blocks, set_marker
from moyu_train.models.masking import Masking
from moyu_train.models.state import thresholds_from_tensors, thresholds_to_tensors

STATE_FILE = "moyu_training.safetensors"


class SparsityControl(TrainerCallback):
    """The mask of a model in training, for our trainer or, as a callback, for anyone's.

    The rule acts in every forward. Densities are counted while `counting` (SparsityTrainer: in the student's forward
    only, not in a recompute or an evaluation; under another trainer: in every forward),
    summed over the micro-batches of an optimizer step, all-reduced once at its end, and then move the thresholds.

    Args:
        model: the student; its config gets the marker at once, so that no checkpoint of it can pass for a dense model.
        sparsifier: an instance from the registry, with its thresholds.
        target: density that the rule is held at, the share of neurons kept per token.
        predictors: storage form a layer; the mask is then what the exported model decodes with, rule and prediction.
        penalty: an instance from the registry. It sees the activations before the mask; `take_penalty` hands its terms
            to a trainer that adds them to its loss.
    """

    def __init__(
        self,
        model: Any,
        sparsifier: Any,
        target: float,
        predictors: list[dict[str, Tensor]] | None = None,
        penalty: Callable[[int, Tensor], Tensor] | None = None,
    ) -> None:
        self.blocks: list[FFNBlock] = find_blocks(model)
        self.sparsifier, self.target, self.predictors = sparsifier, target, predictors
        self.penalty = penalty
        self._terms: list[Tensor] = []
        self._real: Tensor | None = None  # bool, the tokens of the forward under way that are no padding
        self.counting = True
        self._counts = self._zeros()
        self.density = torch.full((len(self.blocks), 3), target, dtype=torch.float64)  # rule, selected, kept
        set_marker(model.config, sparsifier.name)
        self._masking = Masking(self.blocks, self._keep, inputs=predictors is not None)

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self.blocks), 4, dtype=torch.float64)  # rule, selected, kept, seen

    def _keep(self, layer: int, a: Tensor, expert: int | None) -> Tensor:
        rule = keep = self.sparsifier.keep(layer, a, expert)
        selected = torch.ones_like(rule)
        if self.predictors:
            with torch.no_grad():
                scores = self._masking.scores(layer, self.predictors[layer])
            selected = scores.view_as(a) > 0
            keep = rule & selected
        if self.penalty is not None and torch.is_grad_enabled():
            # A recompute has to repeat these very operations, or its saved tensors would not be those of the forward.
            values = self.penalty(layer, a)
            term = (values if self._real is None else values.flatten() * self._real.flatten()).sum()
            if self.counting:
                self._terms.append(term)
        if self.counting:
            seen = torch.ones_like(keep[..., 0]) if self._real is None else self._real.view(keep.shape[:-1])
            sums = [mask[seen].sum().double() for mask in (rule, selected, keep)]
            self._counts[layer] += torch.stack([*sums, seen.sum() * keep.shape[-1]]).cpu()
        return keep

    @contextmanager
    def armed(self, on: bool, real: Tensor | None = None) -> Iterator[None]:
        """Counts within, and collects the penalty's terms. real: `[B, T]`, not 0 where a token is no padding."""
        before, self.counting = self.counting, on
        self._real, self._terms = None if real is None else real.bool(), []
        try:
            yield
        finally:
            self.counting = before

    def take_penalty(self) -> Tensor:
        """Of the forward just armed: the penalty's fp32 sum over real tokens, mean over layers."""
        return torch.stack(self._terms).sum() / len(self.blocks)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        counts = self._counts
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            counts = counts.to(args.device)
            torch.distributed.all_reduce(counts)
            counts = counts.cpu()
        self.density = counts[:, :3] / counts[:, 3:].clamp_min(1)
        self._counts = self._zeros()
        for layer, density in enumerate(self.density[:, 0].tolist()):
            self.sparsifier.control(layer, density, self.target)

    def metrics(self) -> dict[str, float]:
        """Target against achieved, for every log line; `kept` is what rule and prediction leave together."""
        rule, selected, kept = self.density.mean(0).tolist()
        return {
            "sparsity_target": 1 - self.target,
            "sparsity": 1 - rule,
            "sparsity_lowest_layer": 1 - self.density[:, 0].max().item(),
            "sparsity_highest_layer": 1 - self.density[:, 0].min().item(),
            "selected": selected,
            "kept": kept,
        }

    def save(self, folder: Path) -> None:
        """Thresholds and last densities, fp32 and fp64 whatever the model's dtype, beside a training checkpoint."""
        tensors = thresholds_to_tensors(self.sparsifier.thresholds)
        save_file({**tensors, "density": self.density}, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        tensors = load_file(folder / STATE_FILE)
        self.density = tensors["density"]
        self.sparsifier.thresholds = thresholds_from_tensors(tensors)

    def remove(self) -> None:
        self._masking.remove()
