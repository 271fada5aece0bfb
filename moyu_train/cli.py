"""`moyu VERB …`: one verb per stage, and a few for looking around. Imports no torch until a verb needs it."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moyu_train import about, on_folder
from moyu_train.errors import MoyuError, is_full_disk, is_told
from moyu_train.recipe import Recipe, load_recipe, shipped_recipes

STAGE_VERBS = {
    "analyze": "measure over-activation, history uncertainty and inertia; perplexity against oracle sparsity",
    "calibrate": "find the rule's thresholds on the dense model",
    "fit-predictors": "fit the predictors of all layers in one pass",
    "calibrate-in-loop": "find the predictors' cuts with the untouched model in the loop",
    "fit-heads": "fit the routers of attention heads that fine-tuning runs under, on the dense model",
    "finetune": "fine-tune under the mask that the export decodes with, by self-distillation",
    "refit-heads": "fit the routers of attention heads, on the fine-tuned model",
    "refit-predictors": "fit the predictors again, on the fine-tuned model",
    "recalibrate": "find the cuts again with the fine-tuned model in the loop",
    "control": "train the dense control on the same tokens",
    "export": "write the sparse checkpoint",
    "verify": "prove a sparse checkpoint: reload, compare, see stock code refuse it",
    "evaluate": "perplexity of every variant on held-out documents, and tasks",
    "bench": "time decoding: dense eager, dense compiled, our runner, sparse; or the ops; or models of a given shape",
    "report": "result table, report.html and plots from the finished stages",
}
ALONE = ("run", "export", "verify", "evaluate", "bench", "report")  # these write, or time, as one process
ON_FOLDER = ("analyze", "verify", "evaluate", "bench")  # these also take a sparse checkpoint in place of a recipe


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moyu", description="Make LLM activations sparse at training time.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.add_argument("--json", metavar="FILE", help="write the figures there")
        return sub

    run = verb("run", "all stages of a recipe, resuming where it stopped")
    run.add_argument("recipe", help="a recipe's YAML file; settings are overridden as --section.key VALUE")
    run.add_argument("--dry-run", action="store_true", help="check the recipe and print it, run nothing")
    for name, text in STAGE_VERBS.items():
        sub = verb(name, text)
        what = "recipe, or a sparse checkpoint's folder" if name in ON_FOLDER else "recipe, or a model for the defaults"
        if name == "bench":
            _add_bench_options(sub)
            what += "; or `ops` (the kernels one by one) or `model` (whole models, from FOLDER or of a --shape)"
        if name == "fit-predictors":
            what += "; after --from a sparse checkpoint, or a run with one"
            sub.add_argument(
                "--from", action="store_true", dest="refit", help="fit those of a checkpoint again, on its own weights"
            )
        sub.add_argument("recipe", help=what)
        if name == "analyze":
            sub.add_argument("--against", metavar="MODEL", help="a second model, or sparse checkpoint, side by side")
        if name == "bench":
            sub.add_argument("folder", nargs="?", help="of `model`: sparse checkpoint")
    generate = verb("generate", "stream text from a sparse checkpoint")
    generate.add_argument("folder", help="sparse checkpoint")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=_at_least(1, int), default=128)
    generate.add_argument("--temperature", type=_at_least(0, float), default=0.0, help="0: the likeliest token always")
    generate.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    generate.add_argument(
        "--mode", choices=("predicted", "rule", "dense"), default="predicted", help="which mask to decode with"
    )
    generate.add_argument("--backend", choices=("auto", "cpu", "triton", "reference"), default="auto")
    plain = verb("export-dense", "a stock folder of a sparse checkpoint's weights, without its masks")
    plain.add_argument("folder", help="sparse checkpoint")
    plain.add_argument("out", help="folder to write")
    foreign = verb("export-predictors", "write a checkpoint's predictors as PowerInfer's converter reads them")
    foreign.add_argument("folder", help="sparse checkpoint")
    foreign.add_argument("out", help="folder for model_0.pt, model_1.pt and so on")
    gguf = verb("export-gguf", "write one file for llama.cpp (a dense model) or PowerInfer (relu and predictors)")
    gguf.add_argument("folder", help="of a dense model for llama.cpp, a sparse checkpoint for powerinfer")
    gguf.add_argument("out", help="file to write")
    gguf.add_argument("--for", dest="engine", choices=("llama.cpp", "powerinfer"), required=True)
    recipes = verb("recipes", "list the shipped recipes, or copy one")
    recipes.add_argument("--copy", nargs=2, metavar=("NAME", "FILE"))
    cost = verb("step-cost", "time and memory of a training step, over those of the plain Hugging Face Trainer")
    cost.add_argument("recipe", help="recipe, or a model for the defaults")
    families = verb("compare-predictors", "one table of predictor families and operating points, in the loop")
    families.add_argument("recipe", help="recipe, or a model for the defaults")
    families.add_argument("--plot", metavar="FILE", help="perplexity against bytes skipped, as an image")
    attention = verb("heads", "attention heads named by routers, in the loop, beside the oracle and fixed heads")
    attention.add_argument("recipe", help="recipe, or a model for the defaults")
    routes = verb("collect", "one table of several finished runs, and their rows with --json")
    routes.add_argument("runs", nargs="+", help="run folders")
    routes.add_argument("--plot", metavar="FILE", help="quality against neurons off, as an image")
    claims = verb("reproduce", "measure a claim of the papers, or a question they leave open, on a model of your own")
    claims.add_argument("name", help="which; `list` prints them all")
    claims.add_argument("recipe", nargs="?", help="recipe; default the shipped one for SmolLM2-135M")
    claims.add_argument("--seeds", type=_several(int), help="to train from, separated by commas")
    look = verb("inspect", "the FFN blocks that are found in a model, from its config alone")
    look.add_argument("recipe", help="model, or a recipe, whose `blocks` are then used")
    planned = verb(
        "plan", "parameters, memory, files, time and the limits of decoding of a recipe, before anything loads"
    )
    planned.add_argument("recipe", help="recipe, or a model for the defaults")
    planned.add_argument("--processes", type=int, default=2, help="devices of ddp, fsdp2, zero2 and zero3; default 2")
    planned.add_argument("--tokens-per-second", type=float, metavar="RATE", help="of training, on one device")
    planned.add_argument("--probe", action="store_true", help="measure that rate here, by a few real steps")
    planned.add_argument("--speedup", type=float, metavar="TIMES", help="what would have to be skipped for it?")
    verb("env", "versions and hardware, for bug reports")
    return parser


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    from moyu_train.evaluation.shapes import SHAPES

    group = parser.add_argument_group("of `bench ops` and `bench model`", "lists are separated by commas")
    group.add_argument("--shape", choices=SHAPES, help="random weights of these sizes; default of `ops`: smollm2-135m")
    group.add_argument("--dtypes", type=_several(str), help="of bfloat16, float16, float32, int8; default bfloat16")
    group.add_argument("--densities", type=_several(float), help="default 0.05,0.1,0.2,0.5")
    group.add_argument("--batches", type=_several(int), help="default 1,4; `model` decodes one sequence")
    group.add_argument("--threads", type=_several(int), help="of the dense settings, the most for sparse; default 1,2")
    group.add_argument("--rounds", type=int, help="interleaved, at least 5; default 7")
    group.add_argument("--quick", action="store_true", help="one density, one batch, 5 rounds: to see that it works")


def _several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def _at_least(least: int, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least}")
        return value

    parse.__name__ = kind.__name__  # as argparse calls what is no number
    return parse


def _refuse_bench_options(known: argparse.Namespace) -> None:
    if known.folder:
        raise MoyuError(f"a second name, {known.folder!r}, goes with `bench model` alone")
    for name in ("shape", "dtypes", "densities", "batches", "threads", "rounds", "quick"):
        if getattr(known, name):
            raise MoyuError(
                f"--{name} is an option of `bench ops` and `bench model`; a recipe's are set as --bench.rounds 7"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0, or 1 after an error that the user can act on (2 for usage)."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch, not imported yet, then asks for huge pages on a CPU
    # On import it warns of kernels of its own that it misses, and no verb uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    parser = build_parser()
    known, rest = parser.parse_known_args(arguments)
    with_settings = ("run", "plan", "step-cost", "inspect", "compare-predictors", "heads", "reproduce", *STAGE_VERBS)
    if rest and known.verb not in with_settings:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        _check_files(known)
        figures = _dispatch(known, rest)
    except Exception as error:
        if not is_told(error):
            raise
        more = "; free some room, and the same command goes on from here" if is_full_disk(error) else ""
        print(f"moyu {known.verb}: {error}{more}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"moyu {known.verb}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if known.json and figures is not None and os.environ.get("RANK", "0") == "0":
        from moyu_train.files import write_json

        write_json(Path(known.json), figures)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from moyu_train.training.launch import end_processes

        end_processes()
    return 0


def _check_files(known: argparse.Namespace) -> None:
    """Refuse files that could not be written at the end, before all the work."""
    for name in ("json", "plot"):
        file = getattr(known, name, None)
        if file and not (Path(file).parent.is_dir() and os.access(Path(file).parent, os.W_OK)):
            raise MoyuError(f"--{name} {file!r}: there is no folder {str(Path(file).parent)!r} to write into; make it")
        if file and Path(file).is_dir():
            raise MoyuError(f"--{name} {file!r} is a folder; name a file in it")


def _dispatch(known: argparse.Namespace, rest: list[str]) -> Any:
    if known.verb in ALONE and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MoyuError(
            f"`moyu {known.verb}` runs in one process; launch the training stages in many (such as `accelerate launch "
            "… finetune`), then start it without a launcher, which reuses them"
        )
    simple: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "generate": on_folder.generate,
        "export-dense": on_folder.export_dense,
        "export-gguf": on_folder.export_gguf,
        "export-predictors": on_folder.export_predictors,
        "recipes": about.recipes,
        "collect": _collect,
        "env": about.env,
    }
    if known.verb in simple:
        return simple[known.verb](known)
    if known.verb == "analyze" and (known.against or (Path(known.recipe) / "moyu").is_dir()):
        return _analyze_models(load_recipe(known.recipe, rest), known.against)
    if known.verb == "bench" and known.recipe in ("ops", "model"):
        from moyu_train.evaluation.bench_command import bench_ops_or_model

        return bench_ops_or_model(known, rest)
    if known.verb == "bench":
        _refuse_bench_options(known)
    if known.verb in ON_FOLDER and (Path(known.recipe) / "moyu").is_dir():
        return on_folder.on_folder(known.verb, Path(known.recipe), rest)
    if known.verb == "reproduce":
        return _reproduce(known, rest)
    if known.verb == "fit-predictors" and known.refit:
        return on_folder.refit(Path(known.recipe), rest)
    recipe = load_recipe(known.recipe, rest)
    if known.verb == "step-cost":
        return _step_cost(recipe)
    if known.verb == "inspect":
        return _inspect(recipe)
    if known.verb == "plan":
        from moyu_train.plan import plan_command

        return plan_command(recipe, known)
    if known.verb == "compare-predictors":
        return _compare_predictors(recipe, known.plot)
    if known.verb == "heads":
        return _heads(recipe)
    if known.verb == "run" and known.dry_run:
        print(json.dumps(recipe.model_dump(mode="json"), indent=1))
        return recipe.model_dump(mode="json")
    return _with_run(known.verb, recipe)


def _with_run(verb: str, recipe: Recipe) -> dict[str, Any]:
    from moyu_train.pipeline import Run, run_all, run_stage

    run = Run(recipe)
    if verb == "run":
        return run_all(run)
    figures = run_stage(run, verb)
    from moyu_train.analysis.tables import calibration_table, console, print_figures

    if verb in ("calibrate-in-loop", "recalibrate"):
        console.print(calibration_table(figures))
        console.print(f"plot and figures in {run.stage_folder(verb).resolve()}")
    elif verb == "analyze":
        from moyu_train.analysis.page import notions_table

        console.print(notions_table({"dense": figures}))
        console.print(f"plots and analysis.html in {run.stage_folder(verb).resolve()}")
    else:
        print_figures(verb, figures)
    return figures


def _analyze_models(recipe: Recipe, against: str | None) -> dict[str, Any]:
    from moyu_train.analysis.page import notions_table
    from moyu_train.analysis.stage import analyze_models
    from moyu_train.analysis.tables import console

    figures = analyze_models(recipe, [recipe.model, *([against] if against else [])])
    console.print(notions_table(figures))
    return figures


def _step_cost(recipe: Recipe) -> dict[str, Any]:
    from moyu_train.analysis.tables import print_figures
    from moyu_train.step_cost import step_cost

    figures = step_cost(recipe)
    print_figures("step-cost", figures)
    return figures


def _compare_predictors(recipe: Recipe, plot: str | None) -> dict[str, Any]:
    from moyu_train.analysis.plots import frontier
    from moyu_train.analysis.tables import console, predictor_table
    from moyu_train.evaluation.compare import compare_predictors
    from moyu_train.pipeline import Run, run_up_to

    run = Run(recipe)
    run_up_to(run, "finetune" if recipe.compare.model == "finetuned" else "calibrate")
    figures = compare_predictors(run)
    console.print(predictor_table(figures))
    if plot:
        frontier(figures).savefig(plot, dpi=150)
    return figures


def _heads(recipe: Recipe) -> dict[str, Any]:
    from moyu_train.analysis.tables import console, head_table
    from moyu_train.evaluation.heads import heads
    from moyu_train.pipeline import Run

    figures = heads(Run(recipe))
    console.print(head_table(figures))
    return figures


def _reproduce(known: argparse.Namespace, rest: list[str]) -> dict[str, Any] | None:
    from moyu_train.reproduce.command import find, list_all, reproduce

    if known.name == "list":
        return list_all()
    find(known.name)
    source = known.recipe or str(shipped_recipes()[f"smollm2-135m/reproduce/{known.name}"])
    return reproduce(known.name, load_recipe(source, rest), known.seeds)


def _inspect(recipe: Recipe) -> dict[str, Any]:
    from moyu_train.analysis.tables import print_inspection
    from moyu_train.models.inspection import inspect

    figures = inspect(recipe)
    print_inspection(figures)
    return figures


def _collect(known: argparse.Namespace) -> dict[str, Any]:
    from moyu_train.analysis.collect import collect_runs

    return collect_runs([Path(run) for run in known.runs], Path(known.plot) if known.plot else None)
