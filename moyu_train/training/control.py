"""Holds a sparsifier on a live model during training: masks at the seam, density statistics, closed-loop thresholds."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moyu_train.errors import MoyuError
from moyu_train.files import read_tensors, reading
from moyu_train.models.blocks import FFNBlock, find_blocks
from moyu_train.models.marker import set_marker
from moyu_train.models.masking import Masking
from moyu_train.models.state import thresholds_from_tensors, thresholds_to_tensors
from moyu_train.penalties.adaptive import AdaptiveCoefficient
from moyu_train.penalties.ratio import RatioCoefficient
from moyu_train.training.health import Health

STATE_FILE = "moyu_training.safetensors"
PENALTY = "penalty."  # in front of the names of its state


class SparsityControl(TrainerCallback):
    """The mask of a model in training, for our trainer or, as a callback, for anyone's.

    The rule acts in every forward. Densities are counted while `counting` (SparsityTrainer: in the student's forward
    only, not in a recompute or an evaluation; under another trainer: in every forward),
    summed over the micro-batches of an optimizer step, all-reduced once at its end, and then move the thresholds.

    Args:
        model: the student; its config gets the marker at once, so that no checkpoint of it can pass for a dense model.
        sparsifier: an instance from the registry, with its thresholds.
        target: density that the rule is held at, the share of neurons kept per token.
        targets: of each layer, where they are not all `target`, their mean.
        together: hold the mean alone, by one factor on the thresholds of all layers.
        predictors: storage form a layer; the mask is then what the exported model decodes with, rule and prediction.
        penalty: an instance from the registry. It sees the activations before the mask. A trainer runs its forward
            within `armed` and adds what `take_penalty` returns to its loss, as SparsityTrainer does.
        adaptive: moves the penalty's coefficient, by the density that the rule keeps or by the penalty itself.
        blocks: default the FFN blocks of `model`.
    """

    prefix = ""  # of the names of its metrics and of its state file

    def __init__(
        self,
        model: Any,
        sparsifier: Any,
        target: float,
        predictors: list[dict[str, Tensor]] | None = None,
        penalty: Any = None,
        adaptive: AdaptiveCoefficient | RatioCoefficient | None = None,
        blocks: list[FFNBlock] | None = None,
        targets: Sequence[float] | None = None,
        together: bool = False,
    ) -> None:
        self.blocks: list[FFNBlock] = blocks or find_blocks(model)
        self.targets, self.together = targets or [target] * len(self.blocks), together
        self.sparsifier, self.target, self.predictors = sparsifier, target, predictors
        self.penalty, self.adaptive = penalty, adaptive
        self._terms: list[Tensor] = []
        self._penalty = torch.zeros((), dtype=torch.float64)  # of the optimizer step under way, sum over tokens
        self._real: Tensor | None = None  # bool, the tokens of the forward under way that are no padding
        self.counting, self._collecting = True, False
        self._look: Callable[[int, Tensor], None] | None = None  # of a forward on other tokens, for the penalty
        self.health = Health(self.blocks, sparsifier.thresholds)
        routed = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
        self._experts = routed if self.blocks[0].layout == "experts" else 1  # that see, and count, a token
        self._counts = self._zeros()
        self.density = torch.full((len(self.blocks), 3), target, dtype=torch.float64)  # rule, selected, kept
        sparsifier.check(self.blocks)
        set_marker(model.config, sparsifier.name)
        sparsifier.advance(0.0)
        self._put_on()

    def _put_on(self) -> None:
        self._masking = Masking(
            self.blocks,
            self._keep,
            inputs=bool(self.predictors) or (self.penalty is not None and self.penalty.needs_input),
            rules=self.sparsifier.rules,
            straight_through=self.sparsifier.straight_through,
        )
        if self.penalty is not None:
            self.penalty.input = self._masking.input

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self.blocks), 4, dtype=torch.float64)  # rule, selected, kept, seen

    def _keep(self, layer: int, a: Tensor, expert: int | None) -> Tensor:
        rule = keep = self.sparsifier.rules[layer].mask(a, expert)
        selected = None
        if self.predictors:
            with torch.no_grad(), torch.autocast(a.device.type, enabled=False):  # fp32, as in the export
                scores = self._masking.scores(layer, self.predictors[layer])
            selected = scores.view_as(a) > 0
            keep = rule & selected
        if self._look is not None:
            self._look(layer, a)
        if self.penalty is not None and torch.is_grad_enabled():
            # A recompute has to repeat these very operations, or its saved tensors would not be those of the forward.
            values = self.penalty(layer, a, self._real)
            term = (values if self._real is None else values.flatten() * self._real.flatten()).sum()
            if self._collecting:
                self._terms.append(term)
                self.penalty.count(layer, self._real)
        if self.counting:  # a rule that takes so many keeps zeros too where there are no others
            some = self.sparsifier.rules[layer].distance(a) != 0
            self._count(layer, rule & some, selected, keep & some, expert)
        return keep

    def _count(self, layer: int, rule: Tensor, selected: Tensor | None, keep: Tensor, expert: int | None) -> None:
        """Masks of one forward, bool `[..., F]`; selected is None where there is no predictor, so that all are."""
        seen = torch.tensor(keep.numel(), device=keep.device)
        # An expert sees some of the tokens and does not say which: padding counts there.
        if self._real is not None and expert is None:
            real = self._real.view(*keep.shape[:-1], 1)
            seen, keep = real.count_nonzero() * keep.shape[-1], keep & real
            rule, selected = (keep if selected is None else rule & real), None if selected is None else selected & real
        ruled = rule.count_nonzero()
        kept, chosen = (ruled, seen) if selected is None else (keep.count_nonzero(), selected.count_nonzero())
        self._counts[layer] += torch.stack([ruled, chosen, kept, seen]).to(self._counts)
        self.health.note(layer, keep, expert)

    @contextmanager
    def armed(
        self, on: bool, real: Tensor | None = None, ids: Tensor | None = None, model: Any = None
    ) -> Iterator[None]:
        """Counts within, and collects the penalty's terms.

        Args:
            real: `[B, T]`, not 0 where a token is no padding.
            ids: the tokens, int64 `[B, T]`.
            model: what will be called with them, for penalties that compare with other tokens.
        """
        if real is not None and any(rule.prompt for rule in self.sparsifier.rules) and not real[:, 0].all():
            raise MoyuError(
                f"sparsifier {self.sparsifier.name!r} takes its mask from the first tokens, and a batch has padding "
                "there; pad on the right"
            )
        before, self.counting = self.counting, False
        self._real, self._terms = None if real is None else real.bool(), []
        try:
            if on and self.penalty is not None:
                self.penalty.prepare(ids, self._real, partial(self._peek, model))
            self.counting = self._collecting = on
            yield
        finally:
            self.counting, self._collecting = before, False

    def _peek(self, model: Any, ids: Tensor, real: Tensor | None, look: Callable[[int, Tensor], None]) -> Tensor:
        if model is None:
            raise MoyuError(f"penalty {self.penalty.name!r} looks at other text too; pass the model to `armed`")
        self._look = look
        # Dropout would make two forwards of the same text differ by more than a change of meaning does.
        modes = [(part, part.training) for part in model.modules()]
        model.eval()
        try:
            with torch.no_grad():
                mask = None if real is None else real.long()
                logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        finally:
            self._look = None
            for part, training in modes:
                part.training = training
        return logits

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The model without its masks within, dense as it came but for what has been trained."""
        self._masking.remove()
        try:
            yield
        finally:
            self._put_on()

    def take_penalty(self) -> Tensor:
        """Of the forward just armed: the penalty's fp32 sum over real tokens, mean over layers.

        Raises: MoyuError where no forward was armed.
        """
        terms, self._terms = self._terms, []
        if not terms:
            raise MoyuError(
                "no penalty was collected; run the training forward within SparsityControl.armed(True), and checkpoint "
                "activations, if at all, with use_reentrant=False"
            )
        penalty = torch.stack(terms).sum() / len(self.blocks)
        self._penalty += penalty.detach()
        return penalty

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring all state to the device that the Trainer has moved the model to."""
        self.sparsifier.thresholds = [threshold.to(args.device) for threshold in self.sparsifier.thresholds]
        self.predictors = self.predictors and [
            {name: tensor.to(args.device) for name, tensor in predictor.items()} for predictor in self.predictors
        ]
        if self.penalty is not None:
            self.penalty.to(args.device)
        self._counts, self._penalty = self._counts.to(args.device), self._penalty.to(args.device)
        self.health.to(args.device)
        self.sparsifier.advance(state.global_step / max(state.max_steps, 1))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._counts)
            if self.penalty is not None:
                torch.distributed.all_reduce(self._penalty)
        tokens = int(self._counts[0, 3].item() / (self.blocks[0].neurons * self._experts))
        kept = self.take_density()
        self.health.step(tokens)
        self.health.check(self.density[:, 0].tolist(), self.sparsifier.thresholds, state.global_step)
        progress = (state.global_step + 1) / max(state.max_steps, 1)
        settled = self.sparsifier.settled
        if self.adaptive and settled:
            self.adaptive.update(kept, self.target, progress, self._penalty.item() / max(tokens, 1))
        self._penalty.zero_()
        if self.penalty is not None:
            self.penalty.step()
        for layer, density in enumerate(self.density[:, 0].tolist() if settled else ()):
            if self.together:
                self.sparsifier.control(layer, kept, self.target)
            else:
                self.sparsifier.control(layer, density, self.targets[layer])
        self.sparsifier.advance(progress)

    def take_density(self) -> float:
        """Of all that was counted since the last call: sets `density` per layer, and returns the rule's mean."""
        self.density = (self._counts[:, :3] / self._counts[:, 3:].clamp_min(1)).cpu()
        self._counts = torch.zeros_like(self._counts)
        return self.density[:, 0].mean().item()

    def metrics(self) -> dict[str, float]:
        """Target against achieved, for every log line; `kept` is what rule and prediction leave together."""
        rule, selected, kept = self.density.mean(0).tolist()
        found = {
            "sparsity_target": 1 - self.target,
            "sparsity": 1 - rule,
            "sparsity_lowest_layer": 1 - self.density[:, 0].max().item(),
            "sparsity_highest_layer": 1 - self.density[:, 0].min().item(),
            "selected": selected,
            "kept": kept,
            **self.health.metrics(),
            **({"coefficient": self.adaptive.value} if self.adaptive else {}),
        }
        return {self.prefix + name: value for name, value in found.items()}

    def save(self, folder: Path) -> None:
        """Thresholds, densities, silent neurons, and what the penalty holds, beside a training checkpoint."""
        tensors = thresholds_to_tensors(self.sparsifier.thresholds)
        tensors |= {f"blocks.{i}.silent": silent for i, silent in enumerate(self.health.silent)}
        if self.adaptive:
            tensors["coefficient"] = self.adaptive.state()
        if self.penalty is not None:
            tensors |= {f"{PENALTY}{name}": tensor.contiguous() for name, tensor in self.penalty.state().items()}
        save_file({**tensors, "density": self.density}, folder / f"{self.prefix}{STATE_FILE}")

    def load(self, folder: Path) -> None:
        tensors = read_tensors(folder / f"{self.prefix}{STATE_FILE}")
        with reading(folder):
            self.density = tensors["density"]
            self.sparsifier.thresholds = thresholds_from_tensors(tensors)
            self.health.silent = [tensors[f"blocks.{i}.silent"] for i in range(len(self.blocks))]
            if self.adaptive:
                self.adaptive.load(tensors["coefficient"])
        if self.penalty is not None:
            state = {name.removeprefix(PENALTY): t for name, t in tensors.items() if name.startswith(PENALTY)}
            self.penalty.load(state)

    def remove(self) -> None:
        self._masking.remove()
