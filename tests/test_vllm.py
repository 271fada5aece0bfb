"""The vLLM plugin: its masks on a transformers model without vLLM, and where vLLM is installed, vLLM itself."""

import copy
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import moyu_kernels
import pytest
import torch
from in_vllm import ENVIRONMENT
from moyu_kernels.checkpoint import CheckpointError
from moyu_kernels.vllm_plugin import MODEL, put_activations, put_masks, read_blocks, register
from test_rules import METHODS, PROMPT, calibrated
from tiny import COMMON, randomised, tiny_model, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from moyu_train.checkpoints.export import export

HERE = Path(__file__).parent
IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
GATES = tuple(name for name in METHODS if name not in PROMPT)
LAYOUTS = [("llama", name) for name in GATES] + [
    ("phi3", "threshold"),
    ("phi3", "fatrelu"),
    ("gpt2", "topk"),
    ("opt", "relu2"),
]
PLUGIN = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]


def exported(folder: Path, family: str, method: str, model: Any = None, **options: Any) -> Path:
    model = model or tiny_model(family)
    export(model, tokenizer(), folder, method, calibrated(method, model).rules, None, None, **options)
    return folder


def as_in_vllm(folder: Path) -> Any:
    """The stock model with what the plugin puts on vLLM's."""
    config = AutoConfig.from_pretrained(folder)
    blocks = read_blocks(folder, config)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config)
    put_activations(model.base_model, blocks)
    put_masks(model.base_model, blocks)
    return model.eval()


@pytest.mark.parametrize(("family", "method"), LAYOUTS)
def test_masks_are_the_exact_rule(tmp_path: Path, family: str, method: str) -> None:
    folder = exported(tmp_path / "sparse", family, method)
    with torch.no_grad():
        found = as_in_vllm(folder)(IDS).logits
        wanted = moyu_kernels.from_pretrained(folder, mode="rule", backend="reference")(IDS).logits
        dense = tiny_model(family)(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - dense).norm() / dense.norm() > 0.01, "the rule does nothing"


@pytest.mark.parametrize("method", ["topk", "drelu", "statistical_topk"])
def test_masks_compile_into_one_graph(tmp_path: Path, method: str) -> None:
    model = as_in_vllm(exported(tmp_path / "sparse", "llama", method))
    with torch.no_grad():
        compiled = torch.compile(model.base_model.layers[0].mlp, backend="eager", fullgraph=True)
        x = torch.randn(1, 9, 32)
        torch.testing.assert_close(compiled(x), model.base_model.layers[0].mlp(x))


@pytest.mark.parametrize(
    ("family", "method", "options", "reason"),
    [
        ("llama", "griffin", {}, "masks come from the prompt"),
        ("mixtral", "threshold", {}, "mixture of experts"),
        ("llama", "threshold", {"weights": "int8"}, "FFN weights are 'int8'"),
    ],
)
def test_what_vllm_cannot_run_is_refused(
    tmp_path: Path, family: str, method: str, options: dict[str, Any], reason: str
) -> None:
    folder = exported(tmp_path / "sparse", family, method, **options)
    with pytest.raises(CheckpointError, match=f"cannot run in vLLM: .*{reason}"):
        read_blocks(folder, AutoConfig.from_pretrained(folder))


def test_sparse_inputs_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    rules = calibrated("threshold", model).rules
    inputs = {"model.layers.0.self_attn.q_proj": copy.deepcopy(rules[0])}
    inputs["model.layers.0.self_attn.q_proj"].threshold = torch.full((32,), 0.1)
    export(model, tokenizer(), tmp_path / "sparse", "threshold", rules, None, None, inputs=inputs)
    with pytest.raises(CheckpointError, match="it has sparse inputs"):
        read_blocks(tmp_path / "sparse", AutoConfig.from_pretrained(tmp_path / "sparse"))


