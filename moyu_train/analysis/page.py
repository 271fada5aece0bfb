"""The MOYU notions of one or two models as a table, plots, and one HTML file that opens offline."""

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from moyu_train.analysis.plots import axes_of
from moyu_train.analysis.report import PAGE, png_of, text_of
from moyu_train.files import write_text

Figures = dict[str, Any]
# label, place in the figures, place in a layer's row. Where a place is missing, it was not measured.
ROWS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("over-activation: active and not needed", ("over_activation", "over_activation"), ("over_activation",)),
    ("over-activation: neurons needed", ("over_activation", "needed"), ("needed",)),
    ("over-activation: CETT-PPL-1% sparsity", ("over_activation", "cett_ppl", "sparsity"), ()),
    ("history: HAU, left open by the token", ("history", "hau"), ("hau",)),
    ("history: excess HAU, by its sense too", ("history", "excess_hau"), ("excess_hau",)),
    ("history: flip margin, 10 % from threshold", ("history", "flip_margin"), ("flip_margin",)),
    ("history: contribution foreseen from the token", ("gap", "token"), ("gap", "token")),
    ("history: from the FFN's input", ("gap", "input"), ("gap", "input")),
    ("history: from that and the past", ("gap", "past"), ("gap", "past")),
    ("inertia: active neurons", ("inertia", "density"), ("density",)),
    ("inertia: neighbours' overlap beyond chance", ("inertia", "overlap", "1"), ("overlap", "1")),
    ("inertia: SIAI, beyond meaning", ("inertia", "siai"), ("siai",)),
    ("inertia: carry of an unrelated prefix", ("inertia", "carry"), ("carry",)),
    ("inertia: 2x2 index", ("inertia", "probe", "index"), ("index",)),
    ("inertia: missed by the last token's mask", ("inertia", "stale_error", "1"), ("stale_error", "1")),
    ("inertia: missed by the prompt's mask", ("inertia", "stale_error", "prompt"), ("stale_error", "prompt")),
    ("inertia: used by 8 tokens together", ("inertia", "union", "8"), ("union", "8")),
    ("inertia: and if they were independent", ("inertia", "union_independent", "8"), ("union_independent", "8")),
)


def _at(figures: Figures, place: tuple[str, ...]) -> Any:
    """The figure at a place, or None."""
    found: Any = figures
    for name in place:
        found = (found or {}).get(name)
    return found if place else None


def notions_table(models: dict[str, Figures]) -> Table:
    """One row a notion: over all layers, and in the layer where it is largest; two columns a model."""
    first = next(iter(models.values()))
    table = Table(title=f"The MOYU notions on {first['tokens']} tokens")
    table.add_column("notion")
    for name in models:
        table.add_column(name, justify="right")
        table.add_column("largest in layer", justify="right")
    table.add_row("perplexity", *(cell for figures in models.values() for cell in (f"{figures['perplexity']:.2f}", "")))
    for label, place, row_place in ROWS:
        cells: list[str] = []
        for figures in models.values():
            value = _at(figures, place)
            each = {i: v for i, row in enumerate(figures["layers"]) if (v := _at(row, row_place)) is not None}
            worst = max(each, key=lambda i: each[i]) if each else None
            shown = "" if value is None else f"{value:.3f}"
            if place[-1] == "siai" and (ends := _at(figures, ("inertia", "interval"))):
                shown += f" ({ends[0]:.3f} to {ends[1]:.3f})"
            cells += [shown, "" if worst is None else f"{each[worst]:.3f} in {worst}"]
        if any(cells):
            table.add_row(label, *cells)
    table.caption = "Definitions and how to read them: docs/analysis.md"
    return table


def _with_legend(figure: Figure, axes: Any) -> Figure:
    axes.legend()
    return figure


def _by_layer(
    models: dict[str, Figures], label: str, *places: tuple[tuple[str, ...], str], band: str = ""
) -> Figure | None:
    """Lines over layers, each place with its label; band: a row's interval, shaded."""
    figure, axes = axes_of("layer", label)
    drawn = False
    for name, figures in models.items():
        for place, what in places:
            values = [_at(row, place) for row in figures["layers"]]
            if any(value is None for value in values):
                continue
            (line,) = axes.plot(values, label=f"{name}: {what}")
            ends = [row.get(band) for row in figures["layers"]] if band else [None]
            if all(ends):
                low, high = zip(*ends, strict=True)
                axes.fill_between(range(len(low)), low, high, alpha=0.2, color=line.get_color())
            drawn = True
    return _with_legend(figure, axes) if drawn else None


