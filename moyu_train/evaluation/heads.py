"""`moyu heads`: attention heads named by routers, in the loop, beside the oracle and the same heads for every token."""

from typing import TYPE_CHECKING, Any

import torch
from moyu_kernels.heads import HeadRouters, install_heads, simulated_because

from moyu_train.evaluation.head_masks import HeadMasks
from moyu_train.evaluation.perplexity import Scores, ratio_interval, score
from moyu_train.evaluation.through_kernels import check_agreement, decoded_losses, masked_losses, perplexity
from moyu_train.models.blocks import device_of
from moyu_train.models.heads import Attention, find_attention
from moyu_train.training.heads import Routers, check_shares, fit_routers, sparse_attentions

if TYPE_CHECKING:
    from moyu_train.pipeline import Run


def heads(run: "Run") -> dict[str, Any]:
    """Rows of the recipe's `heads` on the dense model, one a density.

    A row: `keep` units of each token and layer, but for the dense layers; `recall` and `mass_kept` of the routers, of
    the oracle's units and their squared contribution, means over layers; of what a dense decode step reads in all
    attention layers the shares that are not read: `weights_skipped` (of q, k, v and o; routers counted as read),
    `cache_skipped`, and `bytes_skipped` of both, null where no op skips heads ("simulated"); perplexity over dense with
    the units of `router`, of `oracle`, and of `fixed`: those of largest mean for every token. `points` tells the rest.
    """
    recipe, settings = run.recipe, run.recipe.heads
    check_shares(find_attention(run.skeleton), settings, "densities", settings.densities)
    model = run.dense()
    attentions = find_attention(model)
    judge = Judge(run, model, attentions, *fit_routers(run, model, attentions))
    dense = judge.score("dense")
    found = [judge.point(density, dense) for density in settings.densities]
    return {
        "rows": [row for row, _ in found],
        "points": [point for _, point in found],
        "ppl": {"dense": dense.perplexity},
        "nll": {"dense": dense.nll},
        "scored": dense.tokens,
        "unit": settings.unit,
        "units": judge.units,
        "dense_layers": list(settings.dense_layers),
        "batch": settings.batch,
        "context": settings.context,
        "dtype": recipe.export.dtype,
        "simulated_because": judge.simulated,
        "kernels": judge.through_kernels(recipe.evaluate.kernel_tokens, found[0][0]["keep"]),
        "fit_tokens": recipe.fit.tokens,
        "tokens": judge.documents.total,
        "documents": len(judge.documents.tokens),
        "test": recipe.data.test.rpartition("/")[2],
    }


class Judge:
    """Scores masks of heads, all on the same documents. Args: routers, fixed: one a layer."""

    def __init__(self, run: "Run", model: Any, attentions: list[Attention], routers: Routers, fixed: Routers) -> None:
        recipe, settings = run.recipe, run.recipe.heads
        self.model, self.settings = model, settings
        self.documents, self.window = run.test.first(recipe.evaluate.tokens), recipe.evaluate.window
        self.units = attentions[0].units(settings.unit)
        layers = [i for i in range(len(attentions)) if i not in settings.dense_layers]
        self.attentions = sparse_attentions(attentions, settings)
        self.routers, self.fixed = [routers[i] for i in layers], [fixed[i] for i in layers]
        self.dense_layers = [attentions[i] for i in settings.dense_layers]
        self.itemsize = getattr(torch, recipe.export.dtype).itemsize
        reasons = (simulated_because(model, a.block.path, a.block.down) for a in self.attentions)
        self.simulated = next(filter(None, reasons), "")

    def score(self, what: str) -> Scores:
        return score(self.model, self.documents, self.window, f"heads: {what}", batch=self.settings.batch)

    def masks(self, keep: int, routers: Routers | None, batch: int) -> HeadMasks:
        return HeadMasks(self.attentions, self.settings.unit, keep, routers, batch)

    def point(self, density: float, dense: Scores) -> tuple[dict[str, Any], dict[str, Any]]:
        """The row of a density, and what is told beside it."""
        keep, batch = round(density * self.units), self.settings.batch
        kinds: dict[str, Routers | None] = {"router": self.routers, "oracle": None, "fixed": self.fixed}
        found = {}
        for name, routers in kinds.items():
            with self.masks(keep, routers, batch) as masks:
                scores = self.score(f"{keep} of {self.units} {self.settings.unit}s, {name}")
            found[name] = scores, masks
        masks = found["router"][1]
        bytes_ = masks.skipped(self.dense_layers, self.itemsize, self.settings.context)
        row = {
            "density": keep / self.units,
            "keep": keep,
            **masks.quality(),
            **{name: None if self.simulated else value for name, value in bytes_.items()},
            **{name: scores.perplexity / dense.perplexity for name, (scores, _) in found.items()},
        }
        point = {
            "would_skip": bytes_,
            "ppl": {name: scores.perplexity for name, (scores, _) in found.items()},
            "nll": {name: scores.nll for name, (scores, _) in found.items()},
            "router_interval": ratio_interval(found["router"][0], dense),
            "router_over_oracle_interval": ratio_interval(found["router"][0], found["oracle"][0]),
            "layers": masks.per_layer(),
        }
        return row, point

    def through_kernels(self, tokens: int, keep: int) -> dict[str, float] | None:
        """Perplexity of the first tokens decoded one by one by the ops, and under the masks. It changes the model.

        Raises: MoyuError where the two differ.
        """
        if self.simulated or not tokens:
            return None
        few = self.documents.windows(min(tokens, self.window))[0][1]
        with self.masks(keep, self.routers, batch=1):
            masked = masked_losses(self.model, few)
        named = zip(self.attentions, self.routers, strict=True)
        routers = {attention.block.path: router for attention, router in named}
        heads = HeadRouters(self.settings.unit, keep, self.attentions[0].block.down, routers)
        install_heads(self.model, heads, backend="cpu" if device_of(self.model).type == "cpu" else "reference")
        found = decoded_losses(self.model, few)
        check_agreement(found, masked)
        return {"perplexity": perplexity(found), "tokens": len(few), "masked_perplexity": perplexity(masked)}
