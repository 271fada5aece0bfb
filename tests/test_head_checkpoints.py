"""Routers of attention heads in a sparse checkpoint: written, loaded, verified, refused, fitted again."""

import json
import logging
from pathlib import Path
from typing import Any

import moyu_kernels
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from moyu_kernels import Runner
from moyu_kernels.checkpoint import FORMAT_VERSION, CheckpointError
from moyu_kernels.heads import HeadQuery
from moyu_kernels.modules import set_mode
from moyu_kernels.rules import Rule
from safetensors.torch import load_file, save_file
from test_heads import logits_of, named, routers_of
from test_malformed import DATA, FEW, rehash, tells
from tiny import tiny_model, tokenizer
from transformers import AutoModelForCausalLM
from zoo import CASES

from moyu_train.checkpoints.export import MANIFEST, STATE, export, read_heads, read_rules
from moyu_train.checkpoints.verify import verify
from moyu_train.errors import MoyuError
from moyu_train.evaluation.head_masks import HeadMasks
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.models.heads import attention_sha256, find_attention
from moyu_train.models.loading import load_dense

IDS = torch.arange(20).view(1, 20) * 7 % 259


def exported(folder: Path, name: str = "Llama", unit: str = "head", keep: int = 2, **more: Any) -> Path:
    """A model whose last layer has routers, under a threshold."""
    model = CASES[name].model()
    last = find_attention(model)[1:]
    heads = named(last, routers_of(last, unit), keep, unit)
    rules = [Rule(torch.full((96,), 0.02)) for _ in range(2)]
    export(model, tokenizer(), folder, "threshold", rules, None, None, heads=heads, **more)
    return folder


def masked_logits(folder: Path, heads: bool) -> torch.Tensor:
    """Of stock code under the masks that a checkpoint says."""
    model = load_dense(folder)
    with SparseMasks(model, read_rules(folder), None), HeadMasks.of(model, read_heads(folder) if heads else None):
        return logits_of(model, IDS)


def step_by_step(model: Any) -> torch.Tensor:
    runner = Runner(model, 20, compile=False)
    runner.reset()
    logits = [runner.step(token) for token in IDS.split(1, 1)]
    runner.close()
    return torch.stack(logits, 1)


