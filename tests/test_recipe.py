"""Settings: strict, with the nearest name, checked before anything heavy is imported."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny, tiny_settings

from moyu_train.pipeline import Run
from moyu_train.recipe import Recipe, RecipeError, load_recipe
from moyu_train.registry import resolve
from moyu_train.settings import Method
from moyu_train.sparsifiers import SPARSIFIERS

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name + "-" + path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe = load_recipe(str(path))
    resolve("sparsifier", recipe.sparsifier, SPARSIFIERS)


def test_inertia_is_a_signed_knob(tmp_path: Path) -> None:
    def penalty(text: str) -> Any:
        return load_recipe(write(tmp_path / "r.yaml", f"model: m\n{text}")).penalty

    against, towards = penalty("inertia: 0.05"), penalty("inertia: -0.1")
    assert (against.name, against.coefficient) == ("overlap_residual", ((0.3, 0.0), (0.5, 0.05)))
    assert (towards.name, towards.coefficient) == ("locality", ((0.3, 0.0), (0.5, 0.1)))
    assert penalty("inertia: 0") is None
    for text, message in (("inertia: much", "must be a number"), ("inertia: 1\npenalty: {name: l1}", "remove one")):
        with pytest.raises(RecipeError, match=message):
            penalty(text)


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nfinetun: {}", "did you mean 'finetune'"),
        ("model: m\nfinetune: {tokenz: 5000}", "did you mean 'tokens'"),
        ("model: m\nfinetune: {tokens: many}", "finetune.tokens"),
        ("model: m\nfinetune: {tokens: 100}", "less than one step"),
        ("model: m\nfinetune: {kl_weight: 0, lm_weight: 0}", "nothing to train"),
        ("model: m\nsparsifier: {name: thresold}", "did you mean 'threshold'"),
        ("model: m\ncontrol: {learning_rates: [1.0e-4, 0.0001]}", "holds one twice"),
        ("model: m\nanalyze: {sparsities: [1.5]}", "between 0 and 1"),
        ("model: m\nbench: {rounds: 2}", "greater than or equal to 5"),
        ("model: m\nevaluate: {kernel_tokens: 1}", "give 2 or more, or 0 for none"),
        ("model: m\nfinetune: {learning_rate: control}\ncontrol: null", "control is null; give one"),
        ("model: m\nfinetune: {learning_rate: contrl}", "finetune.learning_rate"),
        ("- a list", "must be a mapping"),
        ("model: [", "not valid YAML"),
        ("{}", "model: Field required"),
    ],
)
def test_wrong_settings_say_what_to_change(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path / "r.yaml", text))
    assert message in str(error.value)


def test_unknown_method_option_names_the_nearest(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "r.yaml", "model: m\nsparsifier: {name: threshold, gian: 1}"))
    with pytest.raises(RecipeError, match=r"sparsifier\.gian.*did you mean 'gain'"):
        resolve("sparsifier", recipe.sparsifier, SPARSIFIERS)


def test_overrides_win_and_keep_types(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "model: m\nfinetune: {tokens: 8192}")
    recipe = load_recipe(path, ["--finetune.tokens", "16384", "--bench.contexts=[64, 128]", "--predictor.rank", "8"])
    assert recipe.finetune.tokens == 16384
    assert recipe.bench.contexts == (64, 128)
    assert recipe.predictor.options == {"rank": 8}
    for wrong in (["--finetune.tokens"], ["stray"], ["--seed.x", "1"]):
        with pytest.raises(RecipeError):
            load_recipe(path, ["--seed", "1", *wrong])


def test_a_method_is_given_by_its_name_alone(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", "model: m\npredictor: lowrank\nsparsifier: {name: threshold, scale: 2}\n")
    found = load_recipe(recipe, ["--predictor.rank", "8", "--sparsifier", "topk"])
    assert (found.predictor, found.sparsifier) == (Method(name="lowrank", rank=8), Method(name="topk"))
    with pytest.raises(RecipeError, match=r"sparsifier.name 'topq' is unknown; did you mean 'topk'\?"):
        load_recipe(recipe, ["--sparsifier=topq"])
    with pytest.raises(RecipeError, match="'model' is a value, not a section"):
        load_recipe(recipe, ["--model.name", "x"])


def test_one_module_name_is_no_expression_of_whole_paths(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", "model: m\n")
    for given, kept in (("q_proj", ("q_proj",)), ("all-linear", "all-linear"), (r".*\.[qk]_proj", r".*\.[qk]_proj")):
        lora = load_recipe(recipe, ["--finetune.lora.targets", given]).finetune.lora
        assert lora
        assert lora.targets == kept


def test_digest_follows_the_named_sections_only(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "model: m")
    one, other = load_recipe(path), load_recipe(path, ["--fit.tokens", "2048"])
    assert one.digest("finetune") == other.digest("finetune")
    assert one.digest("fit") != other.digest("fit")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["run", "RECIPE", "--finetun.x", "1"]])
def test_help_and_recipe_errors_need_no_torch(tmp_path: Path, arguments: list[str]) -> None:
    recipe = write(tmp_path / "r.yaml", "model: m")
    arguments = [recipe if a == "RECIPE" else a for a in arguments]
    code = (
        "import sys\nfrom moyu_train.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        seconds.append(time.monotonic() - started)
        assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout or "did you mean 'finetune'" in result.stderr


def test_the_export_depends_on_its_dtype_with_and_without_predictors(tmp_path: Path) -> None:
    for predictor in ({"name": "lowbit"}, None):
        settings = tiny_settings(tmp_path, save_tiny(tmp_path / "model")) | {"predictor": predictor}
        recipes = [Recipe.model_validate(settings | {"export": {"dtype": dtype}}) for dtype in ("float32", "float16")]
        keys = {Run(recipe).key("export") for recipe in recipes}
        assert len(keys) == 2, predictor
