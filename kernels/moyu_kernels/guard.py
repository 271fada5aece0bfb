"""Density guard: a predictor's cuts are calibrated on some text, and other text may select more or fewer neurons."""

from typing import Any

from .modules import SparseGatedFFN

TOLERANCE = 0.2  # relative to the calibrated share
FEWEST = 8  # tokens, below which a share says nothing


def density_drift(model: Any) -> str | None:
    """What to tell a user whose text drifts from what was calibrated; None where it does not, or nothing is known.

    Looks at what the blocks have counted in predicted mode since their counts were last set to zero.

    Args: model: from `from_pretrained`.
    """
    calibrated = ((getattr(model.config, "moyu", None) or {}).get("predictor") or {}).get("selected")
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, SparseGatedFFN)]
    counts = [block.counts.tolist() for block in blocks if block.mode == "predicted"]
    if calibrated is None or not counts or counts[0][0] < FEWEST:
        return None
    places = sum(tokens * block.neurons for (tokens, _, _), block in zip(counts, blocks, strict=True))
    share = sum(selected for _, selected, _ in counts) / places
    if abs(share - calibrated) <= TOLERANCE * calibrated:
        return None
    effect = "slower than measured" if share > calibrated else "less accurate than measured"
    return (
        f"this text selects {share:.0%} of the neurons where the calibration text selected {calibrated:.0%}: decoding "
        f"may be {effect}; calibrate on text like this one"
    )
