"""Names and sizes of the tensors that make a model sparse: thresholds and predictors (docs/checkpoint-format.md)."""

from collections.abc import Iterable, Mapping, Sequence

from moyu_kernels.checkpoint import current
from moyu_kernels.ops.ffn.naive import PREDICTORS, SIMULATED, predictor_family
from torch import Tensor


def thresholds_to_tensors(thresholds: list[Tensor]) -> dict[str, Tensor]:
    return {f"blocks.{i}.threshold": t.float().contiguous() for i, t in enumerate(thresholds)}


def thresholds_from_tensors(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensors[f"blocks.{i}.threshold"] for i in range(_blocks(tensors))]


def _blocks(tensors: dict[str, Tensor]) -> int:
    return sum(name.startswith("blocks.") and name.endswith(".threshold") for name in tensors)


def predictors_to_tensors(predictors: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"blocks.{i}.predictor.{name}": t.contiguous() for i, p in enumerate(predictors) for name, t in p.items()}


def predictors_from_tensors(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """One dict a layer, in the order of tensors in which the ops take them; empty where there are no predictors."""
    tensors = current(tensors)
    stored = {name.removeprefix("blocks.0.predictor.") for name in tensors if name.startswith("blocks.0.predictor.")}
    names = next((names for names in (PREDICTORS | SIMULATED).values() if set(names) == stored), ())
    count = _blocks(tensors) if names else 0
    return [{name: tensors[f"blocks.{i}.predictor.{name}"] for name in names} for i in range(count)]


def routers_to_tensors(routers: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Of attention heads, one a module."""
    return {f"heads.{i}.{name}": t.contiguous() for i, router in enumerate(routers) for name, t in router.items()}


def family_of(predictors: Sequence[dict[str, Tensor]] | None) -> str | None:
    """What a checkpoint calls predictors in this storage form; None where there are none."""
    return predictor_family(list(predictors[0].values())) if predictors else None


def stored_bytes(predictor: Mapping[str, Tensor]) -> int:
    """Bytes that a decode step reads of one predictor: every tensor, once, at its stored dtype."""
    return sum(tensor.numel() * tensor.element_size() for tensor in predictor.values())
