"""Attention heads: found by structure, masked where they reach the output projection, named by routers, decoded."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from moyu_kernels import Runner
from moyu_kernels.heads import HeadQuery, HeadRouters, install_heads, simulated_because
from moyu_kernels.inputs import SparseLinear
from moyu_kernels.modules import set_mode
from tiny import randomised, save_tiny, tiny_settings, with_deltas
from torch import Tensor
from transformers import DiffLlamaConfig
from zoo import CASES, GROUPED

from moyu_train.cli import main
from moyu_train.errors import MoyuError
from moyu_train.evaluation.head_masks import HeadMasks, dense_bytes, most
from moyu_train.models.heads import contributions, find_attention
from moyu_train.models.structure import base_layer
from moyu_train.settings import Lora
from moyu_train.training.heads import Router, RouterTrainer, scores
from moyu_train.training.lora import adapt

HEADS, GROUPS = 4, {"Falcon": 1, "OPT": 4, "GPT-2": 4, "GPT-NeoX": 4, "Phi": 4, "GPT-J": 4}
IDS = torch.arange(40).view(2, 20) * 7 % 259


def routers_of(attentions: list, unit: str = "head", seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for attention in attentions:
        shape = attention.units(unit), attention.block.hidden
        weight = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        scale = torch.rand(shape[0], generator=generator) / 100
        found.append({"weight": weight, "scale": scale, "bias": torch.rand(shape[0], generator=generator)})
    return found


def named(attentions: list, routers: list[dict[str, Tensor]], keep: int, unit: str = "head") -> HeadRouters:
    by_path = {attention.block.path: router for attention, router in zip(attentions, routers, strict=True)}
    return HeadRouters(unit, keep, attentions[0].block.down, by_path)


def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", [name for name in CASES if name != "DeepSeek-V3"])
def test_heads_are_found_in_every_architecture(name: str) -> None:
    model = CASES[name].model()
    attentions = find_attention(model)
    assert len(attentions) == 2
    for attention in attentions:
        assert (attention.heads, attention.size, attention.block.hidden) == (HEADS, 8, 32)
        assert attention.groups == GROUPS.get(name, 2)
    attention = attentions[1]
    module, seen = attention.block.module, []
    output = getattr(module, attention.block.down)
    handle = output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits_of(model)
    handle.remove()
    a = seen[0]
    with torch.no_grad():
        alone = [output(a * (torch.arange(32) // 8 == head)) - output(a * 0) for head in range(HEADS)]
    expected = torch.stack([part.norm(dim=-1) for part in alone], -1)
    torch.testing.assert_close(contributions(a, attention.grams("head")), expected, rtol=1e-4, atol=1e-5)
    groups = torch.stack([sum(part).norm(dim=-1) for part in torch.stack(alone).chunk(attention.groups)], -1)
    torch.testing.assert_close(contributions(a, attention.grams("group")), groups, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Llama", "OPT", "GPT-NeoX", "Phi-3"])
def test_inputs_of_the_output_projection_belong_to_their_heads(name: str) -> None:
    """Other query rows of one head change that head's part alone; other keys and values those of their group."""
    model = CASES[name].model()
    attention = find_attention(model)[0]
    module, seen = attention.block.module, []
    getattr(module, attention.block.down).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    weight, ramp = getattr(module, attention.inputs[0]).weight, torch.linspace(-0.5, 0.5, 32)
    start = 2 * 24 if name == "GPT-NeoX" else 2 * 8  # there each head has its query, key and value rows together
    logits_of(model)
    with torch.no_grad():
        weight[start : start + 8] += ramp
    logits_of(model)
    if attention.groups < HEADS:
        keys = module.k_proj.weight if name == "Llama" else weight[32:48]
        with torch.no_grad():
            keys[8:] += ramp
        logits_of(model)
    changed = [(b - a).unflatten(-1, (HEADS, 8)).abs().amax((0, 1, 3)) > 1e-4 for a, b in pairwise(seen)]
    assert changed[0].tolist() == [False, False, True, False]
    if attention.groups < HEADS:
        assert changed[1].tolist() == [False, False, True, True]