@pytest.mark.parametrize(("name", "unit", "keep"), [("Llama", "head", 2), ("Llama", "group", 1), ("Qwen3", "head", 3)])
def test_what_is_loaded_is_what_was_masked(
    tmp_path: Path, name: str, unit: str, keep: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = exported(tmp_path / "sparse", name, unit, keep)
    figures = verify(folder)
    assert (figures["predictors"], figures["heads"], figures["stock_refuses"]) == (False, True, True)
    masked, rule = masked_logits(folder, heads=True), masked_logits(folder, heads=False)
    assert not torch.allclose(masked, rule, rtol=1e-2, atol=1e-2)
    with caplog.at_level(logging.WARNING):
        model = moyu_kernels.from_pretrained(folder)
    assert "has no predictor: mode 'rule' is used" in caplog.text  # of the FFN
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(logits_of(model, IDS[:, :8]), masked[:, :8], **close)
    torch.testing.assert_close(step_by_step(model), masked, **close)
    torch.testing.assert_close(logits_of(model, IDS), rule, **close)  # a prefill
    for mode, expected in (("rule", rule), ("dense", logits_of(load_dense(folder), IDS)), ("predicted", masked)):
        set_mode(model, mode)
        torch.testing.assert_close(step_by_step(model), expected, **close)
        loaded = moyu_kernels.from_pretrained(folder, mode=mode, backend="reference")
        torch.testing.assert_close(step_by_step(loaded), expected, **close)
    kinds = [type(layer.self_attn.q_proj) for layer in model.model.layers]
    assert kinds == [torch.nn.Linear, HeadQuery]


def test_generation_and_saving(tmp_path: Path) -> None:
    model = moyu_kernels.from_pretrained(exported(tmp_path / "sparse"))
    stock = model.generate(input_ids=IDS[:, :9], do_sample=False, max_new_tokens=6, pad_token_id=0)[0, 9:]
    runner = Runner(model, 20)
    assert list(runner.generate(IDS[:, :9], 6)) == stock[:6].tolist()
    runner.close()
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("sparse", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert '"_attn' not in (tmp_path / "again" / "config.json").read_text()
    with pytest.raises(KeyError, match="load with moyu_kernels"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def test_relu_with_routers_is_stock_code_s_function_still(tmp_path: Path) -> None:
    """Routers are no part of the function, as predictors are none."""
    model = tiny_model()
    heads = named(find_attention(model), routers_of(find_attention(model)), 2)
    rules = [Rule(torch.zeros(96), gate="relu", keep="nonzero") for _ in range(2)]
    export(model, tokenizer(), tmp_path / "relu", "relu", rules, None, None, heads=heads)
    assert not verify(tmp_path / "relu")["stock_refuses"]


def test_the_hash_is_of_the_attention_under_routers_alone(tmp_path: Path) -> None:
    folder = exported(tmp_path / "sparse")
    path = "model.layers.1.self_attn"
    found = json.loads((folder / MANIFEST).read_text())["attention_sha256"]
    model = load_dense(folder)
    assert found == attention_sha256(model, [path])
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(1)
        model.model.layers[1].mlp.up_proj.weight.add_(1)
    assert found == attention_sha256(model, [path])
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weight = getattr(model.model.layers[1].self_attn, name).weight
        with torch.no_grad():
            weight[0, 0] += 1
            assert attention_sha256(model, [path]) != found
            weight[0, 0] -= 1


def test_stale_routers_are_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path / "sparse")
    manifest = json.loads((folder / MANIFEST).read_text())
    for changed in ("0" * 64, None):
        (folder / MANIFEST).write_text(json.dumps(manifest | {"attention_sha256": changed}))
        with pytest.raises(CheckpointError, match=r"the routers of heads are stale.*moyu fit-predictors --from"):
            moyu_kernels.from_pretrained(folder)
        with pytest.raises(MoyuError, match="the routers of heads are stale"):
            read_heads(folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Phi-3", "no plain linear layers q_proj, k_proj, v_proj and o_proj"),
        ("OLMo 2", "its q_norm may mix heads or shift zeros"),
        ("GPT-2", "no plain linear layers q_proj, k_proj, v_proj and c_proj"),
    ],
)
def test_a_model_without_an_op_is_not_exported(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(MoyuError, match=f"no op can skip the heads of .*{reason}.*use heads.keep: null"):
        exported(tmp_path / "sparse", name)
    assert not list(tmp_path.iterdir())


def test_sparse_inputs_of_the_same_attention_are_refused(tmp_path: Path) -> None:
    below, same = ({f"model.layers.{i}.self_attn.o_proj": Rule(torch.zeros(32))} for i in range(2))
    with pytest.raises(MoyuError, match=r"layers\.1\.self_attn\.o_proj would have sparse inputs beside heads"):
        exported(tmp_path / "same", inputs=same)
    folder = exported(tmp_path / "below", inputs=below)
    verify(folder)
    config = json.loads((folder / "config.json").read_text())
    config["moyu"]["inputs"]["paths"] = list(same)
    (folder / "config.json").write_text(json.dumps(config))
    rehash(folder)
    with pytest.raises(CheckpointError, match="is under routers of heads and has sparse inputs too"):
        moyu_kernels.from_pretrained(folder)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    attentions = find_attention(model)
    routers = routers_of(attentions)
    routers[1]["bias"][0] = torch.nan
    with pytest.raises(MoyuError, match=r"heads\.1\.bias holds values that are not finite"):
        export(
            model,
            tokenizer(),
            tmp_path / "sparse",
            "threshold",
            [Rule(torch.ones(96))] * 2,
            None,
            None,
            heads=named(attentions, routers, 2),
        )


@pytest.mark.parametrize("part", ["weight", "scale", "bias"])
@pytest.mark.parametrize("value", [None, torch.ones(3), torch.ones(4, 31, dtype=torch.int8), torch.ones(4).half()])
def test_states_that_do_not_fit_are_refused(tmp_path: Path, part: str, value: torch.Tensor | None) -> None:
    folder = exported(tmp_path / "sparse")
    tensors = load_file(folder / STATE)
    del tensors[f"heads.0.{part}"]
    save_file(tensors if value is None else tensors | {f"heads.0.{part}": value}, folder / STATE)
    rehash(folder)
    said = tells(lambda: moyu_kernels.from_pretrained(folder))
    assert f"lacks the tensor 'heads.0.{part}'" in said if value is None else "router" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unit": "limb"}, "heads come by 'limb' (known: head, group); update moyu_kernels"),
        ({"unit": "group"}, "has 2 groups and its router scores 4"),
        ({"keep": 0}, "keep 0 of 4 units does not fit"),
        ({"keep": 5}, "keep 5 of 4 units does not fit"),
        ({"keep": True}, "is not as moyu writes it"),
        ({"keep": 2.0}, "is not as moyu writes it"),
        ({"output": "down_proj"}, "no plain linear layers"),
        ({"output": 3}, "is not as moyu writes it"),
        ({"paths": []}, "is not as moyu writes it"),
        ({"paths": ["model.layers.1.self_attn"] * 2}, "is not as moyu writes it"),
        ({"paths": ["model.layers.7.self_attn"]}, "cannot be read (AttributeError"),
        ({"paths": ["model.layers.1.mlp"]}, "no plain linear layers"),
        ({"paths": ["model.layers.1.self_attn", "model.layers.0.self_attn"]}, "lacks the tensor 'heads.1.weight'"),
        ({"attention_sha256": None}, "cannot be read"),
    ],
)
def test_forged_blocks_say_what_is_wrong(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = exported(tmp_path / "sparse")
    config = json.loads((folder / "config.json").read_text())
    config["moyu"]["heads"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    rehash(folder)
    assert said in tells(lambda: moyu_kernels.from_pretrained(folder))
    tells(lambda: read_heads(folder))


@FEW
@given(key=st.sampled_from(("", "unit", "keep", "output", "paths", "attention_sha256")), value=DATA)
@example(key="", value=[3])
@example(key="paths", value="ab")
def test_any_data_in_the_block(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "heads"
    if not folder.exists():
        exported(folder)
        (folder / "config.json").rename(folder.with_suffix(".json"))
    config = json.loads(folder.with_suffix(".json").read_text())
    config["moyu"]["heads"] = config["moyu"]["heads"] | {key: value} if key else value
    (folder / "config.json").write_text(json.dumps(config))
    rehash(folder)
    tells(lambda: moyu_kernels.from_pretrained(folder))
    tells(lambda: read_heads(folder))


def test_older_checkpoints_have_no_heads(tmp_path: Path) -> None:
    folder = exported(tmp_path / "sparse")
    config, manifest = (json.loads((folder / name).read_text()) for name in ("config.json", MANIFEST))
    assert config["moyu"]["format_version"] == manifest["format_version"] == FORMAT_VERSION
    del config["moyu"]["heads"], manifest["attention_sha256"]
    config["moyu"]["format_version"] = manifest["format_version"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    (folder / MANIFEST).write_text(json.dumps(manifest))
    rehash(folder)
    assert read_heads(folder) is None
    torch.testing.assert_close(
        step_by_step(moyu_kernels.from_pretrained(folder)), masked_logits(folder, heads=False), rtol=1e-4, atol=1e-4
    )
