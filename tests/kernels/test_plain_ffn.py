"""Plain FFN blocks in models: biases, Conv1D, projections that lie in a decoder layer, predictors, saving."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from moyu_kernels import Runner, SparseFFN, density, from_pretrained
from moyu_kernels.ffn import installed_ffn, simulated_because
from moyu_kernels.modules import set_mode
from moyu_kernels.ops.ffn import naive
from moyu_kernels.plain import SparsePlainFFN
from moyu_kernels.rules import Rule
from moyu_kernels.seam import Seam
from predictors import PLAIN_FAMILIES
from safetensors.torch import load_file
from test_cpu_ops import ODD
from test_plain_op import PREDICTABLE, RULES, plain_arguments
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, OPTConfig
from transformers.pytorch_utils import Conv1D

Factory = Callable[..., Path]

IDS = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS}
FAMILIES: dict[str, tuple[Any, str, tuple[str, str, str, str]]] = {  # config, field, path, up, down and activation
    "opt": (
        OPTConfig(**SIZES, ffn_dim=192, word_embed_proj_dim=64, dropout=0.0),
        "activation_function",
        ("model.decoder.layers.{}", "fc1", "fc2", "activation_fn"),
    ),
    "gpt2": (
        GPT2Config(n_embd=64, n_layer=2, n_head=4, n_inner=192, **IDS),
        "activation_function",
        ("transformer.h.{}.mlp", "c_fc", "c_proj", "act"),
    ),
    "gpt_neox": (
        GPTNeoXConfig(**SIZES, intermediate_size=192),
        "hidden_act",
        ("gpt_neox.layers.{}.mlp", "dense_h_to_4h", "dense_4h_to_h", "act"),
    ),
}


def model_of(family: str) -> tuple[Any, list[dict[str, Any]], str]:
    """A random model, biases too, its blocks as a checkpoint has them, and the config field of its activation."""
    config, field, (path, up, down, act) = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if "bias" in name else 0.15))
    shape = {"layout": "plain", "gate": None, "neurons": 192, "hidden": 64}
    return model, [{"path": path.format(i), "up": up, "down": down, "act": act, **shape} for i in range(2)], field


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rule_equals_stock_model_under_the_mask(
    checkpoint: Factory, tmp_path: Path, family: str, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    stock, blocks, field = model_of(family)
    folder = checkpoint(stock, blocks=blocks, field=field, threshold=0.2, family=None)
    model = from_pretrained(folder, mode="rule", backend=backend)
    assert "simulated" not in caplog.text
    for block in blocks:
        Seam(stock.get_submodule(block["path"]), block["down"], lambda a: torch.where(a.abs() >= 0.2, a, 0.0))
    for length in (5, 20):
        ids = torch.randint(128, (1, length))
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)
    ffn = installed_ffn(model, blocks[0]["path"], blocks[0]["up"])
    assert ffn.counts[0] == 25
    assert 0.1 * 25 * 192 < ffn.counts[2] < 0.9 * ffn.counts[1] == 0.9 * 25 * 192
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("predictor", PLAIN_FAMILIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_runs_and_modes_switch(checkpoint: Factory, family: str, predictor: str) -> None:
    stock, blocks, field = model_of(family)
    model = from_pretrained(checkpoint(stock, blocks=blocks, field=field, threshold=0.0, family=predictor))
    ids = torch.randint(128, (1, 4))
    predicted = model(ids).logits
    assert 0.05 < density(model)[0] < 0.95
    set_mode(model, "predicted", "reference")
    torch.testing.assert_close(model(ids).logits, predicted, rtol=1e-3, atol=1e-3)
    set_mode(model, "dense", "cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(predicted, model(ids).logits, atol=1e-2)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_the_runner_decodes_as_the_model_does(checkpoint: Factory, family: str) -> None:
    stock, blocks, field = model_of(family)
    model = from_pretrained(
        checkpoint(stock, blocks=blocks, field=field, threshold=0.2, family="lowbit_up"), mode="rule"
    )
    ids = torch.randint(128, (1, 9))
    expected = model(ids).logits
    runner = Runner(model, max_length=12)
    logits = [runner.prefill(ids[:, :6]), *(runner.step(token) for token in ids[0, 6:])]
    torch.testing.assert_close(torch.stack(logits, dim=1), expected[:, 5:], rtol=1e-4, atol=1e-4)


def test_what_does_more_than_a_plain_ffn_is_simulated(checkpoint: Factory, caplog: pytest.LogCaptureFixture) -> None:
    stock, blocks, _ = model_of("gpt_neox")
    module, rule = stock.get_submodule(blocks[0]["path"]), Rule(torch.full((192,), 0.1))
    assert simulated_because(module, blocks[0], "gelu", rule) == ""
    stock_up, drelu = module.dense_h_to_4h.forward, Rule(torch.zeros(192), gate="relu", up="relu", keep="nonzero")
    assert "has no op" in simulated_because(module, blocks[0], "gelu", drelu)
    assert "does not name its activation" in simulated_because(module, blocks[0] | {"act": ""}, "gelu", rule)
    module.forward = lambda x: module.dense_4h_to_h(2.0 * module.act(module.dense_h_to_4h(x)))
    assert "computes more than down" in simulated_because(module, blocks[0], "gelu", rule)
    module.forward = lambda x: module.dense_4h_to_h(module.act(module.dense_h_to_4h(x))) + x
    assert simulated_because(module, blocks[0], "gelu", rule) == "", "what is around it stays"
    module.forward = lambda x, position: x
    assert "computes more than down" in simulated_because(module, blocks[0], "gelu", rule)
    assert stock_up == module.dense_h_to_4h.forward, "trying leaves no trace"
    assert not module.dense_h_to_4h._forward_pre_hooks
    assert not module.dense_4h_to_h._forward_hooks


def module(
    arguments: list[Any],
    conv1d: bool = False,
    mode: str = "rule",
    backend: str = "cpu",
    cls: type[SparsePlainFFN] = SparsePlainFFN,
) -> Any:
    _, up, down, threshold, act, predictor, rule, keep, up_bias, down_bias = arguments
    kinds: Any = (Conv1D(193, 65), Conv1D(65, 193)) if conv1d else (nn.Linear(65, 193), nn.Linear(193, 65))
    weights = (up.T, down) if conv1d else (up, down.T)
    for projection, weight, bias in zip(kinds, weights, (up_bias, down_bias), strict=True):
        projection.weight = nn.Parameter(weight.contiguous().clone(), requires_grad=False)
        projection.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
    return cls({"up": kinds[0], "down": kinds[1]}, act, threshold, predictor, mode, backend, rule, keep)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_prefill_equals_decoding_and_dense_drops_the_mask(rule: str, conv1d: bool) -> None:
    arguments = plain_arguments(3, torch.float32, rule, biases=rule != "relu2")
    ffn = module(arguments, conv1d)
    assert all(weight.is_contiguous() and weight.shape == (193, 65) for weight in ffn.weights)
    x = torch.randn(20, 65)
    together = ffn(x)
    kept = ffn.counts[2].item()
    torch.testing.assert_close(together, torch.cat([ffn(row[None]) for row in x]), rtol=1e-4, atol=1e-5)
    assert ffn.counts.tolist() == [40, 40 * 193, 2 * kept]
    dense = ffn.set_mode("dense")(x)
    if rule in naive.SUBSTITUTES:
        assert torch.equal(dense, together)
    else:
        _, up, down, *_, up_bias, down_bias = arguments
        stock = functional.gelu(functional.linear(x, up, up_bias), approximate="tanh")
        torch.testing.assert_close(dense, functional.linear(stock, down.T, down_bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", PREDICTABLE)
def test_predicted_selects(rule: str) -> None:
    arguments = plain_arguments(3, torch.float32, rule, family="lowbit_up")
    ffn = module(arguments, mode="predicted")
    y, counts = naive.plain_ffn(*arguments)
    torch.testing.assert_close(ffn(arguments[0]), y, rtol=1e-4, atol=1e-5)
    assert ffn.counts.tolist() == [3, *counts.sum(0).tolist()]


def test_to_dtype_moves_weights_and_keeps_the_state() -> None:
    ffn = module(plain_arguments(1, torch.float32, family="lowrank"), mode="predicted")
    holder = nn.ModuleList([ffn, ffn.passed_on]).to(torch.bfloat16)
    assert ffn.threshold.dtype == torch.float32
    assert [weight.dtype for weight in ffn.weights] == [torch.bfloat16] * 2
    assert all(weight.is_contiguous() for weight in ffn.weights)
    assert holder[0](torch.randn(2, 65, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused() -> None:
    arguments = plain_arguments(1, torch.float32)
    with pytest.raises(ValueError, match="not the projections of one plain FFN"):
        SparsePlainFFN(
            {"up": nn.Linear(65, 193), "down": nn.Linear(192, 65)}, *arguments[4:5], arguments[3], [], "rule"
        )
    arguments[6] = "drelu"
    with pytest.raises(ValueError, match="rule 'drelu' has no op in a plain FFN"):
        module(arguments)
    arguments = plain_arguments(1, torch.float32, "relu2")
    with pytest.raises(ValueError, match="rule 'relu2' has no triton op yet"):
        module(arguments, backend="triton")
    from predictors import random_predictor

    arguments = plain_arguments(1, torch.float32)
    arguments[5] = random_predictor("lowbit", *ODD)
    with pytest.raises(ValueError, match="copies of gate and up, and this FFN has no gate"):
        module(arguments)


def test_blocks_without_kernels_stay_whole(checkpoint: Factory, caplog: pytest.LogCaptureFixture) -> None:
    stock, blocks, field = model_of("gpt_neox")
    old = [{name: value for name, value in block.items() if name != "act"} for block in blocks]
    with caplog.at_level(logging.WARNING):
        model = from_pretrained(checkpoint(stock, blocks=old, field=field, threshold=0.0, family=None), mode="rule")
    assert "the checkpoint does not name its activation module" in caplog.text
    assert not any(isinstance(part, SparseFFN) for part in model.modules())


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("only", ["", "up", "down"])
def test_assigned_weights_lie_as_copied_ones_do(conv1d: bool, only: str) -> None:
    arguments, x = plain_arguments(2, torch.float32), torch.randn(2, 65)
    outputs = []
    for assign in (False, True):
        ffn = module(arguments, conv1d)
        places = nn.ModuleDict({"up": ffn, "down": ffn.passed_on})
        g = torch.Generator().manual_seed(0)
        state = {name: torch.randn(value.shape, generator=g) for name, value in places.state_dict().items()}
        places.load_state_dict({name: state[name] for name in state if only in name}, strict=False, assign=assign)
        assert all(weight.is_contiguous() for weight in ffn.weights)
        outputs.append(ffn(x))
    assert torch.equal(*outputs)
