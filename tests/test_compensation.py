"""Compensations: the closed form by hand, in training, through checkpoints and deltas, and where they are refused."""

import json
from pathlib import Path
from typing import Any

import moyu_kernels
import pytest
import torch
from moyu_kernels import vllm_plugin
from moyu_kernels.checkpoint import MANIFEST, CheckpointError
from moyu_kernels.compensation import ATTRIBUTE, FILE, Compensation
from moyu_kernels.modules import set_mode
from moyu_kernels.rules import Rule
from moyu_kernels.sparse_ffn import SparseFFN
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import interrupted_at, save_tiny, tiny_model, tiny_settings, tokenizer
from torch import Tensor
from transformers import AutoConfig

from moyu_train.checkpoints.dense import export_dense
from moyu_train.checkpoints.export import export, read_rules
from moyu_train.checkpoints.powerinfer import export_powerinfer
from moyu_train.errors import MoyuError
from moyu_train.evaluation.bench_bytes import bytes_per_token, ffn_read
from moyu_train.evaluation.inloop import SparseMasks, bytes_skipped
from moyu_train.files import sha256
from moyu_train.models.blocks import ffn_bytes, find_blocks
from moyu_train.models.compensation import attach, attach_empty, compensation_bytes, compensation_rank, taken_off
from moyu_train.models.loading import load_dense
from moyu_train.models.masking import Masking
from moyu_train.pipeline import Run, run_stage
from moyu_train.recipe import Recipe
from moyu_train.settings import Compensate
from moyu_train.training.compensate import fit_compensations

LORA = {"rank": 2, "alpha": 4}


def settings_in(folder: Path, family: str = "llama", **finetune: Any) -> dict[str, Any]:
    settings = tiny_settings(folder, save_tiny(folder / "model", family))
    settings["finetune"] |= {"compensation": {"rank": 4, "tokens": 512}, **finetune}
    return settings | {"predictor": None, "control": None, "bench": None}


