"""The seam: where an FFN block hands its activation to whatever stands at its down projection at call time.

A hook on the original projection would miss a LoRA wrapper that is put on later (its A matrix would see unmasked
activations), so the hook is bound to the module that stands there on each call of the block.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


class Seam:
    """Transforms the input or the output of the module at attribute `name` of `block`, on every call of the block.

    Args:
        block: the FFN block; the instance is hooked, its class is not touched.
        name: attribute of the module in question (the down projection, to mask activations).
        transform: gets and returns the module's input, for a down projection `[..., F]`.
        output: gets the module's inputs and its output, and returns the output.
    """

    def __init__(
        self,
        block: nn.Module,
        name: str,
        transform: Callable[[Tensor], Tensor] | None = None,
        output: Callable[[tuple[Any, ...], Tensor], Tensor] | None = None,
    ) -> None:
        self._block, self._name, self._transform, self._output = block, name, transform, output
        self._bound: nn.Module | None = None
        self._inner: list[Any] = []
        self._outer = block.register_forward_pre_hook(self._rebind)
        self._rebind()

    def _rebind(self, *_: Any) -> None:
        current = getattr(self._block, self._name)
        if current is self._bound:
            return
        self._release()
        transform, output = self._transform, self._output
        if transform:
            self._inner.append(current.register_forward_pre_hook(lambda module, args: (transform(args[0]), *args[1:])))
        if output:
            self._inner.append(current.register_forward_hook(lambda module, args, value: output(args, value)))
        self._bound = current

    def _release(self) -> None:
        for handle in self._inner:
            handle.remove()
        self._inner.clear()

    def remove(self) -> None:
        """Undo: the block is as it was."""
        self._outer.remove()
        self._release()
        self._bound = None


class ExpertsSeam:
    """Transforms the activation of every expert in a module whose experts are 3-D parameters.

    There is no projection module to hook, so the instance's `forward` is replaced by the plain loop over experts.

    Args:
        experts: a module with `gate_up_proj` `[E, 2F, D]` and `down_proj` `[E, D, F]`, whose `_apply_gate` makes an
            expert's activation of gate and up, as transformers' experts have it. Anything else is refused.
        transform: gets the activation `[N, F]` and the expert's index, returns the activation.

    Raises: ValueError for what `unsupported` names.
    """

    def __init__(self, experts: Any, transform: Callable[[Tensor, int], Tensor]) -> None:
        reason = self.unsupported(experts)
        if reason:
            raise ValueError(reason)
        self._experts, self._transform = experts, transform
        experts.forward = MethodType(self._forward, experts)

    @staticmethod
    def unsupported(experts: Any) -> str:
        """Why the loop over experts would not compute what this module does; empty where it would."""
        name = type(experts).__name__
        if getattr(experts, "has_bias", False) or getattr(experts, "is_transposed", False):
            return f"{name}: experts with biases or transposed weights are not supported"
        if getattr(experts, "has_post_expert_norm", False):
            return f"{name}: experts with a norm of their own behind them are not supported"
        if not getattr(experts, "has_gate", True) or not hasattr(experts, "_apply_gate"):
            return f"{name}: experts need a gate, and `_apply_gate` to say how it acts"
        return ""

    def _forward(self, experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden `[N, D]`, top_k_index and top_k_weights `[N, k]`; returns `[N, D]`."""
        result = torch.zeros_like(hidden)
        for expert in top_k_index.unique().tolist():
            if expert >= len(experts.down_proj):
                continue  # index E marks a slot that expert parallelism gives to another rank
            token, place = torch.where(top_k_index == expert)
            a = experts._apply_gate(functional.linear(hidden[token], experts.gate_up_proj[expert]))
            a = self._transform(a, expert)
            y = functional.linear(a, experts.down_proj[expert]) * top_k_weights[token, place, None]
            result.index_add_(0, token, y.to(result.dtype))
        return result

    def remove(self) -> None:
        """Undo: the instance uses its class's `forward` again."""
        del self._experts.forward
