"""Plots of a run, matplotlib without a display."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from moyu_train.files import reading

TITLES = {
    "uplift.png": "Over-activation: perplexity under oracle masks",
    "layers.png": "Neurons selected and kept, layer by layer",
    "calibration.png": "Calibration: perplexity against bytes skipped, on validation text",
    "quality.png": "Quality against bytes skipped",
    "training.png": "Training",
}


def axes_of(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def uplift(analysis: dict[str, Any]) -> Figure:
    """Perplexity of the dense model, relative, when only its largest contributions are kept."""
    figure, axes = axes_of("neurons off (oracle, per token)", "perplexity, relative to dense")
    curve = analysis["uplift"]
    dense = curve[0]["perplexity"]
    axes.plot([p["sparsity"] for p in curve], [p["perplexity"] / dense for p in curve], marker="o")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    return figure


def layers(rows: list[dict[str, Any]], target: float) -> Figure:
    figure, axes = axes_of("layer", "share of the layer's neurons")
    axes.plot([row["selected"] for row in rows], label="selected by the predictor (gate and up read)")
    axes.plot([row["kept"] for row in rows], label="kept (down read)")
    axes.plot([row["mass_kept"] for row in rows], label="contribution kept, of what the rule keeps", color="grey")
    axes.axhline(1 - target, linestyle=":", color="black", label="density target of the rule")
    axes.set_ylim(0, 1.05)
    axes.legend()
    return figure


def quality(result: dict[str, Any]) -> Figure:
    figure, axes = axes_of("FFN bytes skipped", "perplexity, relative to the best dense model")
    ppl = result["ppl"]
    best = min(ppl["dense"], ppl.get("control", ppl["dense"]))
    points = (
        ("dense", 0.0),
        ("control", 0.0),
        ("untouched", result["untouched_bytes_skipped"]),
        ("sparse", result["bytes_skipped"]),
    )
    for name, skipped in points:
        if name in ppl and skipped is not None:
            axes.scatter(skipped, ppl[name] / best, s=60)
            axes.annotate(name, (skipped, ppl[name] / best), xytext=(6, 6), textcoords="offset points")
    axes.set_xlim(-0.02, 1)
    axes.margins(y=0.12)
    return figure


def routes(rows: list[dict[str, Any]]) -> Figure:
    """Rows of `collect`: quality of each route, as far as it got."""
    figure, axes = axes_of("neurons off", "perplexity, relative to the dense parent")
    for row in rows:
        label = f"{row['route']}, {row['tokens']:,} tokens: {row['ppl_over_dense']:.3f}"
        axes.scatter(row["neurons_off"], row["ppl_over_dense"], s=60, label=label)
    axes.axhline(1.0, linestyle=":", color="black")
    axes.legend()
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.margins(x=0.1, y=0.1)
    return figure


def frontier(figures: dict[str, Any]) -> Figure:
    """Figures of `compare-predictors`: what each family pays in perplexity for the bytes that it skips."""
    figure, axes = axes_of(
        "FFN bytes skipped (dashed: would be, no op yet)", "perplexity, relative to the dense parent"
    )
    lines: dict[str, list[tuple[float, float]]] = {}
    dashed = set()
    for row, point in zip(figures["rows"], figures["points"], strict=True):
        lines.setdefault(row["family"], []).append((point["would_skip"], row["ppl_over_dense"]))
        if point["simulated"]:
            dashed.add(row["family"])
    for family, points in lines.items():
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, marker="o", linestyle="--" if family in dashed else "-", label=family)
    axes.axhline(figures["ppl"]["rule"] / figures["ppl"]["dense"], linestyle=":", color="black", label="rule mask")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.legend(fontsize="small")
    return figure


def calibration(figures: dict[str, Any]) -> Figure:
    """Figures of a calibration in the loop: what its runs paid in perplexity, and the one that was taken."""
    figure, axes = axes_of(
        f"FFN bytes skipped at batch {figures['batch']}, in the loop", "perplexity, relative to the rule's own mask"
    )
    even = sorted((p["bytes_skipped"], p["ppl_over_rule"]) for p in figures["frontier"] if p["even"])
    axes.plot(*zip(*even, strict=True), marker="o", label="every layer the same share")
    others = [(p["bytes_skipped"], p["ppl_over_rule"]) for p in figures["frontier"] if not p["even"]]
    if others:
        axes.scatter(*zip(*others, strict=True), marker="x", color="grey", label="shared out otherwise")
    axes.scatter(figures["bytes_skipped"], figures["ppl_over_rule"], s=120, marker="*", color="tab:red", label="taken")
    axes.axhline(1.0, linestyle=":", color="black", label="rule mask")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.legend(fontsize="small")
    return figure


def training(metrics: Path) -> Figure:
    with reading(metrics):
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, axes = axes_of("step", "loss (nats per token)")
    if not lines:  # rebuilt from a delta
        return figure
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], label="loss")
    sparsity = axes.twinx()
    sparsity.plot([line["step"] for line in lines], [line["sparsity"] for line in lines], color="tab:green")
    sparsity.axhline(lines[-1]["sparsity_target"], linestyle=":", color="tab:green")
    sparsity.set_ylabel("sparsity under the rule, target dotted", color="tab:green")
    return figure
