"""Decoding with only those attention heads that a router names, on a stock model with its own parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .attention import ATTENTION, OffHeads, register_attention
from .dense import dense_linear
from .inputs import SparseLinear
from .modules import MAX_ROWS, SparseModule, check_mode, resolve_backend, wants_gradient
from .ops import cpu
from .ops.linear import naive


@dataclass(frozen=True)
class HeadRouters:
    """Which attention heads run, as a sparse checkpoint says it (docs/checkpoint-format.md).

    unit: "head", or "group" of the heads that share keys and values; keep: units of each token; output: attribute of
    the output projection; routers: by the path of the attention module `weight` int8 `[U, D]`, `scale` and `bias` fp32
    `[U]`, of U units; a score is `scale * (weight @ x) + bias`, x the attention's input.
    """

    unit: str
    keep: int
    output: str
    routers: Mapping[str, Mapping[str, Tensor]]


class HeadQuery(SparseModule, OffHeads):
    """The query projection for the heads that its router chooses; zeros for the others. For inference only.

    Attention gives zeros where a query is zero (`attention.py`), and the output projection skips these. Up to 8 tokens
    run the op, which reads only the rows of chosen heads; more of them (prefill) run all heads, which is the exact
    function of a checkpoint. The parameters keep their names, shapes and values.

    Args:
        original: the layer whose parameters are taken, with S rows for each of U units (heads, or groups of them).
        router: `weight`, `scale` and `bias` as in `HeadRouters`.
        keep: units chosen for each token.
        groups: of heads that share keys and values.
        size: of a head.
        config: of the model, to refuse another attention than ours, which would let heads through that are off.
        mode: "predicted"; "rule" and "dense" run all heads.
        backend: "cpu" or "reference".

    Raises: ValueError for a router that does not fit, or whose scale or bias is not finite.

    `counts` int64 `[2]` sums up tokens, and groups with a head that runs, over all calls.
    """

    router: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(
        self,
        original: nn.Linear,
        router: Mapping[str, Tensor],
        keep: int,
        groups: int,
        size: int,
        config: Any,
        mode: str = "predicted",
        backend: str = "cpu",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.keep = original.in_features, original.out_features, keep
        self.weight, self.bias, self._config = original.weight, original.bias, config
        self.groups, self.size = groups, size
        self._check(router)
        device = self.weight.device
        for name, part in (("router", "weight"), ("scale", "scale"), ("offset", "bias")):
            self.register_buffer(name, router[part].to(device), persistent=False)
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)
        self.set_mode(mode, backend)

    def _check(self, router: Mapping[str, Tensor]) -> None:
        units = len(router["weight"])
        if not 1 <= self.keep <= units or self.out_features % units:
            raise ValueError(f"keep {self.keep} of {units} units does not fit {self.out_features} outputs")
        wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"weight": (torch.int8, (units, self.in_features))}
        wanted |= dict.fromkeys(("scale", "bias"), (torch.float32, (units,)))
        for part, (dtype, shape) in wanted.items():
            tensor = router[part]
            if (tensor.dtype, tensor.shape) != (dtype, shape):
                raise ValueError(
                    f"the router's {part} is {tensor.dtype} {list(tensor.shape)}, the layer needs {dtype} "
                    f"{list(shape)}; pass the tensors that were exported for it"
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"the router's {part} holds values that are not finite, so its scores have no order; train "
                    "the router again"
                )

    def set_mode(self, mode: str, backend: str | None = None) -> Self:
        check_mode(mode)
        self.mode = mode
        if backend is not None:
            self.backend = resolve_backend(backend, self.weight.device)
            if self.backend == "triton":
                raise ValueError("attention heads have no triton op yet; use the backend cpu or reference")
            cpu.load()
        return self

    @property
    def predicts(self) -> bool:
        return True

    @property
    def some_off(self) -> bool:
        return self.mode == "predicted"

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., D]`; returns `[..., U * S]` of its dtype."""
        rows = x.numel() // self.in_features
        self.counts[0] += rows
        if not self.some_off or rows > MAX_ROWS:
            self.counts[1] += rows * self.groups
            native = self.backend == "cpu"
            return (dense_linear if native else functional.linear)(x, self.weight, self.bias)
        if self._config._attn_implementation != ATTENTION:
            raise ValueError(
                f"attn_implementation is {self._config._attn_implementation!r}, which does not know of heads that are "
                f"off; use model.set_attn_implementation({ATTENTION!r})"
            )
        native = self.backend == "cpu" and not wants_gradient(x, self.weight)
        run = torch.ops.moyu.head_linear.default if native else naive.head_linear
        x_rows = x.reshape(rows, self.in_features)
        y = run(x_rows, self.weight, self.bias, self.router, self.scale, self.offset, self.keep)
        self.counts[1] += (y.view(rows, self.groups, -1) != 0).any(-1).sum()
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        units = len(self.router)
        return f"{self.in_features}, {self.out_features}, keep={self.keep} of {units}, mode={self.mode}"


def install_heads(model: Any, heads: HeadRouters, mode: str = "predicted", backend: str = "cpu") -> None:
    """Let attention modules of a stock model run only the heads that their routers name.

    Keys and values are computed for all tokens, so that what heads see of the past is exact.

    Args: mode, backend: as for `HeadQuery`.
    Raises: ValueError for a module that `simulated_because` names, or routers of other sizes than its heads.
    """
    groups = {}
    for path, router in heads.routers.items():
        if reason := simulated_because(model, path, heads.output):
            raise ValueError(f"{path}: {reason}, so no op can skip its heads")
        module: Any = model.get_submodule(path)
        groups[path] = module.k_proj.out_features // module.head_dim
        units = groups[path] if heads.unit == "group" else module.q_proj.out_features // module.head_dim
        if len(router["weight"]) != units:
            raise ValueError(
                f"{path} has {units} {heads.unit}s and its router scores {len(router['weight'])}; fit routers for "
                "this model"
            )
    register_attention()
    model.set_attn_implementation(ATTENTION)
    config = model.config.get_text_config()
    for path, router in heads.routers.items():
        module = model.get_submodule(path)
        last = getattr(module, heads.output)
        sizes = groups[path], module.head_dim
        module.q_proj = HeadQuery(module.q_proj, router, heads.keep, *sizes, config, mode, backend)
        zeros = torch.zeros(last.in_features)
        setattr(module, heads.output, SparseLinear(last, zeros, backend=backend))


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
