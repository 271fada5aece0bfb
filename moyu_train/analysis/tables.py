"""Result tables in the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from moyu_train.models.structure import pattern_of

console = Console()


def interval_said(interval: Sequence[float] | None) -> str:
    """Of a ratio of perplexities."""
    return "unknown with one document" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def quality_table(result: dict[str, Any]) -> Table:
    """Perplexity of every variant beside what it skips."""
    ppl = result["ppl"]
    best = min(ppl["dense"], ppl.get("control", ppl["dense"]))
    table = Table(title=f"Quality on {result['tokens']} held-out tokens of {result['documents']} documents")
    for name, justify in (
        ("variant", "left"),
        ("perplexity", "right"),
        ("ratio", "right"),
        ("FFN bytes skipped", "right"),
        ("neurons off", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    int8 = result.get("weights") == "int8"
    if int8:
        table.add_column("FFN weights", justify="right")
    skipped, off = result["bytes_skipped"], result["neurons_off"]
    rows: list[tuple[str, str, float | None, float | None]] = [
        ("dense parent", "dense", 0.0, 0.0),
        ("dense parent, int8 FFN weights", "dense_int8", 0.0, 0.0),
        (f"dense control (learning rate {result.get('control_learning_rate')})", "control", 0.0, 0.0),
        ("sparse, as it decodes", "sparse", skipped, off),
        ("sparse, with all attention heads", "all_heads", None, None),
        ("rule mask, exact", "rule", None, result["rule_neurons_off"]),
        ("oracle at the sparse model's density", "oracle", None, off),
        ("untouched model, same pipeline", "untouched", result["untouched_bytes_skipped"], None),
    ]
    for label, name, share, neurons in rows:
        if name not in ppl:
            continue
        style = "bold" if name == "sparse" else None
        cells = [f"{ppl[name]:.3f}", f"{ppl[name] / best:.3f}", _share(share), _share(neurons)]
        if int8:
            plain = name in ("dense", "control")
            cells.append(result["dtype"] if plain else f"int8, {result['weights_over_dtype']:.2f} of the bytes")
        table.add_row(label, *cells, style=style)
    table.caption = (
        f"ratio: to the smaller of dense and control{'' if 'control' in ppl else ' (none here)'}; sparse 95 % interval "
        f"{interval_said(result['ratio_interval'])} over documents. "
        f"Predictors are {result['predictor_bytes_share']:.1%} of the FFN's bytes, counted as read."
        + (f" {heads_said(heads)}" if (heads := result.get("heads")) else "")
        + training_said(ppl)
    )
    return table


def training_said(ppl: dict[str, float]) -> str:
    """What to change where training did harm; empty where it did not."""
    if ppl["sparse"] > ppl["untouched"]:
        return " Training made the sparse model worse than the untouched one: lower finetune.learning_rate."
    if ppl.get("control", 0.0) > ppl["dense"]:
        return " Training made the control worse than the dense model: lower control.learning_rates."
    return ""


def heads_said(heads: dict[str, Any]) -> str:
    """What `heads` of a result says, in words."""
    return (
        f"Attention: {heads['keep']} of {heads['units']} {heads['unit']}s run per token in {heads['layers']} of "
        f"{heads['layers'] + heads['dense_layers']} layers; {heads['weights_skipped']:.1%} of the weights' bytes, "
        f"{heads['cache_skipped']:.1%} of keys and values at {heads['context']} tokens, "
        f"{heads['bytes_skipped']:.1%} of both are not read."
    )


def predictor_table(figures: dict[str, Any]) -> Table:
    """Rows of `compare-predictors`."""
    table = Table(title=f"Predictors in the loop on {figures['tokens']} tokens of {figures['documents']} documents")
    columns = ("family", "bytes", "recall", "precision", "mass kept", "bytes skipped", "over oracle", "over dense")
    for name in columns:
        table.add_column(name, justify="left" if name == "family" else "right")
    for row, point in zip(figures["rows"], figures["points"], strict=True):
        skipped = f"(simulated {point['would_skip']:.1%})" if point["simulated"] else f"{row['bytes_skipped']:.1%}"
        table.add_row(
            row["family"],
            *(_share(row[name]) for name in ("bytes_share", "recall", "precision", "mass_kept")),
            skipped,
            *(f"{row[name]:.3f}" for name in ("ppl_over_oracle", "ppl_over_dense")),
        )
    ppl = figures["ppl"]
    table.caption = (
        f"Perplexity: dense {ppl['dense']:.2f}, rule mask {ppl['rule']:.2f}. Bytes are shares of the FFN's in "
        f"{figures['dtype']}, the predictor's own counted as read. Simulated: no op yet, so nothing is skipped."
    )
    return table


def head_table(figures: dict[str, Any]) -> Table:
    """Rows of `heads`."""
    unit, units = figures["unit"], figures["units"]
    table = Table(title=f"Attention by {unit} on {figures['tokens']} tokens of {figures['documents']} documents")
    shares = ("weights_skipped", "cache_skipped", "bytes_skipped")
    for name in (f"{unit}s", "recall", "mass kept", "weights", "cache", "both", "router", "oracle", "fixed"):
        table.add_column(name, justify="left" if name == f"{unit}s" else "right")
    simulated = figures["simulated_because"]
    for row, point in zip(figures["rows"], figures["points"], strict=True):
        skipped = (f"{point['would_skip'][name]:.1%}" for name in shares)
        table.add_row(
            f"{row['keep']} of {units}",
            *(_share(row[name]) for name in ("recall", "mass_kept")),
            *(f"(simulated {share})" if simulated else share for share in skipped),
            *(f"{row[name]:.3f}" for name in ("router", "oracle", "fixed")),
        )
    kernels = figures["kernels"]
    table.caption = (
        f"Left the shares of the bytes of all attention layers that a decode step in {figures['dtype']} does not read, "
        f"of weights (routers counted as read) and of keys and values, at batch {figures['batch']} and "
        f"{figures['context']} tokens of context; right perplexity over dense ({figures['ppl']['dense']:.2f}). "
        f"Layers {figures['dense_layers']} keep all heads; keys and values are computed for all tokens. "
        + (f"Simulated, since {simulated}. " if simulated else "")
        + (
            f"Token by token through the ops: {kernels['perplexity']:.3f}, under the masks "
            f"{kernels['masked_perplexity']:.3f}."
            if kernels
            else ""
        )
    )
    return table


def calibration_table(figures: dict[str, Any]) -> Table:
    """Figures of a calibration in the loop: the runs of the model by the bytes that they skipped."""
    (goal, value), *_ = figures["goal"].items()
    table = Table(title=f"Calibration on validation text for {goal} {value:g}, at batch {figures['batch']}")
    for name in ("layers", "bytes skipped", "perplexity over rule", "recall"):
        table.add_column(name, justify="left" if name == "layers" else "right")
    for point in sorted(figures["frontier"], key=lambda point: point["bytes_skipped"]):
        taken = all(point[name] == figures[name] for name in ("bytes_skipped", "ppl_over_rule", "recall"))
        table.add_row(
            "the same share" if point["even"] else "shared out",
            _share(point["bytes_skipped"]),
            f"{point['ppl_over_rule']:.4f}",
            _share(point["recall"]),
            style="bold" if taken else None,
        )
    table.caption = (
        "Each row is a run of the masked model; bold: taken. Bytes include the predictors' own. Recall: of the neurons "
        "that the rule keeps, by count, mean over layers."
    )
    return table


VARIANTS = ("dense", "control", "sparse")  # those that tasks and agreement are measured on


def task_table(result: dict[str, Any]) -> Table:
    """Tasks and greedy agreement beside perplexity, each with its standard error, one column a variant."""
    variants = [name for name in VARIANTS if name in result["ppl"]]
    table = Table(title="Tasks, the sparse model under its masks at every position")
    for name in ("task", "metric", *variants, "sparse minus dense"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    table.add_row("held-out text", "perplexity", *(f"{result['ppl'][name]:.3f}" for name in variants))
    for task, found in result.get("tasks", {}).items():
        for metric in found["sparse"]:
            if metric.endswith("_stderr") or "_minus_dense" in metric:
                continue
            cells = [_with_error(found[name], metric) for name in variants]
            table.add_row(
                f"{task} ({found['examples']})", metric, *cells, _with_error(found["sparse"], f"{metric}_minus_dense")
            )
    if agreement := result.get("agreement"):
        label = f"greedy ({agreement['prompts']})"
        for metric, text in (
            ("equal_tokens", "tokens equal to dense"),
            ("identical", "wholly equal to dense"),
            ("equal_numbers", f"same final number ({agreement['numbers']})"),
        ):
            table.add_row(label, text, *(_with_error(agreement.get(name, {}), metric) for name in variants))
    table.caption = (
        "In brackets the number of examples; ± standard error, of `sparse minus dense` over the paired examples."
    )
    return table


def _with_error(found: dict[str, Any], metric: str) -> str:
    if found.get(metric) is None:
        return ""
    error = found.get(f"{metric}_stderr")
    return _number(found[metric]) + ("" if error is None else f" ± {_number(error)}")


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.2g}"


def speed_table(result: dict[str, Any]) -> Table:
    table = Table(title=f"Decoding, batch 1, {result['dtype']}, median of {result['rounds']} interleaved rounds")
    columns = (
        "setting",
        "threads",
        "context",
        "tokens/s",
        "min to max",
        "MB read",
        "GB/s",
        "of bandwidth",
        "first token",
    )
    for name in columns:
        table.add_column(name, justify="left" if name == "setting" else "right")
    for row in result["bench"]:
        table.add_row(
            row["setting"].replace("_", " "),
            str(row["threads"]),
            str(row["context"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['tokens_per_second_min']:.1f} to {row['tokens_per_second_max']:.1f}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['gb_s']:.1f}",
            f"{row['bandwidth_share']:.0%}",
            f"{row['first_token_seconds']:.2f} s",
            style="bold" if row["setting"] == "sparse" else None,
        )
    stock, runner = result["over_best_transformers"], result["over_dense_runner"]
    int8 = f"; over it on int8 weights: {_speedup(result['over_dense_int8'])}" if "over_dense_int8" in result else ""
    table.caption = (
        f"sparse over best dense transformers ({stock['setting'].replace('_', ' ')}, {stock['threads']} threads): "
        f"{_speedup(stock)}; over the same runner dense: "
        f"{_speedup(runner)}{int8}. "
        f"Bandwidth of this machine in this run: {result['bandwidth_gb_s']:.1f} GB/s."
    )
    return table


def _speedup(found: dict[str, float]) -> str:
    return f"{found['speedup']:.2f}x ({found['least']:.2f} to {found['most']:.2f})"


def print_inspection(figures: dict[str, Any]) -> None:
    """FFN blocks of a model, those of all layers that are alike in one row, and what is in none of them."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    names = ("layout", "hidden", "neurons", "experts", "activation", "simulated_because")
    for row in figures["blocks"]:
        alike.setdefault((pattern_of(row["path"]), *(row[name] for name in names)), []).append(row)
    table = Table(title=f"{figures['model']}, {figures['parameters'] / 1e6:.1f} million parameters")
    table.add_column("FFN blocks", overflow="fold")
    for name in ("number", "layout", "D", "F", "E", "share", "kernels"):
        table.add_column(name, justify="left" if name in ("layout", "kernels") else "right")
    for (path, layout, hidden, neurons, experts, _, reason), rows in alike.items():
        cells = [path, str(len(rows)), layout, str(hidden), str(neurons), str(experts)]
        table.add_row(*cells, _share(sum(row["share"] for row in rows)), "simulated" if reason else "yes")
    console.print(table)
    for reason in dict.fromkeys(row["simulated_because"] for row in figures["blocks"] if row["kernels"] is False):
        console.print(f"simulated (masked after a dense matmul, nothing is skipped): {reason}")
    others = ", ".join(f"{row['weight']} {_share(row['share'])}" for row in figures["others"])
    console.print(f"{_share(figures['share'])} of the parameters are in FFN blocks; largest outside: {others}")
    activations = ", ".join(dict.fromkeys(row["activation"] for row in figures["blocks"]))
    place = f"config field {figures['field']}" if figures["field"] else figures["export"]
    console.print(f"activation {activations} ({place})")


def print_figures(verb: str, figures: dict[str, Any]) -> None:
    """The scalar figures of one verb; lists are in its --json file."""
    if "tasks" in figures or "agreement" in figures:
        console.print(task_table(figures))
        figures = {name: value for name, value in figures.items() if name not in ("tasks", "agreement")}
    table = Table(title=verb)
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in _flat(figures):
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)


def _flat(figures: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in figures.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list | tuple):
            rows.append((prefix + name, value))
    return rows


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
