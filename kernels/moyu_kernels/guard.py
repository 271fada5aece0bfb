"""Density guard: a predictor's cuts are calibrated on some text, and other text may select more or fewer neurons."""

from typing import Any

from .sparse_ffn import SparseFFN

TOLERANCE = 0.2  # relative to the calibrated share
FEWEST = 8  # tokens, below which a share says nothing


def density(model: Any) -> tuple[float, float]:
    """Shares of the neurons selected and kept, over all tokens since the blocks' counts were last set to zero."""
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, SparseFFN)]
    counts = [block.counts.tolist() for block in blocks]
    places = sum(tokens * block.neurons for (tokens, _, _), block in zip(counts, blocks, strict=True))
    selected, kept = (sum(count[kind] for count in counts) / max(places, 1) for kind in (1, 2))
    return selected, kept


def density_drift(model: Any) -> str | None:
    """What to tell a user whose text drifts from what was calibrated; None where it does not, or nothing is known.

    Args: model: from `from_pretrained`, in predicted mode since its counts were last set to zero.
    """
    calibrated = ((getattr(model.config, "moyu", None) or {}).get("predictor") or {}).get("selected")
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, SparseFFN)]
    predicted = blocks and all(block.mode == "predicted" for block in blocks)
    if calibrated is None or not predicted or blocks[0].counts[0] < FEWEST:
        return None
    share, _ = density(model)
    if abs(share - calibrated) <= TOLERANCE * calibrated:
        return None
    effect = "slower than measured" if share > calibrated else "less accurate than measured"
    return (
        f"this text selects {share:.0%} of the neurons where the calibration text selected {calibrated:.0%}: decoding "
        f"may be {effect}; calibrate on text like this one"
    )
