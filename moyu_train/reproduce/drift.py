"""The root cause that MOYU names: cross-entropy pushes every positive activation down, on average over output weights.

For logits `z = V a` with random columns v_i of variance s^2, to first order
`E_V[dL/da_i] = a_i s^2 sum_c p_c (1 - p_c)`, p the output distribution: an implicit L2 penalty at initialisation,
whatever the data, that fades as p sharpens. The toy draws V many times; the model's own blocks, far from
initialisation, have their gradients regressed on a as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from moyu_train.analysis.plots import axes_of
from moyu_train.data import Documents
from moyu_train.models.blocks import device_of, find_blocks
from moyu_train.models.masking import Masking
from moyu_train.pipeline import Run
from moyu_train.progress import track
from moyu_train.recipe import Recipe
from moyu_train.reproduce.base import Outcome, Reproduction
from moyu_train.training.losses import Weights, token_loss

CLASSES, NEURONS, DRAWS, DEVIATION = 200, 64, 4000, 0.1
NEAR = 0.1  # of slope 1


class Drift(Reproduction):
    claim: ClassVar[str] = "At initialisation cross-entropy pulls positive activations to zero, as by an L2 penalty"
    criterion: ClassVar[str] = (
        f"slope of the measured on the predicted gradient within {NEAR} of 1 for ReLU, GELU and SiLU with random "
        "output weights."
    )

    def run(self, recipe: Recipe, seeds: Sequence[int]) -> Outcome:
        activations: dict[str, Callable[[Tensor], Tensor]] = {
            "ReLU": functional.relu,
            "GELU": functional.gelu,
            "SiLU": functional.silu,
        }
        toys = {name: toy(act) for name, act in activations.items()}
        rows = [{"activation": name, **found} for name, found in toys.items()]
        run = Run(recipe)
        layers = regress(run.dense(), run.test.first(recipe.analyze.tokens), recipe.finetune.window)
        sure = sum(layer["t"] > 2 for layer in layers)
        passed = all(abs(found["slope"] - 1) <= NEAR for found in toys.values())
        slopes = ", ".join(f"{name} {found['slope']:.2f}" for name, found in toys.items())
        conclusion = (
            f"With random output weights the measured gradient is {slopes} times the predicted one. In the trained "
            f"model "
            f"{sure} of {len(layers)} layers have gradients that grow with the activation (t above 2): the theorem is "
            "about initialisation, and says nothing of them."
        )
        figure, axes = axes_of("layer of the trained model", "t of the regression of dL/da on a")
        axes.bar(range(len(layers)), [layer["t"] for layer in layers])
        return Outcome(rows, passed, conclusion, figure, {"layers": layers})


def toy(act: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Slope and correlation of the mean gradient over `DRAWS` output matrices with its first-order prediction."""
    generator = torch.Generator().manual_seed(0)
    a = act(torch.randn(NEURONS, generator=generator, dtype=torch.float64))
    measured, impurity = torch.zeros_like(a), 0.0
    for _ in range(DRAWS):
        v = DEVIATION * torch.randn(CLASSES, NEURONS, generator=generator, dtype=torch.float64)
        p = (v @ a).softmax(-1)
        impurity += float((p * (1 - p)).sum()) / DRAWS
        measured += v.T @ p / DRAWS  # the label's part, -v_y, has mean 0 whatever y
    predicted = a * DEVIATION**2 * impurity
    slope = (measured @ predicted / predicted.square().sum()).item()
    return {"slope": slope, "correlation": torch.corrcoef(torch.stack([measured, predicted]))[0, 1].item()}


def regress(model: Any, documents: Documents, window: int) -> list[dict[str, Any]]:
    """Per layer the regression of dL/da on a over tokens and neurons: mean `slope`, and its `t` over windows."""
    blocks = find_blocks(model)
    slopes: list[list[float]] = [[] for _ in blocks]

    def watch(layer: int, a: Tensor, expert: int | None) -> None:
        x = a.detach().float()

        def take(gradient: Tensor) -> None:
            centred = x - x.mean()
            slopes[layer].append((centred * gradient.float()).sum().item() / centred.square().sum().item())

        a.register_hook(take)

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)  # so that activations have gradients, and little else
    with Masking(blocks, watch):
        for _, ids in track(documents.windows(window), "drift: gradients"):
            ids = ids[None].to(device_of(model))
            loss, _ = token_loss(model(input_ids=ids, use_cache=False).logits, ids, Weights(kl=0.0, lm=1.0))
            loss.backward()
    rows = []
    for block, values in zip(blocks, torch.tensor(slopes, dtype=torch.float64), strict=True):
        error = values.std() / len(values) ** 0.5
        rows.append({"block": block.path, "slope": values.mean().item(), "t": (values.mean() / error).item()})
    return rows
