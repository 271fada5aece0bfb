"""Decoding with only those attention heads that a router names, on a stock model with its own parameters."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from .attention import ATTENTION, OffHeads, register_attention
from .inputs import SparseLinear
from .modules import MAX_ROWS, SparseModule, check_mode, resolve_backend
from .ops import cpu
from .ops.linear import naive


class HeadQuery(SparseModule, OffHeads):
    """The query projection for the heads that its router chooses; zeros for the others. For inference only.

    Attention gives zeros where a query is zero (`attention.py`), and the output projection skips these. Up to 8 tokens
    run the op, which reads only the rows of chosen heads, more of them a dense matmul under the same mask. The
    parameters keep their names, shapes and values.

    Args:
        original: the layer whose parameters are taken, with S rows for each of U units (heads, or groups of them).
        router: `weight` int8 `[U, D]`, `scale` and `bias` fp32 `[U]`; a score is `scale * (weight @ x) + bias`.
        keep: units chosen for each token.
        config: of the model, to refuse another attention than ours, which would let heads through that are off.
        mode: "dense" chooses all, "predicted" and "rule" are the same here.
        backend: "cpu" or "reference".

    Raises: ValueError for a router that does not fit, or whose scale or bias is not finite.

    `counts` int64 `[1]` sums up tokens over all calls.
    """

    router: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(
        self,
        original: nn.Linear,
        router: Mapping[str, Tensor],
        keep: int,
        config: Any,
        mode: str = "predicted",
        backend: str = "cpu",
    ) -> None:
        super().__init__()
        units = len(router["weight"])
        if not 1 <= keep <= units or original.out_features % units:
            raise ValueError(f"keep {keep} of {units} units does not fit {original.out_features} outputs")
        if bad := [part for part in ("scale", "bias") if not torch.isfinite(router[part]).all()]:
            raise ValueError(
                f"the router's {bad[0]} holds values that are not finite, so its scores have no order; train "
                "the router again"
            )
        self.in_features, self.out_features, self.keep = original.in_features, original.out_features, keep
        self.weight, self.bias, self._config = original.weight, original.bias, config
        device = self.weight.device
        for name, part in (("router", "weight"), ("scale", "scale"), ("offset", "bias")):
            self.register_buffer(name, router[part].to(device), persistent=False)
        self.register_buffer("counts", torch.zeros(1, dtype=torch.int64, device=device), persistent=False)
        self.set_mode(mode, backend)

    def set_mode(self, mode: str, backend: str | None = None) -> Self:
        check_mode(mode)
        self.mode = mode
        if backend is not None:
            self.backend = resolve_backend(backend, self.weight.device)
            if self.backend == "triton":
                raise ValueError("attention heads have no triton op yet; use the backend cpu or reference")
            cpu.load()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., D]`; returns `[..., U * S]` of its dtype."""
        if self._config._attn_implementation != ATTENTION:
            raise ValueError(
                f"attn_implementation is {self._config._attn_implementation!r}, which does not know of heads that are "
                f"off; use model.set_attn_implementation({ATTENTION!r})"
            )
        rows = x.numel() // self.in_features
        native = self.backend == "cpu" and rows <= MAX_ROWS
        run = torch.ops.moyu.head_linear.default if native else naive.head_linear
        keep = len(self.router) if self.mode == "dense" else self.keep
        self.counts[0] += rows
        y = run(x.reshape(rows, self.in_features), self.weight, self.bias, self.router, self.scale, self.offset, keep)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        units = len(self.router)
        return f"{self.in_features}, {self.out_features}, keep={self.keep} of {units}, mode={self.mode}"


def install_heads(
    model: Any, routers: Mapping[str, Mapping[str, Tensor]], keep: int, output: str = "o_proj", backend: str = "cpu"
) -> None:
    """Let attention modules of a stock model run only the heads that their routers name, in prefill too.

    Keys and values are computed for all tokens, so that what heads see of the past is exact.

    Args: routers: as `HeadQuery` takes them, by the path of the attention module; keep: units of each token; output:
        the attribute of the output projection.
    Raises: ValueError for a module that `simulated_because` names.
    """
    for path in routers:
        if reason := simulated_because(model, path, output):
            raise ValueError(f"{path}: {reason}, so no op can skip its heads")
    register_attention()
    model.set_attn_implementation(ATTENTION)
    for path, router in routers.items():
        module: Any = model.get_submodule(path)
        query, last = module.q_proj, getattr(module, output)
        module.q_proj = HeadQuery(query, router, keep, model.config.get_text_config(), backend=backend)
        zeros = torch.zeros(last.in_features)
        setattr(module, output, SparseLinear(last, zeros, backend=backend))


def simulated_because(model: Any, path: str, output: str = "o_proj") -> str:
    """Why no op skips the heads of the attention at `path`; empty where one does."""
    module = model.get_submodule(path)
    children = dict(module.named_children())
    projections = [children.pop(name, None) for name in ("q_proj", "k_proj", "v_proj", output)]
    if any(type(projection) is not nn.Linear for projection in projections):
        return f"it has no plain linear layers q_proj, k_proj, v_proj and {output}"
    if own := ", ".join(name for name, _ in module.named_parameters(recurse=False)):
        return f"it has parameters of its own, {own}, which may mix heads"
    if model.config._attn_implementation not in ("sdpa", ATTENTION):
        return f"its attention is {model.config._attn_implementation!r} and not 'sdpa'"
    # Anything between the query projection and attention has to leave zeros zeros, and heads apart.
    for name, child in children.items():
        shapes = {part: tuple(weight.shape) for part, weight in child.named_parameters()}
        if shapes not in ({}, {"weight": (module.head_dim,)}):
            return f"its {name} may mix heads or shift zeros"
    return ""
