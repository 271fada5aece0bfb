"""One row for each of several finished runs: the routes of a comparison, side by side."""

from pathlib import Path
from typing import Any

from rich.table import Table

from moyu_train.analysis import plots
from moyu_train.analysis.tables import console
from moyu_train.errors import MoyuError
from moyu_train.files import read_json


def _figures(run: Path, stage: str) -> dict[str, Any]:
    path = run / stage / "stage.json"
    if not path.is_file():
        raise MoyuError(f"run {str(run)!r} has no finished stage {stage!r}; run its recipe to the end first")
    figures = read_json(path).get("figures")
    if not isinstance(figures, dict):
        raise MoyuError(f"{path} has no figures; run its recipe to the end again")
    return figures


def row(run: Path) -> dict[str, Any]:
    """A run's row. `bytes_skipped` is null where the rule has no kernel; `oracle_bytes_skipped` is what would be
    skipped if the kept neurons were known beforehand at no cost: the share of neurons off, since a neuron's rows of
    gate, up and down are alike.

    Raises: MoyuError where the run was not evaluated.
    """
    tuned, evaluated = _figures(run, "finetune"), _figures(run, "evaluate")
    ppl = evaluated["ppl"]
    return {
        "route": run.name,
        "tokens": tuned["tokens"],
        "neurons_off": evaluated["neurons_off"],
        "bytes_skipped": evaluated["bytes_skipped"],
        "oracle_bytes_skipped": evaluated["neurons_off"],
        "ppl": ppl["sparse"],
        "ppl_oracle": ppl["oracle"],
        "ppl_over_control": ppl["sparse"] / ppl["control"] if "control" in ppl else None,
        "ppl_over_dense": ppl["sparse"] / ppl["dense"],
        "ratio_interval": evaluated["ratio_interval"],
        "test_tokens": evaluated["tokens"],
    }


def collect_runs(runs: list[Path], plot: Path | None = None) -> dict[str, Any]:
    rows = [row(run) for run in runs]
    table = Table(title="Perplexity of each route over that of the dense models")
    for name in ("route", "tokens trained", "neurons off", "perplexity", "over control", "over dense", "bytes skipped"):
        table.add_column(name, justify="left" if name == "route" else "right")
    for r in sorted(rows, key=lambda r: r["ppl"]):
        control, skipped = r["ppl_over_control"], r["bytes_skipped"]
        table.add_row(
            r["route"],
            f"{r['tokens']}",
            f"{r['neurons_off']:.1%}",
            f"{r['ppl']:.2f}",
            "" if control is None else f"{control:.3f}",
            f"{r['ppl_over_dense']:.3f}",
            "simulated" if skipped is None else f"{skipped:.1%}",
        )
    console.print(table)
    if plot:
        plots.routes(rows).savefig(plot, dpi=150)
    return {"rows": rows}