def test_what_is_no_attention_is_refused() -> None:
    with pytest.raises(MoyuError, match=r"no attention found in DeepseekV3.*self_attn has .*q_b_proj"):
        find_attention(CASES["DeepSeek-V3"].model())
    model = CASES["Llama"].model()
    model.model.layers[1].self_attn.head_dim = 7
    with pytest.raises(MoyuError, match=r"layers\.1\.self_attn do not make attention heads of 7: q_proj \[32, 32\]"):
        find_attention(model)
    del model.model.layers[1].self_attn.head_dim
    with pytest.raises(MoyuError, match="heads of an unknown size"):
        find_attention(model)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPT-NeoX", "OPT"])
@pytest.mark.parametrize("unit", ["head", "group"])
def test_masks_equal_hooks_written_by_hand(name: str, unit: str) -> None:
    model = CASES[name].model()
    attentions = find_attention(model)
    units, routers = attentions[1].units(unit), routers_of(attentions[1:], unit)
    keep, width = units // 2, 32 // units
    dense = logits_of(model)
    with HeadMasks(attentions[1:], unit, keep, routers) as masks:
        found = logits_of(model)
    assert torch.equal(logits_of(model), dense)  # off again

    module, state = attentions[1].block.module, {}
    getattr(module, attentions[1].inputs[0]).register_forward_pre_hook(lambda _, args: state.update(x=args[0]))

    def mask(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        a = args[0].clone()
        for b in range(2):
            for t in range(20):
                router = routers[0]
                score = router["scale"] * (router["weight"].float() @ state["x"][b, t]) + router["bias"]
                for unit_off in score.argsort()[: units - keep].tolist():
                    a[b, t, unit_off * width : (unit_off + 1) * width] = 0.0
        return (a,)

    getattr(module, attentions[1].block.down).register_forward_pre_hook(mask)
    expected = logits_of(model)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, dense, rtol=1e-2, atol=1e-2)
    assert masks.counts.tokens.tolist() == [40]
    if unit == "group":
        assert masks.counts.groups.tolist() == [40 * keep]


def test_counts_and_bytes_at_a_batch() -> None:
    model = CASES["Llama"].model()
    attentions = find_attention(model)
    routers = routers_of(attentions)
    kept: list[Tensor] = []
    module = attentions[0].block.module
    module.q_proj.register_forward_pre_hook(lambda _, args: kept.append(most(scores(args[0], routers[0]), 2)))
    with HeadMasks(attentions, "head", 2, routers, batch=2) as masks:
        logits_of(model)
    assert masks.counts.steps[0] == 20
    union = masks.counts.union[0].item()
    assert union == kept[0].any(0).sum()
    assert 40 < union < 80
    groups = kept[0].unflatten(-1, (2, 2)).any(-1).sum().item()
    assert masks.counts.groups[0].item() == groups
    weights, cache = masks.bytes_read(2, 128)
    rows = masks.counts.union.sum().item() / 20 * 8  # of q and of o, 64 bytes each
    router = 4 * 32 + 2 * 4 * 4
    assert weights == pytest.approx(rows * 2 * 64 + 2 * (2 * 16 * 64 + router))
    assert cache == pytest.approx(masks.counts.groups.sum().item() / 40 * 2 * 2 * 8 * 128 * 2)
    assert dense_bytes(attentions, 2, 128, 2) == (2 * (32 + 32 + 16 + 16) * 32 * 2, 2 * 2 * 2 * 2 * 8 * 128 * 2)


@pytest.mark.parametrize("name", ["Llama", "GPT-NeoX"])
def test_all_heads_kept_is_the_dense_model_with_its_gradients(name: str) -> None:
    model = CASES[name].model()
    attentions = find_attention(model)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    dense, dense_logits = gradients(), logits_of(model)
    for routers in (None, routers_of(attentions)):
        with HeadMasks(attentions, "head", HEADS, routers):
            assert torch.equal(logits_of(model), dense_logits)
            for ours, theirs in zip(gradients(), dense, strict=True):
                torch.testing.assert_close(ours, theirs)
    with HeadMasks(attentions, "head", 1, None):
        assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(gradients(), dense, strict=True))