def test_a_hub_id_and_a_damaged_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder; download"):
        read_blocks("someone/model", LlamaConfig())
    folder = exported(tmp_path / "sparse", "llama", "threshold")
    config = AutoConfig.from_pretrained(folder)
    (folder / "moyu/state.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="changed or damaged"):
        read_blocks(folder, config)


def test_the_entry_point_registers_every_causal_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = PLUGIN["moyu"].split(":")
    assert getattr(importlib.import_module(module), name) is register
    seen: dict[str, str] = {}
    monkeypatch.setitem(
        sys.modules, "vllm", SimpleNamespace(ModelRegistry=SimpleNamespace(register_model=seen.__setitem__))
    )
    register()
    assert seen["MoyuLlamaForCausalLM"] == MODEL
    assert seen.keys() >= {f"Moyu{type(tiny_model(family)).__name__}" for family in ("phi3", "gpt2", "opt", "mixtral")}
    module, name = MODEL.split(":")
    assert f"class {name}(" in Path(HERE.parent, "kernels", *module.split(".")).with_suffix(".py").read_text()


# What follows runs vLLM itself.


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process that finds the plugin as an installed moyu would give it."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    site = tmp_path_factory.mktemp("site")
    info = site / "moyu-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moyu\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\nmoyu = {PLUGIN['moyu']}\n")
    path = [str(site), str(HERE.parent / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "VLLM_CACHE_ROOT": str(site / "cache")}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(  # heads as large as vLLM's attention takes them
        **COMMON,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
    )
    return exported(tmp_path_factory.mktemp("vllm") / "sparse", "", "threshold", randomised(config))


def python(environment: dict[str, str], *arguments: str, cwd: Path = HERE) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=900, check=False)


def require_device() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() and not torch.cuda.is_available():
        pytest.skip("this build of vLLM has no device here")


CONFIGURE = """
import sys
from vllm.config import ModelConfig
from vllm.plugins import load_general_plugins
load_general_plugins()
config = ModelConfig(model=sys.argv[1])
print("built by", config.registry.resolve_model_cls(config.architectures, config)[0].__name__)
"""


def test_vllm_finds_the_class_of_a_sparse_checkpoint(plugin: dict[str, str], sparse: Path) -> None:
    done = python(plugin, "-c", CONFIGURE, str(sparse))
    assert "built by MoyuForCausalLM" in done.stdout, done.stderr


def test_vllm_without_the_plugin_refuses(plugin: dict[str, str], sparse: Path) -> None:
    done = python(plugin | {"VLLM_PLUGINS": ""}, "-c", CONFIGURE, str(sparse))
    assert done.returncode
    assert "['MoyuLlamaForCausalLM'] are not supported" in done.stderr


def test_vllm_answers_as_the_rule_does(plugin: dict[str, str], sparse: Path) -> None:
    require_device()
    done = python(plugin, str(HERE / "in_vllm.py"), str(sparse))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["class"] == "MoyuForCausalLM"
    model = moyu_kernels.from_pretrained(sparse, mode="rule", backend="reference")
    for ids, logprobs in found["answers"]:
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        wanted = wanted.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("world_size", "quantisation", "lora", "named"),
    [(2, None, None, "tensor_parallel_size"), (1, "fp8", None, "quantization 'fp8'"), (1, None, {}, "enable_lora")],
)
def test_what_would_lose_the_masks_is_refused(world_size: int, quantisation: Any, lora: Any, named: str) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from moyu_kernels.vllm_model import MoyuForCausalLM

    config = SimpleNamespace(
        model_config=SimpleNamespace(model="folder", quantization=quantisation),
        parallel_config=SimpleNamespace(world_size=world_size),
        quant_config=quantisation,
        lora_config=lora,
    )
    with pytest.raises(CheckpointError, match=f"without {named}"):
        MoyuForCausalLM(vllm_config=config)


def test_the_block_in_the_docs_runs(plugin: dict[str, str], sparse: Path, tmp_path: Path) -> None:
    require_device()
    shutil.copytree(sparse, tmp_path / "runs/mine/export/checkpoint")
    text = (HERE.parent / "docs" / "engines.md").read_text(encoding="utf-8")
    (tmp_path / "block.py").write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    done = python(plugin | ENVIRONMENT, "block.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
