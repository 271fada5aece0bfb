"""Rows of `moyu bench ops` and `moyu bench model`: their names, the table and the plot."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from moyu_train.errors import MoyuError

MOST_SHARE = 1.02  # of the bandwidth; what is above shows that a timing is wrong
console = Console()


def make_row(
    seconds: Sequence[float], moved: float, dense_moved: float, dense_seconds: Sequence[float], rates: Sequence[float]
) -> dict[str, Any]:
    """The measured fields of a row.

    Args: seconds, dense_seconds: per call, one a round, of this setting and of the best dense one; moved, dense_moved:
        bytes that a call of either has to read; rates: bandwidth in GB/s, one a round.
    """
    rate, bandwidth = moved / statistics.median(seconds) / 1e9, statistics.median(rates)
    ratios = sorted(dense / own for dense, own in zip(dense_seconds, seconds, strict=True))
    return {
        "time_us": {
            "median": statistics.median(seconds) * 1e6,
            "min": min(seconds) * 1e6,
            "max": max(seconds) * 1e6,
        },
        "bytes": round(moved),
        "gb_s": rate,
        "bandwidth_gb_s": bandwidth,
        "bandwidth_share": rate / bandwidth,
        "speedup_over_dense": statistics.median(ratios),
        "speedup_least": ratios[0],
        "speedup_most": ratios[-1],
        "limit_speedup": dense_moved / moved,
    }


def check_shares(rows: list[dict[str, Any]]) -> None:
    """Raises: MoyuError where a row reached more than 1.02 of the bandwidth."""
    wrong = [row for row in rows if row["bandwidth_share"] > MOST_SHARE]
    if wrong:
        worst = max(wrong, key=lambda row: row["bandwidth_share"])
        raise MoyuError(
            f"{len(wrong)} of {len(rows)} rows read faster than the machine can ({worst['op']} at {worst['gb_s']:.1f} "
            f"of {worst['bandwidth_gb_s']:.1f} GB/s): something else disturbed the timings, and none of them counts; "
            "run it again on a quieter machine"
        )


def tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """One table for each size, dtype and batch."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in ("D", "F", "dtype", "batch", "masks")), []).append(row)
    for (d, f, dtype, batch, masks), group in groups.items():
        first = group[0]
        several = f"batch {batch}, {masks} masks" if batch > 1 else f"batch {batch}"
        part = f" ({first['layers']} of {first['layers_of_model']} layers)" if "layers" in first else ""
        yield _table(group, f"{first['shape']}{part}, weights {first['weights']}: D {d}, F {f}, {dtype}, {several}")


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    found = Table(title=title)
    for name in ("op", "backend", "density", "us", "MB", "GB/s", "of bandwidth", "over dense", "limit"):
        found.add_column(name, justify="left" if name in ("op", "backend") else "right")
    for row in rows:
        time = row["time_us"]
        found.add_row(
            row["op"],
            f"{row['backend']} x{row['threads']}",
            f"{row['density']:.3f}",
            f"{time['median']:.0f} ({time['min']:.0f}-{time['max']:.0f})",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['gb_s']:.1f}",
            f"{row['bandwidth_share']:.0%}",
            f"{row['speedup_over_dense']:.2f}",
            f"{row['limit_speedup']:.2f}",
            style="bold" if row["density"] < 1 else None,
        )
    found.caption = (
        f"Medians of {rows[0]['rounds']} interleaved rounds; load average before: {rows[0]['load_average']:.1f}. "
        "Dense: the fastest dense row. Limit: its bytes over the row's."
    )
    return found


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Speed-up over the best dense setting against density, one colour an op and size, its limit as a dashed line."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("density: neurons kept, per token")
    axes.set_ylabel("speed-up over the best dense setting")
    axes.grid(alpha=0.3)
    series: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["density"] < 1:
            key = tuple(row.get(name, "") for name in ("op", "D", "F", "dtype", "batch", "masks"))
            series.setdefault(key, []).append(row)
    for (op, d, f, dtype, batch, masks), points in series.items():
        points.sort(key=lambda row: row["density"])
        label = f"{op} {d}x{f} {dtype}" + (f", batch {batch} {masks}" if batch > 1 else "")
        densities = [row["density"] for row in points]
        (line,) = axes.plot(densities, [row["speedup_over_dense"] for row in points], marker="o", label=label)
        limits = [row["limit_speedup"] for row in points]
        axes.plot(densities, limits, linestyle="--", marker="_", color=line.get_color())
    axes.axhline(1.0, linestyle=":", color="black")
    axes.plot([], [], linestyle="--", color="grey", label="limit of the byte model")
    axes.set_xscale("log")
    axes.legend(fontsize="x-small")
    return figure
