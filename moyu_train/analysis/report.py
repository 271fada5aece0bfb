"""The report stage: result.json, the tables, the plots and one HTML file that opens offline."""

import base64
import hashlib
import html
import io
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from moyu_train.analysis import plots
from moyu_train.analysis.tables import calibration_table, console, quality_table, speed_table, task_table
from moyu_train.checkpoints.card import write_card
from moyu_train.checkpoints.stage import CHECKPOINT
from moyu_train.files import write_json, write_text

if TYPE_CHECKING:
    from moyu_train.pipeline import Run

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}}
img{{max-width:100%}} pre{{line-height:1.25;overflow-x:auto}} .lead{{font-size:1.15rem}}
</style><h1>{title}</h1><p class="lead">{lead}</p>{tables}{figures}
<h2>Where the numbers come from</h2><pre>{source}</pre></html>
"""


def collect(run: "Run") -> dict[str, Any]:
    """The content of result.json (docs/results.md), from the finished stages of this very recipe."""
    wanted = ("finetune", "control", "export", "verify", "evaluate", "bench")
    figures = {name: run.figures(name) for name in wanted if name in run.stages}
    tuned, evaluated = figures["finetune"], figures["evaluate"]
    return {
        "model": run.recipe.model,
        "tokens_trained": tuned["tokens"],
        "tokens": evaluated["tokens"],
        "documents": evaluated["documents"],
        "ppl": evaluated["ppl"],
        "ratio": evaluated["ratio"],
        "ratio_interval": evaluated["ratio_interval"],
        "bytes_skipped": evaluated["bytes_skipped"],
        "neurons_off": evaluated["neurons_off"],
        "rule_neurons_off": evaluated["rule_neurons_off"],
        "untouched_bytes_skipped": evaluated["untouched_bytes_skipped"],
        "predictor_bytes_share": figures["export"]["predictor_bytes_share"],
        "control_learning_rate": figures["control"]["best_learning_rate"] if run.recipe.control else None,
        "overlap_13gram": evaluated["overlap_13gram"],
        "heads": evaluated["heads"],
        "kernels": evaluated["kernels"],
        **{name: evaluated[name] for name in ("tasks", "task_neurons_off", "agreement") if name in evaluated},
        **(_timings(figures["bench"], run.recipe.bench.rounds) if run.recipe.bench else {}),
        "dtype": run.recipe.export.dtype,
        "weights": figures["export"]["weights"],
        "weights_over_dtype": figures["export"]["weights_over_dtype"],
        "mask_path": "simulated: a mask after a dense matmul" if evaluated["simulated"] else "through moyu_kernels",
        "hashes": {
            "recipe": hashlib.sha256(run.recipe.model_dump_json().encode()).hexdigest(),
            "inputs": run.inputs_digest,
            "ffn": tuned["ffn_sha256"],
            "manifest": evaluated["manifest_sha256"],
        },
    }


def _timings(timed: dict[str, Any], rounds: int) -> dict[str, Any]:
    names = ("decode_tokens_per_second", "bandwidth_gb_s", "bandwidth_share")
    over = (name for name in timed if name.startswith("over_"))
    return {name: timed[name] for name in (*names, *over)} | {"bench": timed["rows"], "rounds": rounds}


def _lead(result: dict[str, Any]) -> str:
    """The result in one sentence."""
    if result["bytes_skipped"] is None:
        skipped = f"{result['neurons_off']:.0%} of the FFN's neurons are off per token (simulated, nothing is skipped)"
    else:
        skipped = f"{result['bytes_skipped']:.0%} of the FFN's weight bytes are not read per decoded token"
    if heads := result.get("heads"):
        skipped += f", nor {heads['bytes_skipped']:.0%} of the attention's and its cache's at {heads['context']} tokens"
    lead = f"{skipped}, at {result['ratio']:.3f} times the perplexity of the best dense model"
    if "bench" not in result:
        return f"{lead}. Speed was not measured."
    return (
        f"{lead}, decoding {result['over_best_transformers']['speedup']:.2f} times as fast as the best dense "
        f"transformers setting and {result['over_dense_runner']['speedup']:.2f} times as fast as the same runner dense."
    )


def report(run: "Run", folder: Path) -> dict[str, Any]:
    """Write result.json, report.html and the PNGs into the run folder, and print the tables."""
    result = collect(run)
    images = {
        "uplift.png": plots.uplift(run.figures("analyze")),
        "layers.png": plots.layers(run.figures("evaluate")["layers"], run.recipe.target_sparsity),
        "quality.png": plots.quality(result),
        "training.png": plots.training(run.stage_folder("finetune") / "metrics.jsonl"),
    }
    if run.recipe.predictor:
        images["calibration.png"] = plots.calibration(run.figures("recalibrate"))
    for name, figure in images.items():
        figure.savefig(run.folder / name, dpi=120)
    tables = [quality_table(result)]
    if run.recipe.predictor:
        tables.append(calibration_table(run.figures("recalibrate")))
    if "tasks" in result or "agreement" in result:
        tables.append(task_table(result))
    if "bench" in result:
        tables.append(speed_table(result))
    source = json.dumps(
        {
            "recipe": run.recipe.model_dump(mode="json"),
            "hashes": result["hashes"],
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
        },
        indent=1,
    )
    pictures = "".join(
        f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{png_of(images[name])}">'
        for name, title in plots.TITLES.items()
        if name in images
    )
    page = PAGE.format(
        title=f"moyu: {html.escape(result['model'])}",
        lead=html.escape(_lead(result)),
        figures=pictures,
        tables="".join(f"<pre>{html.escape(text_of(table))}</pre>" for table in tables),
        source=html.escape(source),
    )
    write_text(run.folder / "report.html", page)
    write_json(run.folder / "result.json", result)
    checkpoint = run.stage_folder("export") / CHECKPOINT
    write_card(checkpoint, run.recipe, not run.figures("verify")["stock_refuses"], result)
    for table in tables:
        console.print(table)
    console.print(f"run folder: {run.folder.resolve()} (result.json, report.html, {', '.join(images)})")
    return result


def png_of(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def text_of(table: Any) -> str:
    paper = Console(file=io.StringIO(), width=130, record=True)
    paper.print(table)
    return paper.export_text()
