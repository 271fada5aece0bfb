"""A penalty's coefficient over a run: points of (share of the steps, value), and how to go from one to the next.

A single value is constant (TwELL). `linear` with two points is D2DMoE's ramp. `sine` is ProSparse's (arXiv 2402.13516):
between two stage ends, `eta = (sin(-pi/2 + pi * t) + 1) / 2` of the way, which starts and ends flat.
"""

import math

Points = tuple[tuple[float, float], ...]


def coefficient(points: Points, interpolation: str, progress: float) -> float:
    """The value at `progress` from 0 to 1; before the first point its value, after the last one its value."""
    before = points[0]
    for after in points:
        if progress < after[0]:
            t = (progress - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 1.0
            eta = (math.sin(-math.pi / 2 + math.pi * t) + 1) / 2 if interpolation == "sine" else t
            return before[1] + eta * (after[1] - before[1])
        before = after
    return before[1]