def gap(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def halved(layer: int, a: Tensor, expert: int | None) -> Tensor:
    return a.abs() >= a.abs().quantile(0.5, dim=-1, keepdim=True)


def seen_in(model: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the first block of a Llama under `halved`: its input, what its masks drop, and its output, `[N, D]`."""
    mlp, parts = model.model.layers[0].mlp, []
    handle = mlp.register_forward_hook(lambda module, args, output: parts.extend((args[0], output)))
    with torch.no_grad(), Masking(find_blocks(model), halved):
        model(input_ids=ids)
    handle.remove()
    x, y = (part.flatten(0, -2) for part in parts)
    a = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return x, torch.where(halved(0, a, None), 0.0, a) @ mlp.down_proj.weight.T, y


def test_the_closed_form_is_that_of_least_squares() -> None:
    model, ids = tiny_model(), torch.randint(0, 250, (8, 64), generator=torch.Generator().manual_seed(0))
    x, dropped, y = (part.detach() for part in seen_in(model, ids))
    with Masking(find_blocks(model), halved):
        fit_compensations(model, ids, Compensate(rank=32, tokens=10_000))
        whole = getattr(model.model.layers[0].mlp, ATTRIBUTE)
        fit_compensations(model, ids, Compensate(rank=4, tokens=10_000))
    few = getattr(model.model.layers[0].mlp, ATTRIBUTE)
    one = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    best = dropped.double() - one @ torch.linalg.lstsq(one, dropped.double()).solution
    with torch.no_grad():
        left, left_few, constant = (r.square().sum() for r in (dropped - whole(x), dropped - few(x), dropped))
    assert best.square().sum() <= left <= 1.01 * best.square().sum()
    assert left < left_few < constant
    # No map of this rank does better: the best one in the norm of what it gives is cut from the SVD of `one @ W`.
    fitted = (x - x.mean(0)).double() @ torch.linalg.lstsq(
        (x - x.mean(0)).double(), (dropped - dropped.mean(0)).double()
    ).solution
    rest = torch.linalg.svdvals(fitted)[4:].square().sum()
    assert left_few <= 1.01 * (best.square().sum() + rest)
    assert few.a.shape == (4, 32)
    torch.testing.assert_close(seen_in(model, ids)[2], (y + few(x)).detach(), rtol=1e-4, atol=1e-4)  # masks add it


def test_it_is_added_only_where_something_is_masked() -> None:
    model, ids = tiny_model(), torch.arange(40)[None]
    blocks = find_blocks(model)
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        attach(blocks, [Compensation(torch.ones(1, 32), torch.ones(32, 1), torch.ones(32)) for _ in blocks])
        torch.testing.assert_close(model(input_ids=ids).logits, dense, rtol=0, atol=0)
        with Masking(blocks, lambda layer, a, expert: None):
            torch.testing.assert_close(model(input_ids=ids).logits, dense, rtol=0, atol=0)
        with Masking(blocks, lambda layer, a, expert: torch.ones_like(a, dtype=torch.bool)):
            assert not torch.allclose(model(input_ids=ids).logits, dense, rtol=1e-2, atol=1e-2)
    with taken_off(model) as taken:
        assert len(taken) == len(blocks)
        assert not any(ATTRIBUTE in name for name in model.state_dict())
    assert compensation_rank(model) == 1
    assert compensation_bytes(blocks[0], 2) == 2 * (32 + 32 + 32)


@pytest.mark.parametrize(("family", "lora"), [("llama", LORA), ("phi3", None), ("gpt2", LORA), ("opt", None)])
def test_from_training_to_the_kernels(tmp_path: Path, family: str, lora: dict[str, int] | None) -> None:
    settings = settings_in(tmp_path, family, lora=lora)
    settings |= {"target_sparsity": 0.8, "export": {"dtype": "float32"}}
    run = Run(Recipe.model_validate(settings))
    for stage in ("calibrate", "finetune", "export", "verify"):
        run_stage(run, stage)
    found = run_stage(run, "evaluate")
    assert found["kernels"] is not None  # they agree with the masked path, or the stage would have ended
    trained = load_dense(run.stage_folder("finetune") / "model")
    folder, ids = run.stage_folder("export") / "checkpoint", run.validation.tokens[0][None, :48]
    assert compensation_rank(trained) == 4
    with safe_open(run.stage_folder("finetune") / "model" / "model.safetensors", "pt") as tensors:
        assert not any(ATTRIBUTE in name for name in tensors.keys())  # noqa: SIM118 - it is no dict
    config = json.loads((folder / "config.json").read_text())["moyu"]
    assert config["compensation"] == {"rank": 4}

    sparse = moyu_kernels.from_pretrained(folder)
    with torch.no_grad():
        with SparseMasks(trained, read_rules(folder), None):
            masked = trained(input_ids=ids).logits
        dense = trained(input_ids=ids).logits
        assert gap(sparse(input_ids=ids).logits, masked) < 1e-4
        step = [sparse(input_ids=ids[:, :n]).logits[:, -1] for n in (3, 7)]  # by the op
        for logits, n in zip(step, (3, 7), strict=True):
            assert gap(logits, masked[:, n - 1]) < 1e-4
        with taken_off(trained), SparseMasks(trained, read_rules(folder), None):
            assert gap(trained(input_ids=ids).logits, masked) > 1e-3
        for backend in ("reference", "cpu"):
            set_mode(sparse, "rule", backend)
            assert gap(sparse(input_ids=ids[:, :7]).logits, masked[:, :7]) < 1e-4
        set_mode(sparse, "dense")
        assert gap(sparse(input_ids=ids).logits, dense) < 1e-4

    tokens = torch.stack([ffn.counts[0] for ffn in sparse.modules() if isinstance(ffn, SparseFFN)])
    assert (tokens > 0).all()
    blocks, size = find_blocks(trained), 2 * 32 * (2 * 4 + 1) * 4  # of two layers, fp32
    read = ffn_read(sparse, blocks)[0]
    for ffn in sparse.modules():
        if isinstance(ffn, SparseFFN):
            ffn.compensation = None
    assert read - ffn_read(sparse, blocks)[0] == pytest.approx(size)
    with SparseMasks(trained, read_rules(folder), None) as masks:
        trained(input_ids=ids)
    skipped = bytes_skipped(blocks, masks.counts, None, 4)
    with taken_off(trained):
        dense_bytes = sum(ffn_bytes(block, 4) for block in blocks)
        assert bytes_skipped(blocks, masks.counts, None, 4) - skipped == pytest.approx(size / dense_bytes)

    with pytest.raises(CheckpointError, match="it has a compensation"):
        vllm_plugin.read_blocks(folder, AutoConfig.from_pretrained(folder))
    with pytest.raises(MoyuError, match="has compensations, and PowerInfer has no place"):
        export_powerinfer(folder, tmp_path / "powerinfer")
    (folder / FILE).unlink()
    with pytest.raises(CheckpointError, match="is in the manifest but missing"):
        moyu_kernels.from_pretrained(folder)


@pytest.mark.slow
def test_predicted_int8_rows_and_a_dense_folder(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, lora=LORA)
    settings |= {"predictor": {"name": "lowbit"}, "export": {"dtype": "float32", "weights": "int8"}}
    settings["bench"] = {"contexts": [8], "new_tokens": 4, "rounds": 5, "compiled": False}
    run = Run(Recipe.model_validate(settings))
    for stage in run.stages:
        run_stage(run, stage)
    bench, found = run.figures("bench"), run.figures("evaluate")
    assert found["kernels"] is not None
    sizes = {row["setting"]: row["bytes"] for row in bench["rows"]}
    weights, cache = bytes_per_token(tiny_model(), 8)  # dense ones have no compensation
    assert sizes["dense_runner"] == weights + cache
    folder = run.stage_folder("export") / "checkpoint"
    export_dense(folder, tmp_path / "dense")
    assert not (tmp_path / "dense" / "moyu").exists()
    with safe_open(tmp_path / "dense" / "model.safetensors", "pt") as tensors:
        assert not any(ATTRIBUTE in name for name in tensors.keys())  # noqa: SIM118


def test_a_delta_holds_it_and_training_resumes_with_it(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, lora=LORA)
    runs = {name: Run(Recipe.model_validate(settings | {"run": str(tmp_path / name)})) for name in ("whole", "broken")}
    for run in runs.values():
        run_stage(run, "calibrate")
    run_stage(runs["whole"], "finetune")
    with interrupted_at(5):
        run_stage(runs["broken"], "finetune")
    run_stage(runs["broken"], "finetune")
    delta = runs["whole"].stage_folder("finetune") / "delta"
    again = Run(Recipe.model_validate(settings | {"run": str(tmp_path / "again"), "delta": str(delta)}))
    run_stage(again, "calibrate")
    run_stage(again, "finetune")
    whole, resumed, rebuilt = (
        load_dense(run.stage_folder("finetune") / "model") for run in (runs["whole"], runs["broken"], again)
    )
    for one, other, same in zip(find_blocks(whole), find_blocks(resumed), find_blocks(rebuilt), strict=True):
        for part, parameter in getattr(one.module, ATTRIBUTE).named_parameters():
            assert parameter.abs().sum() > 0
            torch.testing.assert_close(getattr(getattr(other.module, ATTRIBUTE), part), parameter)
            torch.testing.assert_close(getattr(getattr(same.module, ATTRIBUTE), part), parameter, rtol=0, atol=0)
    other = Run(
        Recipe.model_validate(
            settings
            | {"delta": str(delta), "run": str(tmp_path / "b")}
            | {"finetune": settings["finetune"] | {"compensation": None}}
        )
    )
    run_stage(other, "calibrate")
    with pytest.raises(MoyuError, match="was trained under"):
        run_stage(other, "finetune")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsifier": {"name": "relu"}}, "stands for neurons that a threshold or top-k"),
        ({"sparsifier": {"name": "griffin", "prompt": 8}}, "stands for neurons that a threshold or top-k"),
        ({"finetune": {"compensation": {"rank": 64}}}, "rank 64 is above the 32 inputs"),
        ({"family": "mixtral"}, "holds experts, which have no place for it"),
    ],
)
def test_refusals_before_a_model_loads(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    settings = settings_in(tmp_path, change.pop("family", "llama"))
    settings["finetune"] |= change.pop("finetune", {})
    with pytest.raises(MoyuError, match=message):
        Run(Recipe.model_validate(settings | change))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "sparse"
    model, blocks = tiny_model(), find_blocks(tiny_model())
    rules = [Rule(torch.zeros(block.neurons)) for block in blocks]
    attach_empty(model, 2)
    model.model.layers[1].mlp.compensation.bias.data[3] = torch.nan
    with pytest.raises(MoyuError, match=r"layers\.1\.mlp\.compensation\.bias holds values that are not finite"):
        export(model, tokenizer(), folder, "threshold", rules, None, None)
    assert not folder.exists()
    model.model.layers[1].mlp.compensation.bias.data[3] = 0
    export(model, tokenizer(), folder, "threshold", rules, None, None)
    moyu_kernels.from_pretrained(folder)

    def seal(listed: bool) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"].pop(FILE, None)
        manifest["files"] |= {FILE: sha256(folder / FILE)} if listed else {}
        (folder / MANIFEST).write_text(json.dumps(manifest))

    stored = load_file(folder / FILE)
    for tensors, message in (
        ({name: tensor for name, tensor in stored.items() if name != "blocks.1.b"}, "blocks.1.b"),
        (stored | {"blocks.1.a": torch.zeros(3, 32)}, "are no compensation"),
        (
            stored | {f"blocks.1.{n}": torch.zeros(s) for n, s in (("a", (2, 8)), ("b", (8, 2)), ("bias", (8,)))},
            "size is 32",
        ),
    ):
        save_file(tensors, folder / FILE)
        seal(listed=True)
        with pytest.raises(CheckpointError, match=message):
            moyu_kernels.from_pretrained(folder)
        with pytest.raises(MoyuError, match=message):
            load_dense(folder)
    save_file(stored, folder / FILE)
    seal(listed=False)
    with pytest.raises(CheckpointError, match=r"the manifest does not list moyu/compensation\.safetensors"):
        moyu_kernels.from_pretrained(folder)


def test_activations_that_are_not_finite_are_named() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[5] = torch.nan
    with (
        Masking(find_blocks(model), halved),
        pytest.raises(MoyuError, match=r"layers\.1\.mlp: its inputs or activations"),
    ):
        fit_compensations(model, torch.arange(64)[None], Compensate(rank=2))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a \[2, 8\], b \[8, 3\] and bias \[8\] are no compensation"):
        Compensation(torch.zeros(2, 8), torch.zeros(8, 3), torch.zeros(8))