def _by_lag(models: dict[str, Figures]) -> Figure | None:
    figure, axes = axes_of("tokens between", "overlap beyond chance, and SIAI at that distance")
    drawn = False
    for name, figures in models.items():
        for what, marker in (("overlap", "o"), ("bands", "s")):
            points = _at(figures, ("inertia", what))
            if points:
                label = f"{name}: {'overlap' if what == 'overlap' else 'SIAI from there on'}"
                axes.plot([int(lag) for lag in points], list(points.values()), marker=marker, label=label)
                drawn = True
    axes.set_xscale("log", base=2)
    return _with_legend(figure, axes) if drawn else None


def _unions(models: dict[str, Figures]) -> Figure | None:
    figure, axes = axes_of("consecutive tokens", "share of neurons that at least one uses")
    drawn = False
    for name, figures in models.items():
        for what, style in (("union", "-"), ("union_independent", ":")):
            points = _at(figures, ("inertia", what))
            if points:
                label = f"{name}{': if independent' if style == ':' else ''}"
                axes.plot([int(length) for length in points], list(points.values()), style, marker="o", label=label)
                drawn = True
    axes.set_xscale("log", base=2)
    return _with_legend(figure, axes) if drawn else None


HISTORY = ((("hau",), "HAU"), (("excess_hau",), "excess HAU"), (("flip_margin",), "flip margin"))
STALE = ((("stale_error", "1"), "last token's mask"), (("stale_error", "prompt"), "prompt's mask"))
PLOTS: dict[str, tuple[str, Callable[[dict[str, Figures]], Figure | None]]] = {
    "needed.png": (
        "Over-activation: what the output needs, layer by layer",
        lambda m: _by_layer(m, "share of neurons", (("needed",), "needed"), (("density",), "active")),
    ),
    "history.png": ("History: what the current token leaves open", lambda m: _by_layer(m, "share", *HISTORY)),
    "siai.png": (
        "Inertia beyond meaning, layer by layer",
        lambda m: _by_layer(m, "SIAI", (("siai",), "SIAI"), (("carry",), "carry"), band="siai_interval"),
    ),
    "lags.png": ("Inertia by distance", _by_lag),
    "stale.png": ("What a stale mask misses", lambda m: _by_layer(m, "share of contribution", *STALE)),
    "unions.png": ("What several tokens use together", _unions),
}


def lead(name: str, figures: Figures) -> str:
    """What the figures mean for speed, in a few sentences."""
    over = figures["over_activation"]
    text = (
        f"{name}: a token needs {over['needed']:.0%} of the FFN's neurons for an output within {over['tau']:.0%}, "
        f"{over['over_activation']:.0%} of its active ones are in excess: {1 - over['needed']:.0%} of the FFN's bytes "
        "need not be read, if something knows beforehand which."
    )
    inertia = figures.get("inertia")
    if inertia and "8" in inertia["union"]:
        text += (
            f" Eight tokens decoded together use {inertia['union']['8']:.0%} (if they were independent, "
            f"{inertia['union_independent']['8']:.0%}). Keeping the last token's mask would miss "
            f"{inertia['stale_error']['1']:.0%} of the contribution."
        )
    return text


def write_page(folder: Path, models: dict[str, Figures]) -> list[str]:
    """Write `analysis.html` and the PNGs of what was measured; returns their names."""
    drawn = {name: (title, figure) for name, (title, draw) in PLOTS.items() if (figure := draw(models))}
    for name, (_, figure) in drawn.items():
        figure.savefig(folder / name, dpi=120)
    pictures = "".join(
        f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{png_of(figure)}">'
        for title, figure in drawn.values()
    )
    page = PAGE.format(
        title=f"MOYU: {html.escape(' and '.join(models))}",
        lead="<br>".join(html.escape(lead(name, figures)) for name, figures in models.items()),
        tables=f"<pre>{html.escape(text_of(notions_table(models)))}</pre>",
        figures=pictures,
        source=html.escape(json.dumps(models, indent=1)),
    )
    write_text(folder / "analysis.html", page)
    return ["analysis.html", *drawn]
