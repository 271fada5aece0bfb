"""Fits compensations in closed form: the low-rank map of an FFN's input that best foretells what its masks drop."""

from typing import Any

import torch
from moyu_kernels.compensation import Compensation
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import FFNBlock, device_of, find_blocks
from moyu_train.models.compensation import attach
from moyu_train.models.loading import check_memory
from moyu_train.progress import track
from moyu_train.settings import Compensate

RIDGE = 1e-3  # of the mean square of the inputs


class Sums:
    """Of one block under masks, over tokens: inputs x `[N, D]` and what the masks drop r `[N, D]`, streamed."""

    def __init__(self, block: FFNBlock) -> None:
        self._block, d, device = block, block.hidden, block.weights()[0].device
        self._tokens, self._x, self._a = 0, torch.empty(0), torch.empty(0)
        self._sum_x, self._sum_r = torch.zeros(d, device=device), torch.zeros(d, device=device)
        self._xx, self._xr = torch.zeros(d, d, device=device), torch.zeros(d, d, device=device)
        front, down = (getattr(block.module, name) for name in (block.gate or block.up, block.down))
        self.handles = [
            front.register_forward_pre_hook(self._see_input),
            down.register_forward_pre_hook(self._see_activation, prepend=True),  # before the masks' own hook
            down.register_forward_hook(self._see_masked),
        ]

    def _see_input(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self._x = args[0].flatten(0, -2).float()

    def _see_activation(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self._a = args[0]

    def _see_masked(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        x, r = self._x, ((self._a - args[0]).flatten(0, -2) @ self._block.down_matrix().T).float()
        self._tokens += len(x)
        self._sum_x += x.sum(0)
        self._sum_r += r.sum(0)
        self._xx += x.T @ x
        self._xr += x.T @ r

    def solve(self, rank: int) -> Compensation:
        """Reduced-rank ridge regression of r on x, with the factors of equal norms."""
        x, r = (total.double() / self._tokens for total in (self._sum_x, self._sum_r))
        if not (self._xx.isfinite().all() and self._xr.isfinite().all()):
            raise MoyuError(
                f"{self._block.path}: its inputs or activations are not finite on the training text, so no "
                "compensation can be fitted; check the weights"
            )
        cov = self._xx.double() / self._tokens - x.outer(x)
        cross = self._xr.double() / self._tokens - x.outer(r)
        ridge = RIDGE * self._xx.diagonal().double().mean() / self._tokens
        cov.diagonal().add_(ridge.clamp_min(1e-30))
        factor = torch.linalg.cholesky(cov)
        # W = cov^-1 cross; the rank-R map nearest to it, in the norm of what it gives, keeps the largest of factor' W.
        half = torch.linalg.solve_triangular(factor, cross, upper=False)
        top = torch.linalg.svd(half, full_matrices=False).Vh[:rank]  # [R, D]
        a = torch.cholesky_solve(cross @ top.T, factor).T  # [R, D]
        size = (a.norm() / top.norm()).sqrt().clamp_min(1e-12)
        a, b = a / size, top.T * size
        bias = r - b @ (a @ x)
        return Compensation(*(part.float().contiguous() for part in (a, b, bias)))


@torch.no_grad()
def fit_compensations(model: Any, windows: Tensor, settings: Compensate) -> None:
    """Put on every block the compensation for what the masks that are on the model drop, all layers in one pass.

    windows: int64 `[N, T]`, of which the first `settings.tokens` tokens are read.

    Raises: MoyuError where there is too little memory for the sums, two of `[D, D]` a layer.
    """
    blocks = find_blocks(model)
    check_memory(
        sum(8 * block.hidden**2 for block in blocks),
        "fitting compensations",
        "the size of the model, or set finetune.compensation: null",
    )
    sums = [Sums(block) for block in blocks]
    training = model.training
    model.eval()
    some: list[Tensor] = list(windows[: max(settings.tokens // windows.shape[1], 1)])
    for ids in track(some, "fit compensations"):
        model(input_ids=ids[None].to(device_of(model)), use_cache=False, logits_to_keep=1)
    for handle in (handle for one in sums for handle in one.handles):
        handle.remove()
    attach(blocks, [one.solve(settings.rank) for one in track(sums, "solve compensations")])
    model.train(training)
