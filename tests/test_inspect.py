"""`moyu inspect` on configs alone, and architectures that a recipe has to describe."""

import json
from pathlib import Path
from typing import Any

import moyu_kernels
import pytest
import torch
import yaml
from tiny import save_tiny, tiny_settings, tokenizer
from zoo import CASES, LAYERS, Case

from moyu_train.cli import main
from moyu_train.errors import MoyuError
from moyu_train.models.blocks import describe_blocks, find_blocks
from moyu_train.models.inspection import inspect
from moyu_train.models.loading import load_dense
from moyu_train.pipeline import Run
from moyu_train.recipe import Recipe, RecipeError, load_recipe

GPTJ = CASES["GPT-J"]


def looked_at(case: Case, folder: Path) -> dict[str, Any]:
    case.config.save_pretrained(folder)  # a config.json, no weights
    return inspect(Recipe(model=str(folder), blocks=case.described))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_config_is_enough(case: Case, tmp_path: Path) -> None:
    figures = looked_at(case, tmp_path)
    model = case.model()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert figures["parameters"] == total
    assert (figures["field"], figures["export"]) == (case.field.split(".")[-1], "")
    assert [(b["layout"], b["neurons"], b["experts"]) for b in figures["blocks"]] == [
        (block.layout, block.neurons, block.experts) for block in case.expected
    ]
    for block, expected in zip(figures["blocks"], case.expected, strict=True):
        within = model.get_submodule(block["path"]).state_dict()
        names = [name for name in (block["gate"], block["up"], block["down"]) if name]
        size = sum(within[name if name in within else f"{name}.weight"].numel() for name in names)
        assert block["share"] == pytest.approx(size / total)
        assert block["kernels"] == (expected.layout != "experts") == (not block["simulated_because"])
    assert figures["share"] == pytest.approx(sum(block["share"] for block in figures["blocks"]))
    covered = {f"{block['path']}.{name}" for block in figures["blocks"] for name in (block["up"], block["down"])}
    for other in figures["others"]:
        assert other["weight"].replace("*", "1").removesuffix(".weight") not in covered


def test_the_verb_prints_alike_blocks_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CASES["Qwen2-MoE"].config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--json", str(tmp_path / "figures.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("experts │") == printed.count("gated   │") == 1
    assert "layout 'experts' has no op" in " ".join(printed.split())
    assert len(json.loads((tmp_path / "figures.json").read_text())["blocks"]) == 2 * LAYERS


def test_what_is_not_found_is_refused_with_a_description_that_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    GPTJ.config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "no FFN block found in GPTJForCausalLM" in error
    assert "transformer.h.*.mlp.fc_in.weight [96, 32] x 2" in error
    suggested = yaml.safe_load(error[error.index("blocks:") :])
    assert suggested == {"blocks": list(GPTJ.described)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": str(tmp_path), **suggested}))
    assert main(["inspect", str(tmp_path / "recipe.yaml")]) == 0
    assert "plain" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"path": "transformer.x.*.mlp"}, r"no module of GPTJForCausalLM matches the path 'transformer\.x\.\*\.mlp'"),
        ({"path": "transformer.*.mlp"}, r"matches the path 'transformer\.\*\.mlp' \(\* stands for one name\)"),
        ({"up": "fc1"}, r"transformer\.h\.0\.mlp has no fc1; correct the names"),
        ({"act": "gelu"}, r"transformer\.h\.0\.mlp has no activation module gelu"),
        ({"up": "fc_out", "down": "fc_in"}, None),  # a wide FFN the wrong way round has the right shapes
        ({"gate": "dropout"}, r"do not make an FFN block: dropout not linear, fc_in \[32, 96\], fc_out \[96, 32\]"),
        ({"up": "dropout"}, r"dropout not linear, fc_out \[96, 32\]"),
        ({"path": "transformer.h.*.attn", "up": "q_proj", "down": "out_proj", "act": "attn_dropout"}, None),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(described: dict[str, str], message: str | None) -> None:
    model = GPTJ.model()
    describe_blocks(model.config, [GPTJ.described[0] | described])
    if message is None:  # nothing in the shapes says that it is wrong
        assert len(find_blocks(model)) == LAYERS
        return
    with pytest.raises(MoyuError, match=message):
        find_blocks(model)


def test_a_description_says_the_layout_by_its_shapes() -> None:
    for name in ("Llama", "Phi-3", "OPT", "Mixtral"):
        model = CASES[name].model()
        found = find_blocks(model)
        names = ("gate", "up", "down", "act")
        described = [{"path": b.path, **{name: getattr(b, name) for name in names}} for b in reversed(found)]
        describe_blocks(model.config, described)
        assert find_blocks(model) == found


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([{"path": "h.*.mlp", "upp": "a", "down": "b", "act": "c"}], r"'blocks\.0\.upp'; did you mean 'up'"),
        ([{"path": "h.*.mlp", "up": "a", "down": "a", "act": "c"}], r"have to be different attributes, got a, a, c"),
        ([{"path": "h.*.mlp", "down": "b", "act": "c"}], r"blocks\.0\.up: Field required"),
        ([{"path": "h.(.*)+$", "up": "a", "down": "b", "act": "c"}], r"blocks\.0\.path: String should match"),
        ({"path": "h.*.mlp", "up": "a", "down": "b", "act": "c"}, r"blocks: Input should be a valid tuple"),
    ],
)
def test_the_section_is_strict(tmp_path: Path, blocks: Any, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": "m", "blocks": blocks}))
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(tmp_path / "recipe.yaml"))


def test_a_description_goes_all_the_way(tmp_path: Path) -> None:
    """Through every stage to an export that carries it: the folders that stages write are loaded without the recipe."""
    model = GPTJ.model()
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    settings = tiny_settings(tmp_path, tmp_path / "model")
    settings |= {"blocks": list(GPTJ.described), "predictor": None, "control": None, "bench": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    for verb in ("calibrate", "finetune", "export", "verify"):
        assert main([verb, str(tmp_path / "recipe.yaml")]) == 0
    described = load_recipe(str(tmp_path / "recipe.yaml"))
    other = described.model_copy(update={"blocks": (described.blocks[0].model_copy(update={"up": "other"}),)})
    run = Run(described)
    assert run.finished("calibrate")
    assert run.key_of("calibrate", other) != run.key("calibrate"), "stages of another description would be reused"
    folder = tmp_path / "run" / "export" / "checkpoint"
    config = json.loads((folder / "config.json").read_text())
    assert [block["path"] for block in config["moyu"]["blocks"]] == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    sparse = moyu_kernels.from_pretrained(folder, mode="rule")
    assert sum(isinstance(module, moyu_kernels.SparseFFN) for module in sparse.modules()) == 2
    trained = find_blocks(load_dense(folder))
    assert [block.neurons for block in trained] == [96, 96]
    describe_blocks(model.config, GPTJ.described)
    assert not torch.equal(trained[0].weights()[0], find_blocks(model)[0].weights()[0]), "nothing was trained"


def test_layouts_without_a_kernel_are_refused_before_weights_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_settings(tmp_path, save_tiny(tmp_path / "model", "mixtral"))
    for changes in ({}, {"predictor": None}, {"bench": None}):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings | changes))
        assert main(["calibrate", str(tmp_path / "recipe.yaml")]) == 1
        error = capsys.readouterr().err
        assert "cannot skip anything in model.layers.0.mlp.experts, since layout 'experts' has no op" in error
