"""The model card of a sparse checkpoint, `README.md`, with which its folder can be uploaded to a hub as it is.

It is no part of the manifest, so that anyone may edit it. Every number in it was measured in the checkpoint's own run.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from moyu_train.analysis.tables import heads_said, interval_said
from moyu_train.checkpoints.export import CARD
from moyu_train.files import reading, write_text
from moyu_train.recipe import Recipe

ASK = "**Licence: not known.** It is the parent's; set `export.license` in the recipe, or fill in `license` above."
LOAD = """```python
import moyu_kernels

model = moyu_kernels.from_pretrained("this folder")
```

Stock transformers refuses this checkpoint, since it would compute another function."""
LABELS = {
    "dense": "dense parent",
    "control": "dense control",
    "sparse": "**sparse, as it decodes**",
    "all_heads": "sparse, with all attention heads",
    "rule": "rule mask, exact",
    "oracle": "oracle at the same density",
}


def write_card(folder: Path, recipe: Recipe, stock: bool, result: dict[str, Any] | None = None) -> None:
    """Write or replace the card of a checkpoint.

    Args: stock: whether stock transformers computes the same; result: the content of result.json, once it is measured.
    """
    parent = parent_metadata(recipe.model)
    base = recipe.export.base_model or parent.get("base_model")
    licence = recipe.export.license or parent.get("license")
    data = ModelCardData(
        base_model=base,
        license=licence,
        library_name="moyu",
        pipeline_tag="text-generation",
        tags=["moyu", "activation-sparsity", recipe.sparsifier.name],
    )
    of = f"[{base}](https://huggingface.co/{base})" if base else "its parent"
    parts = [
        f"# {Path(base or recipe.model.replace(':', '-')).name}, activation-sparse",
        f"{of} trained by `moyu` to need fewer of its FFN neurons: rule `{recipe.sparsifier.name}`, "
        f"{recipe.target_sparsity:.0%} of the neurons off per token as the target, weights in {recipe.export.dtype}.",
        *([] if licence else [ASK]),
        *([] if base else ["**Base model: not known.** Set `export.base_model` in the recipe, or `base_model` above."]),
        "Stock transformers loads it too." if stock else LOAD,
        "## Measurements",
        *(
            _measured(result)
            if result
            else ["None of this checkpoint yet: `moyu run` writes them here with its report."]
        ),
    ]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")
    write_text(folder / CARD, str(card))


def parent_metadata(model: str) -> dict[str, str]:
    """`license` and `base_model` of a recipe's model, as far as they are known without a network.

    The licence is what the card of its folder says, or the one in the hub's local cache; the base model is the hub id.
    """
    path: Any = Path(model) / CARD if Path(model).is_dir() else None
    found = {}
    if path is None and not model.endswith(".gguf") and ":" not in model and model.count("/") == 1:
        found["base_model"] = model
        path = try_to_load_from_cache(model, CARD)
    if isinstance(path, str | Path) and Path(path).is_file():
        with reading(path):
            licence = ModelCard.load(path).data.license
            if isinstance(licence, str):
                found["license"] = licence
    return found


def _measured(result: dict[str, Any]) -> list[str]:
    ppl = result["ppl"]
    best = min(ppl["dense"], ppl.get("control", ppl["dense"]))
    rows = [f"| {LABELS[name]} | {ppl[name]:.3f} | {ppl[name] / best:.3f} |" for name in LABELS if name in ppl]
    off = f"{result['neurons_off']:.1%} of the FFN neurons are off per token"
    skipped = result["bytes_skipped"]
    read = "simulated, nothing is skipped" if skipped is None else f"{skipped:.1%} of the FFN's bytes are not read"
    parts = [
        f"On {result['tokens']} tokens of {result['documents']} held-out documents, after {result['tokens_trained']} "
        f"tokens of training: {off} ({read}).",
        *([heads_said(result["heads"])] if result.get("heads") else []),
        "\n".join(["| | perplexity | ratio |", "|---|---|---|", *rows]),
        "Ratio: to the smaller of dense and control; of the sparse model "
        f"{interval_said(result['ratio_interval'])} (95 % interval).",
    ]
    if "bench" in result:
        stock, runner = result["over_best_transformers"], result["over_dense_runner"]
        rate = result["decode_tokens_per_second"]["sparse"]
        parts.append(
            f"Decoding at batch 1 on the machine of that run: {rate:.1f} tokens/s, {_times(stock)} the best dense "
            f"transformers setting and {_times(runner)} the same runner dense (median of rounds, least, most)."
        )
    else:
        parts.append("Speed was not measured.")
    return parts


def _times(ratio: dict[str, float]) -> str:
    return f"{ratio['speedup']:.2f} times ({ratio['least']:.2f} to {ratio['most']:.2f})"