@pytest.mark.parametrize("masks_first", [True, False])
def test_lora_sees_masked_heads_merged_and_unmerged(masks_first: bool) -> None:
    model = CASES["Llama"].model()
    routers = routers_of(find_attention(model))
    masks = HeadMasks(find_attention(model), "head", 2, routers) if masks_first else None
    adapted = with_deltas(adapt(model, Lora(rank=4, targets=("q_proj", "o_proj"))).eval(), 0.3, seed=1)
    masks = masks or HeadMasks(find_attention(adapted), "head", 2, routers)
    assert type(base_layer(masks.attentions[0].block.module.o_proj)) is torch.nn.Linear
    with masks:
        unmerged = logits_of(adapted)
        merged = logits_of(adapted.merge_and_unload())
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_of(model), merged, rtol=1e-2, atol=1e-2)


def test_a_router_learns_what_can_be_learnt() -> None:
    attention = find_attention(CASES["Llama"].model())[0]
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(32, HEADS, generator=generator) / 8

    def observed(tokens: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(tokens, 32, generator=generator) + 1
        return x, (x @ truth + 4).clamp_min(0).square()

    router = Router(attention, "head", torch.device("cpu"))
    for _ in range(4):
        router.observe(*observed(500))
    x, c = observed(500)
    oracle = most(c, 2)
    learnt, fixed = (most(scores(x, found), 2) for found in (router.solve(), router.fixed()))
    assert (learnt & oracle).sum() / oracle.sum() > 0.95
    assert 0.3 < (fixed & oracle).sum() / oracle.sum() < 0.8
    assert (fixed == fixed[:1]).all()
    assert torch.equal(fixed[0], most(c.sqrt().mean(0), 2))


def test_an_interrupted_fit_goes_on_to_the_same_routers(tmp_path: Path) -> None:
    model = CASES["Llama"].model()
    attentions, windows = find_attention(model), IDS.repeat(3, 1)
    expected = RouterTrainer(model, attentions, "head", tmp_path / "none").fit(windows, 100)
    RouterTrainer(model, attentions, "head", tmp_path).fit(windows[:4], 2)
    trainer = RouterTrainer(model, attentions, "head", tmp_path)
    found = trainer.fit(windows, 100)
    assert trainer.predictors[0].sums["n"] == windows.numel()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "unit", "compiled"),
    [("Llama", "head", True), ("Llama", "group", False), ("Qwen2", "head", False), ("Qwen3", "head", False)],
)
def test_tokens_decoded_one_by_one_equal_the_masked_path(name: str, unit: str, compiled: bool) -> None:
    model = CASES[name].model()
    attentions = find_attention(model)
    routers = routers_of(attentions, unit)
    keep = attentions[0].units(unit) // 2
    with HeadMasks(attentions, unit, keep, routers):
        expected = logits_of(model)
    dense = logits_of(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    install_heads(model, named(attentions, routers, keep, unit))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(logits_of(model, IDS[:1, :8]), expected[:1, :8], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(model), dense, rtol=1e-4, atol=1e-4)  # a prefill runs all heads
    for ids in (IDS, IDS[1:]):
        runner = Runner(model, 20, batch=len(ids), compile=compiled)
        runner.reset()
        logits = [runner.step(ids[:, t : t + 1]) for t in range(20)]
        torch.testing.assert_close(torch.stack(logits, 1), expected[-len(ids) :], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(runner.prefill(ids[:, :3]), dense[-len(ids) :, 2], rtol=1e-4, atol=1e-4)
        set_mode(model, "rule")
        torch.testing.assert_close(runner.step(ids[:, 3:4]), dense[-len(ids) :, 3], rtol=1e-4, atol=1e-4)
        set_mode(model, "predicted")
        runner.close()
    assert not torch.allclose(dense, expected, rtol=1e-2, atol=1e-2)


def test_sequences_with_padding_on_the_left_decode_as_alone() -> None:
    model = CASES["Llama"].model()
    attentions = find_attention(model)
    install_heads(model, named(attentions, routers_of(attentions), 2))
    short, pad = IDS[:1, :3], 4
    ids = torch.cat([torch.full((1, pad), 258), short], 1)
    mask = torch.tensor([[0] * pad + [1] * 3])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        alone, padded = model(input_ids=short), model(input_ids=ids, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(padded.logits[:, pad:], alone.logits, rtol=1e-4, atol=1e-4)
        for step in range(3):
            token, mask = IDS[1:, step : step + 1], torch.cat([mask, torch.ones(1, 1, dtype=mask.dtype)], 1)
            alone = model(input_ids=token, past_key_values=alone.past_key_values)
            where = torch.tensor([[3 + step]])
            padded = model(
                input_ids=token, attention_mask=mask, position_ids=where, past_key_values=padded.past_key_values
            )
            torch.testing.assert_close(padded.logits, alone.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("native", [True, False])
def test_a_head_without_a_query_is_a_head_unless_others_are_off(native: bool) -> None:
    """A pruned head attends evenly to the past in stock code: its zeros mean nothing where all heads run."""
    model = CASES["Llama"].model()
    attention = find_attention(model)[0]
    with torch.no_grad():
        attention.block.module.q_proj.weight[:8] = 0.0
    dense = logits_of(model)
    install_heads(model, named([attention], routers_of([attention]), 2), "rule", "cpu" if native else "reference")
    runner = Runner(model, 20, batch=2, compile=False)
    runner.reset()
    logits = [runner.step(IDS[:, t : t + 1]) for t in range(20)]
    torch.testing.assert_close(torch.stack(logits, 1), dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(model), dense, rtol=1e-4, atol=1e-4)


def test_decoding_reads_what_the_figures_say() -> None:
    model = CASES["Llama"].model()
    attentions = find_attention(model)
    routers = routers_of(attentions)
    with HeadMasks(attentions, "head", 2, routers) as masks:
        logits_of(model, IDS[:, :8])
    install_heads(model, named(attentions, routers, 2))
    runner = Runner(model, 8, batch=2, compile=False)
    runner.reset()
    for module in model.modules():
        if isinstance(module, HeadQuery | SparseLinear):
            module.counts.zero_()
    for t in range(8):
        runner.step(IDS[:, t : t + 1])
    for layer, attention in enumerate(attentions):
        module: Any = attention.block.module
        tokens, groups = module.q_proj.counts.tolist()
        assert tokens == 16
        assert groups == masks.counts.groups[layer] < 32
        assert module.o_proj.counts.tolist() == [16, 16 * 2 * 8]  # inputs that are read: those of two heads


def test_what_has_no_op_is_simulated_and_another_attention_refused() -> None:
    for name, reason in (
        ("Phi-3", "no plain linear layers q_proj, k_proj, v_proj and o_proj"),
        ("OLMo 2", "its q_norm may mix heads or shift zeros"),
        ("GPT-J", "its attention is 'eager' and not 'sdpa'"),
    ):
        model = CASES[name].model()
        attention = find_attention(model)[0]
        assert reason in simulated_because(model, attention.block.path, attention.block.down)
        with pytest.raises(ValueError, match="so no op can skip its heads"):
            install_heads(model, named([attention], routers_of([attention]), 2))
    mixing = randomised(DiffLlamaConfig(**GROUPED))  # subtracts heads from each other after attention
    path = "model.layers.0.self_attn"
    assert "it has parameters of its own, lambda_q1, " in simulated_because(mixing, path)
    with pytest.raises(ValueError, match="which may mix heads, so no op can skip its heads"):
        install_heads(mixing, HeadRouters("head", 2, "o_proj", {path: routers_of(find_attention(model)[:1])[0]}))
    model = CASES["Llama"].model()
    attention = find_attention(model)[0]
    install_heads(model, named([attention], routers_of([attention]), 2))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"'sdpa', which does not know of heads that are off; use model\.set_attn"):
        logits_of(model, IDS[:1, :8])


@pytest.mark.parametrize("part", ["scale", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_routers_that_are_not_finite_are_refused(part: str, value: float) -> None:
    model = CASES["Llama"].model()
    attention = find_attention(model)[0]
    router = routers_of([attention])[0]
    router[part][1] = value
    with pytest.raises(ValueError, match=f"the router's {part} holds values that are not finite"):
        install_heads(model, named([attention], [router], 2))


def test_routers_of_other_sizes_are_refused() -> None:
    model = CASES["Llama"].model()
    attentions = find_attention(model)
    routers = routers_of(attentions)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn has 2 groups and its router scores 4"):
        install_heads(model, named(attentions, routers, 2, "group"))
    with pytest.raises(ValueError, match="keep 5 of 4 units does not fit"):
        install_heads(model, named(attentions, routers, 5))
    model = CASES["Llama"].model()
    routers[1]["scale"] = routers[1]["scale"].double()
    with pytest.raises(
        ValueError, match=r"router's scale is torch\.float64 \[4\], the layer needs torch\.float32 \[4\]"
    ):
        install_heads(model, named(find_attention(model), routers, 2))


def recipe_in(folder: Path, family: str = "llama", **heads: Any) -> str:
    settings = tiny_settings(folder, save_tiny(folder / "model", family))
    settings |= {"predictor": None, "control": None, "bench": None, "heads": {"densities": [0.75, 0.5], **heads}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_rows_of_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "heads.json"
    assert main(["heads", recipe_in(tmp_path, dense_layers=[], context=64), "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert [row["keep"] for row in figures["rows"]] == [3, 2]
    for row, point in zip(figures["rows"], figures["points"], strict=True):
        assert 0.5 < row["recall"] <= 1
        assert row["router"] == point["ppl"]["router"] / figures["ppl"]["dense"]
        low, high = sorted((row["weights_skipped"], row["cache_skipped"]))
        assert low <= row["bytes_skipped"] <= high
        assert row["bytes_skipped"] == point["would_skip"]["bytes_skipped"]
        assert len(point["layers"]) == 2
    assert figures["rows"][0]["weights_skipped"] < figures["rows"][1]["weights_skipped"]
    kernels = figures["kernels"]
    assert kernels["perplexity"] == pytest.approx(kernels["masked_perplexity"], rel=1e-3)
    half = json.loads(out.read_text())["rows"][1]["cache_skipped"]
    assert main(["heads", recipe_in(tmp_path, context=64), "--json", str(out)]) == 0  # layer 0 dense
    assert 0 < json.loads(out.read_text())["rows"][1]["cache_skipped"] < half
    assert "simulated" not in capsys.readouterr().out.lower()


def test_a_model_without_an_op_says_simulated(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "heads.json"
    assert main(["heads", recipe_in(tmp_path, "gpt2", batch=2), "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["rows"][0]["bytes_skipped"] is None
    assert figures["kernels"] is None
    assert figures["points"][0]["would_skip"]["bytes_skipped"] > 0
    assert "Simulated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"dense_layers": [2]}, r"heads.dense_layers \[2\]: the model has the layers 0 to 1"),
        ({"dense_layers": [0, 1]}, "at least one has to be sparse"),
        ({"densities": [0.95]}, "heads.densities 0.95 keeps 4 of the 4 heads of a layer"),
        ({"densities": [0.1]}, "heads.densities 0.1 keeps 0 of the 4 heads"),
        ({"unit": "group", "densities": [0.8]}, "keeps 2 of the 2 groups"),
        ({"density": 0.5}, r"unknown key 'heads\.density'; did you mean 'densities'"),
        ({"batch": 9}, "heads.batch"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, heads: dict[str, Any], message: str
) -> None:
    assert main(["heads", recipe_in(tmp_path, **heads)]) == 1
    assert re.search(message, capsys.readouterr().err)
