"""The sparse FFN block, whatever its layout."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as functional
from torch import Tensor

from .compensation import Compensation
from .dense import dense_linear
from .modules import MAX_ROWS, SparseModule, check_mode, resolve_backend, wants_gradient
from .ops import cpu
from .ops.ffn import naive


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of a name in `naive.ACTIVATIONS`."""
    return cast(Callable[[Tensor], Tensor], naive.ACTIVATIONS[name])


def side_by_side(matrices: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies of matrices `[F, D]` as views of one `[F, matrices, D]`: the rows of a neuron follow each other."""
    return torch.stack(tuple(matrices), dim=1).unbind(1)


def _lie_together(matrices: Sequence[Tensor]) -> bool:
    """Whether they are as `side_by_side` returns them."""
    width, size = matrices[0].shape[1], matrices[0].element_size()
    starts = [matrix.data_ptr() - matrices[0].data_ptr() for matrix in matrices]
    strides = {matrix.stride() for matrix in matrices}
    return starts == [i * width * size for i in range(len(matrices))] and strides == {(len(matrices) * width, 1)}


class SparseFFN(SparseModule):
    """An FFN block that reads only the weights of the neurons in use. For inference only.

    Up to 8 tokens run the op (a decode step), more of them dense matmuls with the rule's exact mask (prefill), on
    one copy of the weights. The parameters keep their names, shapes and values, so the state dict is the stock one;
    only the memory layout changes, to `[F, D]` with the neurons contiguous, and with a predictor on the backend "cpu"
    to `[F, matrices, D]` where gate, up and down are a parameter each, since the rows of a neuron are read together.

    Args:
        projections: name and projection of each of the layout's, those in front of the activation first.
        act: a name from `naive.ACTIVATIONS`.
        threshold: fp32 `[F]`, of the rule.
        predictor: `[]` or the tensors of a family in `naive.PREDICTORS`.
        mode: "predicted" (the rule on the neurons that the predictor selects), "rule" (the exact mask) or "dense" (no
            mask; a rule in `naive.SUBSTITUTES` stays, since the model is another one without it).
        backend: "cpu", "triton" (only the rules "threshold" and "topk") or "reference".
        rule: a name from `naive.RULES`; with "threshold" a neuron is kept where `abs(a) >= threshold`.
        keep: neurons that the rule "topk" keeps.

    The threshold and predictor keep their dtypes under `.to(dtype)`. `counts` int64 `[3]` sums up tokens, neurons
    selected and neurons kept over all calls; set it to zero with `counts.zero_()`.

    Raises: ValueError for unknown names, biases, shapes that do not fit, predicted mode without a predictor, or a
        predictor or backend that the rule does not go with.
    """

    gated: ClassVar[bool]
    apart = False  # the matrices stay each by itself, on any backend
    compensation: Compensation | None  # added in all modes but "dense"
    threshold: Tensor
    no_threshold: Tensor

    def __init__(
        self,
        projections: dict[str, Any],
        act: str,
        threshold: Tensor,
        predictor: list[Tensor],
        mode: str = "predicted",
        backend: str = "cpu",
        rule: str = "threshold",
        keep: int = 0,
    ) -> None:
        super().__init__()
        self.act, self.rule, self.keep = act, rule, keep
        self.compensation = None
        self.neurons, self.hidden = self._shape(projections)
        self._predictor = naive.PREDICTORS[naive.op_family(predictor)] if predictor else ()
        self._check(threshold, predictor)
        device = next(iter(projections.values())).weight.device
        self._store(projections)
        self.register_buffer("threshold", threshold.to(device), persistent=False)
        self.register_buffer("no_threshold", torch.zeros_like(self.threshold), persistent=False)
        for name, tensor in zip(self._predictor, predictor, strict=True):
            self.register_buffer(f"predictor_{name}", tensor.to(device), persistent=False)
        self.register_buffer("counts", torch.zeros(3, dtype=torch.int64, device=device), persistent=False)
        self.set_mode(mode, backend)

    def _shape(self, projections: dict[str, Any]) -> tuple[int, int]:
        """(F, D) of projections of this layout. Raises: ValueError for others."""
        raise NotImplementedError

    def _store(self, projections: dict[str, Any]) -> None:
        """Take the weights over."""
        raise NotImplementedError

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """gate (where there is one), up and down, each `[F, D]` with contiguous rows."""
        raise NotImplementedError

    @property
    def input_dtype(self) -> torch.dtype:
        """Of x."""
        return self.weights[0].dtype

    def _keep(self, rows: Sequence[Tensor]) -> None:
        """Have these tensors, of the same values, in the places of `weights`."""
        raise NotImplementedError

    @torch.no_grad()
    def _lay_out(self) -> None:
        """Put the weights in memory as the backend reads them fastest: after copies, which keep nothing of it."""
        rows = self.weights
        if not self._predictor or self.backend != "cpu" or self.apart:
            self._keep([matrix.contiguous() for matrix in rows])
        elif not _lie_together(rows):
            self._keep(side_by_side(rows))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._lay_out()
        return self

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        """What the op takes beside them: in turns values of each neuron `[..., F]` and of each column `[D]`."""
        raise NotImplementedError

    def _front(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Dense matmuls: g and u `[..., F]` of x `[..., D]`, as `naive.ruled_activation` takes them."""
        raise NotImplementedError

    def _down(self, a: Tensor) -> Tensor:
        """Dense matmul: y `[..., D]` of a `[..., F]`."""
        raise NotImplementedError

    def _check(self, threshold: Tensor, predictor: list[Tensor]) -> None:
        if self.act not in naive.ACTIVATIONS:
            raise ValueError(f"activation {self.act!r} has no op; use one of {', '.join(naive.ACTIVATIONS)}")
        naive.check_rule(self.rule, self.keep, predictor, self.neurons, self.gated)
        wanted: dict[str, tuple[Tensor, tuple[int, ...], torch.dtype]]
        wanted = {"threshold": (threshold, (self.neurons,), torch.float32)}
        if predictor:
            needed = naive.predictor_shapes(predictor, self.hidden, self.neurons)
            for name, tensor, want in zip(self._predictor, predictor, needed, strict=True):
                wanted[f"predictor {name}"] = (tensor, *want)
        for name, (tensor, shape, dtype) in wanted.items():
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}, the block needs {dtype} {list(shape)}; "
                    "pass the tensors that were exported for this block"
                )

    @property
    def predictor(self) -> list[Tensor]:
        """Its tensors in the order of `naive.PREDICTORS`; none where the block has no predictor."""
        return [getattr(self, f"predictor_{name}") for name in self._predictor]

    @property
    def predicts(self) -> bool:
        return bool(self._predictor)

    @property
    def names_neurons(self) -> bool:
        """Whether the selected neurons are known before any row is read."""
        return self.mode == "predicted"

    def set_mode(self, mode: str, backend: str | None = None) -> Self:
        check_mode(mode)
        if mode == "predicted" and not self._predictor:
            raise ValueError("mode 'predicted' needs a predictor and this block has none; use mode 'rule' or 'dense'")
        self.mode = mode
        if backend is not None:
            resolved = resolve_backend(backend, self.threshold.device)
            if resolved == "triton" and self.rule not in ("threshold", "topk"):
                raise ValueError(f"rule {self.rule!r} has no triton op yet; use the backend cpu or reference")
            self.backend = resolved
            self._run = self._op()
            self._lay_out()
        return self

    def _op(self) -> Callable[..., tuple[Tensor, Tensor]]:
        name = "gated_ffn" if self.gated else "plain_ffn"
        if self.backend == "cpu":
            cpu.load()
            return cast(Callable[..., tuple[Tensor, Tensor]], getattr(torch.ops.moyu, name).default)
        if self.backend == "triton":
            from .ops.ffn import triton

            return cast(Callable[..., tuple[Tensor, Tensor]], getattr(triton, name))
        return cast(Callable[..., tuple[Tensor, Tensor]], getattr(naive, name))

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., D]`; returns the same shape and dtype."""
        y = self._masked(x)
        if self.compensation is None or self.mode == "dense":
            return y
        return y + self.compensation(x, dense_linear if self.backend == "cpu" else functional.linear)

    def _masked(self, x: Tensor) -> Tensor:
        """Of x `[..., D]`, what the neurons in use make of it."""
        rows = x.numel() // self.hidden
        rule, threshold = self._rule()
        if rows > MAX_ROWS or wants_gradient(x, *self.weights):
            a, _, kept = naive.ruled_activation(*self._front(x), threshold, self.act, rule, self.keep)
            self._count(rows, rows * self.neurons, kept.sum())
            return self._down(a)
        predictor = self.predictor if self.mode == "predicted" else []
        y, counts = self.run_op(x.reshape(rows, self.hidden), predictor)
        selected, kept = counts.sum(0)
        self._count(rows, selected, kept)
        return y.view(x.shape)

    def run_op(self, x: Tensor, predictor: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The op on x `[N, D]`, N up to 8, under `predictor` or, where it is `[]`, the exact rule; counts nothing."""
        rule, threshold = self._rule()
        return self._run(x, *self.weights, threshold, self.act, predictor, rule, self.keep, *self.vectors)

    def _rule(self) -> tuple[str, Tensor]:
        """The op's rule and threshold in this mode."""
        if self.mode == "dense" and self.rule not in naive.SUBSTITUTES:
            return "threshold", self.no_threshold
        return self.rule, self.threshold

    def _count(self, rows: int, selected: int | Tensor, kept: Tensor) -> None:
        self.counts[0] += rows
        self.counts[1] += selected
        self.counts[2] += kept

    def extra_repr(self) -> str:
        predictor = ", ".join(self._predictor) or None
        return (
            f"neurons={self.neurons}, {predictor=!s}, act={self.act}, rule={self.rule}, mode={self.mode}, "
            f"backend={self.backend}"
        )
