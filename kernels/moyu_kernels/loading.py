"""Loads a sparse checkpoint (docs/checkpoint-format.md) into its stock transformers model."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoint import STATE, current, predictor_names, read_config, read_heads, read_manifest, tensor_of
from .compensation import ATTRIBUTE, Compensated, Compensation, compensations
from .compensation import FILE as COMPENSATION
from .dispatch import DISPATCH, start_dispatch
from .ffn import found_ffn, install_ffn, simulated_because, sparse_ffn
from .heads import HeadRouters, install_heads
from .inputs import SparseLinear
from .modules import check_mode, resolve_backend
from .prompt import PromptState, watch_sequences
from .prompt_ffn import PromptFFN
from .reading import CheckpointError, reading
from .rules import Rule, simulate

logger = logging.getLogger(__name__)

WEIGHTS = ("stored", "int8")
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")  # of accelerate


def from_pretrained(
    folder: str | Path,
    dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    mode: str = "predicted",
    weights: str | None = None,
    dispatch: str = "off",
    device_map: Any = None,
) -> Any:
    """Load a sparse checkpoint for inference.

    Args:
        folder: a complete sparse checkpoint.
        dtype: of the model's weights, or its name; default what is stored. Thresholds and predictors keep theirs.
        backend: "auto", "cpu", "triton" or "reference".
        mode: "predicted", "rule" or "dense"; without a predictor in the checkpoint, or with one that no op computes,
            "predicted" becomes "rule" for the FFN, with a warning. Attention heads are predicted where the checkpoint
            has routers for them; in the other modes all run.
        weights: of the FFN blocks: "stored" decodes them in `dtype`, "int8" rounds them here, after `dtype`, to int8
            with a scale a row (`Int8Rows`); default what the checkpoint was calibrated for.
        dispatch: "measure" times on this machine, once, up to which density predictors pay, and blocks of which more is
            selected decode in mode "rule", with a warning: at batch 1, and for a `Runner` at its batch
            (`dispatch.choose`). "off" leaves all in `mode`.
        device_map: of transformers, such as "auto", "cuda" or `{"": 0}`: where the weights go, and with them thresholds
            and predictors; the backend "auto" is that of the device of each block. Default the CPU.

    Returns: the stock transformers model, in eval mode and without gradients, its gated FFN blocks replaced by
        `SparseGatedFFN`, and of plain ones the projections by `SparsePlainFFN`. Other blocks keep their dense module
        under the rule's mask. With routers of heads, attention is `attn_implementation="moyu"`. The config carries the
        marker, so that stock transformers refuses what `save_pretrained` writes.

    Raises: CheckpointError where a file is missing, changed, stale or of another format version, a block has no op
        that takes int8 weights, or `device_map` leaves weights on the disk; ValueError for an argument that is not one
        of these, names a device that is not here, or for a `dispatch` that has nothing to choose from.
    """
    _check_arguments(dtype, backend, mode, weights, dispatch, device_map)
    with reading(folder):
        model = _from_pretrained(Path(folder), dtype, backend, mode, weights, device_map)
    if dispatch == "measure":
        start_dispatch(model)
    return model


def _check_arguments(dtype: Any, backend: str, mode: str, weights: str | None, dispatch: str, device_map: Any) -> None:
    """Raises: ValueError, before anything is read, which would be taken for damage."""
    check_mode(mode)
    resolve_backend(backend, torch.device("cpu"))
    if dispatch not in DISPATCH:
        raise ValueError(f"dispatch {dispatch!r} is unknown; use one of {', '.join(DISPATCH)}")
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"weights {weights!r} are unknown; use one of {', '.join(WEIGHTS)}")
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype not in (None, "auto") and not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise ValueError(
            f"dtype {dtype!r} is none of floating point; use torch.bfloat16, torch.float16 or torch.float32"
        )
    places = set(device_map.values()) - {"disk"} if isinstance(device_map, dict) else {device_map} - {None, *PLACEMENTS}
    for place in places:
        try:
            torch.empty(0, device=place)
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device_map {device_map!r} names {place!r}, which is no device here: {reason}") from error


def _from_pretrained(
    folder: Path, dtype: torch.dtype | str | None, backend: str, mode: str, weights: str | None, device_map: Any
) -> Any:
    manifest = read_manifest(folder)
    raw, block_list, settings = read_config(folder)
    weights = settings.get("weights", "stored") if weights is None else weights
    if weights not in WEIGHTS:
        raise CheckpointError(f"{folder}: weights {weights!r} are unknown; known: {', '.join(WEIGHTS)}")
    state = current(load_file(folder / STATE))
    names = predictor_names(folder, settings, manifest)
    heads, of_heads = read_heads(folder, settings, manifest, state), mode
    masks_from_prompt = bool(settings.get("formula", {}).get("prompt"))
    if mode == "predicted" and not names and masks_from_prompt:
        mode = "rule"
    elif mode == "predicted" and not names:
        found = settings["predictor"]
        what = f"a simulated predictor ({found['family']}, which no op computes)" if found else "no predictor"
        logger.warning("moyu: %s has %s: mode 'rule' is used, which reads every gate row at least", folder, what)
        mode = "rule"
    model, marker = _load_stock(folder, settings, dtype, device_map)
    states: list[PromptState] = []
    added: list[Any] = [None] * len(block_list)
    if settings.get("compensation"):
        if COMPENSATION not in manifest["files"]:
            raise CheckpointError(f"{folder}: the manifest does not list {COMPENSATION}; export the checkpoint again")
        added = compensations(folder, [block["hidden"] for block in block_list])
    for index, block in enumerate(block_list):
        threshold = tensor_of(folder, state, f"blocks.{index}.threshold")
        predictor = [tensor_of(folder, state, f"blocks.{index}.predictor.{name}") for name in names]
        rule = Rule(threshold, **settings.get("formula", {}))
        watching = _install(folder, model, block, settings["activation"], rule, predictor, mode, backend, weights)
        if added[index] is not None:
            _compensate(model, block, added[index], mode)
        states += [watching] if watching else []
    if states:
        watch_sequences(model, states)
    if mode != "dense":
        _install_inputs(folder, model, settings.get("inputs") or {"paths": []}, state, mode, backend)
    if heads:
        _install_heads(model, heads, of_heads, backend)
    setattr(config_owner(model.config, settings["activation_field"]), settings["activation_field"], marker)
    model.config.architectures = raw["architectures"]
    return model.eval().requires_grad_(False)


def config_owner(config: Any, field: str) -> Any:
    """The config object that holds the field: the config itself, or the text part of a multimodal one."""
    return config if field in config.to_dict() else config.get_text_config()


def _load_stock(
    folder: Path, settings: dict[str, Any], dtype: torch.dtype | str | None, device_map: Any
) -> tuple[Any, str]:
    """The dense model from its stock class, and the marker that its config held."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    owner, field = config_owner(config, settings["activation_field"]), settings["activation_field"]
    marker = getattr(owner, field)
    setattr(owner, field, settings["activation"])
    name = settings["architectures"][0]
    config.architectures = [name]
    cls = getattr(transformers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise CheckpointError(
            f"{folder} needs {name}, which transformers {transformers.__version__} does not have; install one that does"
        )
    loader: Any = cls
    model, info = loader.from_pretrained(
        folder, config=config, dtype=dtype or "auto", device_map=device_map, output_loading_info=True
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise CheckpointError(
            f"{folder}: the weight files lack {sorted(info['missing_keys'])} and do not fit "
            f"{sorted(info['mismatched_keys'])}; export the checkpoint again"
        )
    if offloaded := [name for name, weight in model.named_parameters() if weight.is_meta]:
        raise CheckpointError(
            f"{folder}: device_map {device_map!r} leaves {len(offloaded)} weights ({offloaded[0]}, …) out of memory, "
            "where no kernel can read their rows; name devices that hold the whole model"
        )
    return model, marker


def _install(
    folder: Path,
    model: nn.Module,
    block: dict[str, Any],
    act_name: str,
    rule: Rule,
    predictor: list[Tensor],
    mode: str,
    backend: str,
    weights: str,
) -> PromptState | None:
    """Put the block in place. Returns: what watches sequences for it, under a rule that keeps by their first tokens."""
    path, layout = block["path"], block["layout"]
    try:
        module: Any = model.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(f"{folder}: the config names the block {path}, which the model lacks: {error}") from error
    backend = resolve_backend(backend, next(module.parameters()).device)
    reason = simulated_because(module, block, act_name, rule, backend)
    if weights == "int8" and reason:
        raise CheckpointError(
            f"{folder}: {path} cannot have int8 weights, since {reason}; load it with weights='stored'"
        )
    if not reason:
        ffn = sparse_ffn(module, block, act_name, rule, predictor, mode, backend, weights)
        install_ffn(model, block, ffn)
        return ffn.state if isinstance(ffn, PromptFFN) else None
    names = {"act": block.get("act", ""), "up": block["up"], "down": block["down"]}
    if mode == "dense":
        if rule.substitutes:
            simulate(module, names, layout, rule, masked=False)
        return None
    logger.warning("moyu: %s is simulated: mask after a dense matmul, nothing is skipped, since %s", path, reason)
    state = PromptState(rule.prompt) if rule.prompt else None
    simulate(module, names, layout, rule, masked=True, state=state)
    return state


def _compensate(model: Any, block: dict[str, Any], compensation: Compensation, mode: str) -> None:
    """Put a compensation on the block, by its sparse module or, under a simulated rule, beside it."""
    module: Any = model.get_submodule(block["path"])
    ffn = found_ffn(model, block["path"], block["up"])
    device = ffn.threshold.device if ffn else next(module.parameters()).device  # int8 rows are no parameters
    compensation = compensation.to(device, model.dtype)
    if ffn:
        ffn.compensation = compensation
    elif mode != "dense":
        setattr(module, ATTRIBUTE, compensation)
        Compensated(module, block["gate"] or block["up"], block["down"])


def _install_inputs(
    folder: Path, model: nn.Module, inputs: dict[str, Any], state: dict[str, Tensor], mode: str, backend: str
) -> None:
    """Sparse inputs of other linear layers: by the op, else masked before a dense matmul."""
    simulated: dict[str, int] = {}
    for index, path in enumerate(inputs["paths"]):
        rule = Rule(tensor_of(folder, state, f"inputs.{index}.threshold"), **inputs["formula"])
        if inputs.get("centred"):
            rule.centre = tensor_of(folder, state, f"inputs.{index}.centre")
        parent, _, name = path.rpartition(".")
        try:
            owner, layer = model.get_submodule(parent), model.get_submodule(path)
        except AttributeError as error:
            raise CheckpointError(f"{folder}: the config names {path}, which the model lacks: {error}") from error
        chosen = resolve_backend(backend, next(layer.parameters()).device)
        if reason := _inputs_simulated_because(layer, rule, chosen):
            simulated[reason] = simulated.get(reason, 0) + 1
            simulate(owner, {"act": "", "up": "", "down": name}, "linear", rule, masked=True)
        else:
            setattr(owner, name, SparseLinear(cast(nn.Linear, layer), rule.threshold, mode, chosen, rule.centre))
    for reason, count in simulated.items():
        logger.warning(
            "moyu: the inputs of %d linear layers are simulated: masked, nothing is skipped, since %s", count, reason
        )


def _install_heads(model: Any, heads: HeadRouters, mode: str, backend: str) -> None:
    """Heads by their routers: by the op, else by the reference."""
    chosen = resolve_backend(backend, next(model.parameters()).device)
    if chosen == "triton":
        logger.warning("moyu: attention heads are simulated: masked, nothing is skipped, since they have no triton op")
        chosen = "reference"
    install_heads(model, heads, mode, chosen)


def _inputs_simulated_because(layer: nn.Module, rule: Rule, backend: str) -> str:
    """Why no op computes a linear layer on its kept inputs; empty where one does."""
    if type(layer) is not nn.Linear:
        return f"{type(layer).__name__} has no op"
    if rule.op != "threshold":
        return f"rule {rule.describe()} has no op for the backend {backend!r}"
    return ""
