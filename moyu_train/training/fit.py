"""PredictorTrainer: predictors of all layers in one pass over text, under the rule mask, nothing dumped."""

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from moyu_kernels.ffn import LAYOUTS_WITH_OP
from moyu_kernels.rules import Rule
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.files import read_tensors, reading
from moyu_train.models.blocks import device_of, find_blocks
from moyu_train.models.context import check_window
from moyu_train.models.masking import Masking
from moyu_train.progress import track
from moyu_train.recipe import Recipe


def fit_windows(recipe: Recipe, train: Documents) -> Tensor:
    """The text that predictors and routers are fitted on, int64 `[N, T]`."""
    windows = train.packed(recipe.fit.window, recipe.seed + 1)[: max(recipe.fit.tokens // recipe.fit.window, 1)]
    if not len(windows):
        raise MoyuError(
            f"the training text has {train.total} tokens, less than one fit.window of {recipe.fit.window}; lower "
            "it, or give more text"
        )
    return windows


class PredictorTrainer:
    """Fits one predictor per FFN block on the activations that the model produces under the rule's mask.

    Args:
        model: its weights are only read.
        rules: one a layer.
        cls, options: the predictor family from the registry.
        folder: sums are saved there, so that an interrupted fit goes on to the same numbers.
    """

    def __init__(self, model: Any, rules: list[Rule], cls: type, options: Any, folder: Path) -> None:
        self.model, self.rules, self.folder = model, rules, folder
        self.blocks = find_blocks(model)
        unsupported = {block.layout for block in self.blocks if block.layout not in LAYOUTS_WITH_OP}
        if unsupported:
            found = ", ".join(sorted(unsupported))
            raise MoyuError(
                f"predictors are fitted for gated and plain FFN blocks so far, this model has {found} "
                "ones; its rule can be exported without them from Python: moyu_train.checkpoints.export.export"
            )
        self.norms = [block.down_norms() for block in self.blocks]
        device = device_of(model)
        self.predictors = [cls(options, block, device) for block in self.blocks]

    @torch.no_grad()
    def fit(self, windows: Tensor, save_every: int) -> list[Any]:
        """One pass over `windows` int64 `[N, T]`, shared among the processes; what each predictor solves to."""
        check_window(self.model, windows.shape[1], "fit.window")
        process = PartialState()
        if self.predictors[0].in_step:
            windows = windows[: len(windows) // process.num_processes * process.num_processes]
        windows = windows[process.process_index :: process.num_processes]
        path = self.folder / f"sums-{process.process_index}-of-{process.num_processes}.safetensors"
        start = self._resume(path)
        with self._observing():
            for index in track(range(start, len(windows)), "fit predictors"):
                ids = windows[index][None].to(device_of(self.model))
                self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
                if (index + 1) % save_every == 0:
                    self._save(path, index + 1)
        if process.num_processes > 1:
            for predictor in self.predictors:
                predictor.gather()
        self.predictors[0].together(self.predictors)
        return [self._solved(layer) for layer in track(range(len(self.predictors)), "solve predictors")]

    def _solved(self, layer: int) -> Any:
        try:
            found = self.predictors[layer].solve()
        except torch.linalg.LinAlgError as error:
            raise MoyuError(f"{self._degenerate(layer)} ({error})") from error
        families = found if isinstance(found, list) else [found]
        tensors = chain.from_iterable(family.values() for family in families)
        if not all(tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()):
            raise MoyuError(self._degenerate(layer))
        return found

    def _degenerate(self, layer: int) -> str:
        return (
            f"no predictor can be fitted to {self.blocks[layer].path}: on this text its neurons are all off, or its "
            "input does not vary; check the model's weights, or give more text"
        )

    def _observing(self) -> Masking:
        """The masks that the text is read under, with predictors that see what they act on."""

        def keep(layer: int, a: Tensor, expert: int | None) -> Tensor:
            x = masking.input(layer).reshape(-1, self.blocks[layer].hidden)
            contribution = (a.abs() * self.norms[layer]).reshape(len(x), -1)
            if not contribution.isfinite().all():
                raise MoyuError(
                    f"activations of {self.blocks[layer].path} are not finite on this text; check the model's weights"
                )
            mask: Tensor = self.rules[layer].mask(a, expert)
            self.predictors[layer].observe(x, contribution, (mask & (a != 0)).view_as(contribution))
            return mask

        masking = Masking(self.blocks, keep, inputs=True, rules=self.rules)
        return masking

    def _save(self, path: Path, done: int) -> None:
        tensors = {f"{i}.{k}": v for i, p in enumerate(self.predictors) for k, v in p.state().items()}
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"windows": str(done)})
        temporary.replace(path)

    def _resume(self, path: Path) -> int:
        if not path.is_file():
            return 0
        tensors = read_tensors(path)
        with reading(path), safe_open(path, "pt") as file:
            done = int(file.metadata()["windows"])
            for i, predictor in enumerate(self.predictors):
                predictor.load({name: tensors[f"{i}.{name}"] for name in predictor.state()})
        return done
