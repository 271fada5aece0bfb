"""Penalties and their schedules, by their formulas."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from tiny import save_tiny, tiny_model, tiny_settings

from moyu_train.cli import main
from moyu_train.errors import MoyuError
from moyu_train.models.blocks import find_blocks
from moyu_train.models.masking import Masking
from moyu_train.penalties.hoyer import Hoyer
from moyu_train.penalties.l1 import L1
from moyu_train.penalties.scale import ScaleOptions, measure_scales
from moyu_train.penalties.schedule import coefficient
from moyu_train.recipe import RecipeError, load_recipe

WINDOWS = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
A = torch.tensor([[1.0, 1.0, 1.0, -1.0], [0.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])


def test_hoyer_is_the_share_of_neurons_that_carry_a_token() -> None:
    penalty = Hoyer(ScaleOptions(), [torch.ones(4)])
    torch.testing.assert_close(penalty(0, A), torch.tensor([1.0, 0.25, 0.0]))
    torch.testing.assert_close(penalty(0, 10 * A), penalty(0, A))


def test_l1_weighs_neurons_by_their_scale() -> None:
    scales = [torch.ones(4), torch.tensor([0.0, 0.5, 9.0, 9.0])]
    penalty = L1(ScaleOptions(), scales)
    assert penalty(0, A).tolist() == [1.0, 1.0, 0.0]
    assert penalty(1, A)[1] == 0.5
    assert penalty(0, A.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("statistic", ["contribution", "magnitude"])
def test_scaled_activations_have_a_mean_square_of_one(statistic: str) -> None:
    model = tiny_model()
    scales = measure_scales(model, ScaleOptions(statistic=statistic), WINDOWS)
    squares: dict[int, list[float]] = {0: [], 1: []}

    def observe(layer: int, a: torch.Tensor, expert: int | None) -> None:
        squares[layer].append((a * scales[layer]).square().mean().item())

    with Masking(find_blocks(model), observe), torch.no_grad():
        model(WINDOWS)
    assert squares[0] == pytest.approx([1.0], rel=1e-4)
    assert squares[1] == pytest.approx([1.0], rel=1e-4)
    flat = (scales[0] - scales[0][0]).abs().max() == 0
    assert flat == (statistic == "magnitude")


def test_experts_are_refused() -> None:
    with pytest.raises(MoyuError, match="this model has experts"):
        measure_scales(tiny_model("mixtral"), ScaleOptions(), WINDOWS)


def test_schedules() -> None:
    assert coefficient(((0.0, 3.0),), "sine", 0.7) == 3.0
    ramp = ((0.2, 0.0), (0.6, 4.0))
    assert [coefficient(ramp, "linear", p) for p in (0.0, 0.2, 0.3, 0.6, 1.0)] == pytest.approx([0, 0, 1, 4, 4])
    stages = ((0.0, 1.0), (0.5, 2.0), (1.0, 6.0))
    for p, low, high, t in ((0.125, 1, 2, 0.25), (0.75, 2, 6, 0.5)):
        eta = 0.5 * (math.sin(-math.pi / 2 + math.pi * t) + 1)
        assert coefficient(stages, "sine", p) == pytest.approx(low + eta * (high - low))


def test_a_number_without_a_point_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m\npenalty: {name: hoyer, coefficient: 1e-4}\n")
    penalty = load_recipe(str(tmp_path / "r.yaml")).penalty
    assert penalty is not None
    assert penalty.coefficient == ((0.0, 1e-4),)


def test_a_recipe_trains_with_its_penalty_and_schedule(tmp_path: Path) -> None:
    """Through the stages: predicted mask, two-point coefficient; the loss is the sum of its parts at every step."""
    settings = tiny_settings(tmp_path, save_tiny(tmp_path / "model"))
    settings["finetune"] |= {"kl_weight": 0.5, "lm_weight": 1.0, "activation_checkpointing": True}
    settings["penalty"] = {"name": "hoyer", "coefficient": [[0.0, 0.0], [0.5, 4.0]], "interpolation": "linear"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    for stage in ("calibrate", "fit-predictors", "calibrate-in-loop", "finetune"):
        assert main([stage, str(tmp_path / "r.yaml")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/finetune/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    for step, line in enumerate(lines):
        weight = min(step, 4)  # 8 steps: the ramp ends after 4
        expected = 0.5 * line["kl"] + line["lm"] + weight * line["penalty"]
        assert line["loss"] == pytest.approx(expected, rel=1e-3), step
    assert lines[-1]["penalty"] < 0.9 * lines[0]["penalty"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{name: hoier, coefficient: 1}", "penalty.name 'hoier' is unknown; did you mean 'hoyer'"),
        ("{name: hoyer}", "penalty.coefficient: Field required"),
        ("{name: hoyer, coefficient: -1}", "below 0"),
        ("{name: hoyer, coefficient: .nan}", "not finite"),
        ("{name: hoyer, coefficient: true}", "penalty.coefficient"),
        ("{name: hoyer, coefficient: [[0.5, 1], [0.2, 2]]}", "rising shares"),
        ("{name: hoyer, coefficient: 1, interpolation: cubic}", "penalty.interpolation"),
    ],
)
def test_bad_settings(tmp_path: Path, settings: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: m\npenalty: {settings}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert message in str(caught.value)
