"""The linear layer that skips the weights of weak inputs."""

from typing import Any, Self, cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .modules import MAX_ROWS, SparseModule, check_mode, lay_out, resolve_backend, wants_gradient
from .ops import cpu
from .ops.linear import naive


class SparseLinear(SparseModule):
    """A linear layer that reads only the weights of inputs with `abs(x) >= threshold`. For inference only.

    Up to 8 tokens run the op, more of them a dense matmul on masked inputs, on one copy of the weights. The parameters
    keep their names, shapes and values; only the weight's memory layout changes: `[F, D]` with the inputs contiguous.

    Args:
        original: the layer whose parameters are taken.
        threshold: fp32 `[D]`.
        mode: "dense" keeps all inputs, "rule" and "predicted" are the same here.
        backend: "cpu", "triton" or "reference".
        centre: fp32 `[D]`: inputs with `abs(x - centre) >= threshold` are read, and the others stand at their centre,
            whose products are part of the bias.

    The threshold keeps its dtype under `.to(dtype)`. `counts` int64 `[2]` sums up tokens and inputs kept over all
    calls.

    Raises: ValueError for unknown names, or a threshold that does not fit.
    """

    threshold: Tensor
    centre: Tensor | None
    offset: Tensor | None  # fp32 `[F]`, the bias and the centre's products

    def __init__(
        self,
        original: nn.Linear,
        threshold: Tensor,
        mode: str = "rule",
        backend: str = "cpu",
        centre: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = original.in_features, original.out_features
        for name, tensor in (("threshold", threshold), ("centre", centre)):
            if tensor is not None and (tensor.shape != (self.in_features,) or tensor.dtype != torch.float32):
                raise ValueError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}, the layer needs torch.float32 "
                    f"[{self.in_features}]; pass the tensor that was exported for this layer"
                )
        self.weight, self.bias = original.weight, original.bias
        device = self.weight.device
        self.register_buffer("threshold", threshold.to(device), persistent=False)
        self.register_buffer("centre", None if centre is None else centre.to(device), persistent=False)
        self.register_buffer("offset", None, persistent=False)
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)
        self._lay_out()
        self.register_load_state_dict_post_hook(lay_out)
        self.set_mode(mode, backend)

    @torch.no_grad()
    def _lay_out(self) -> None:
        self.weight.data = self.weight.data.t().contiguous().t()
        if self.centre is not None:
            found = self.weight.float() @ self.centre.to(self.weight.dtype).float()
            self.offset = found if self.bias is None else found + self.bias.float()

    @property
    def constant_bytes(self) -> int:
        """Bytes that a step reads of what stands for the rule."""
        tensors = (self.threshold, self.centre, self.offset)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def set_mode(self, mode: str, backend: str | None = None) -> Self:
        check_mode(mode)
        self.mode = mode
        if backend is not None:
            self.backend = resolve_backend(backend, self.weight.device)
            self._run = naive.sparse_linear
            if self.backend == "triton":
                from .ops.linear import triton

                self._run = triton.sparse_linear
            elif self.backend == "cpu":
                cpu.load()
                self._run = cast(Any, torch.ops.moyu.sparse_linear.default)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., D]`; returns `[..., F]` of its dtype."""
        rows = x.numel() // self.in_features
        bias: Tensor | None = self.bias
        if self.centre is not None and self.offset is not None:
            x, bias = x - self.centre.to(x.dtype), self.offset.to(x.dtype)
        threshold = torch.zeros_like(self.threshold) if self.mode == "dense" else self.threshold
        self.counts[0] += rows
        if rows > MAX_ROWS or wants_gradient(x, self.weight):
            kept = (x.abs() >= threshold) & (x != 0)
            self.counts[1] += kept.sum()
            return functional.linear(torch.where(kept, x, 0.0), self.weight, bias)
        y, counts = self._run(x.reshape(rows, self.in_features), self.weight.t(), bias, threshold)
        self.counts[1] += counts.sum()
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, mode={self.mode}, backend={self.backend}"
