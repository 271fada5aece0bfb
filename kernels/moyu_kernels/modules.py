"""What all sparse modules have: modes, backends, counts, and where their gradients come from."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from .ops import cpu

MODES = ("predicted", "rule", "dense")
BACKENDS = ("cpu", "reference", "triton")
MAX_ROWS = cpu.MAX_ROWS


def resolve_backend(backend: str, device: torch.device) -> str:
    """`auto` becomes the native backend of the device.

    Raises: ValueError for an unknown name.
    """
    if backend == "auto":
        return {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; use auto, {', '.join(BACKENDS)}")
    return backend


def check_mode(mode: str) -> None:
    """Raises: ValueError for an unknown name."""
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown; use one of {', '.join(MODES)}")


class SparseModule(nn.Module):
    """What runs in a mode and on a backend, and keeps the dtypes of its buffers under `.to(dtype)`."""

    mode: str
    backend: str
    counts: Tensor
    _run: Callable[..., tuple[Tensor, Tensor]]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_run"}  # ops cannot be pickled

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.set_mode(self.mode, self.backend)

    def set_mode(self, mode: str, backend: str | None = None) -> Self:
        """Switch the mode, and the backend where one is given."""
        raise NotImplementedError

    @property
    def predicts(self) -> bool:
        """Whether it has what mode "predicted" goes by."""
        return False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        dtypes = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            moved, original = self._buffers[name], kept[name]
            if moved is not None and original is not None and moved.dtype != dtype:
                self._buffers[name] = original.to(moved.device)
        return self


def lay_out(module: Any, _: Any) -> None:
    """A hook after loading: weights that were assigned, not copied, as they must lie."""
    module._lay_out()


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether what is computed of these is part of a backward pass, which the ops have none of."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def set_mode(model: nn.Module, mode: str, backend: str | None = None) -> None:
    """Run the same loaded checkpoint in another mode or backend, for comparisons.

    Where only the attention heads are predicted, or only the FFN, "predicted" is "rule" for the other.

    Raises: ValueError where the model holds no SparseModule, or nothing that could be predicted in mode "predicted".
    """
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, SparseModule)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} holds no sparse module; load it with moyu_kernels.from_pretrained")
    some = mode == "predicted" and any(block.predicts for block in blocks)
    for block in blocks:
        block.set_mode("rule" if some and not block.predicts else mode, backend)
