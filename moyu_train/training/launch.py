"""Which processes and which engine really run: what the launcher asked for has to be there, or nothing starts."""

import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from moyu_train.errors import MoyuError

ENGINES = ("DEEPSPEED", "FSDP")


def asked_engine() -> str:
    """What the launch configuration asks for beside plain processes: DEEPSPEED, FSDP or nothing."""
    asked = [name for name in ENGINES if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"]
    return asked[0] if asked else ""


def start_processes() -> PartialState:
    """Join the processes of this launch; without a GPU they talk over gloo, which accelerate has to be told twice.

    Raises: MoyuError where a launcher started more processes than accelerate joined (then each would train alone), or
        asked for an engine that accelerate quietly replaces on this machine.
    """
    wanted, asked = int(os.environ.get("WORLD_SIZE", "1")), asked_engine()
    cpu = not torch.cuda.is_available()
    if cpu and asked == "FSDP":
        raise MoyuError(
            "the launch configuration asks for FSDP, and accelerate has none without a GPU; use "
            "accelerate_configs/zero3.yaml or accelerate_configs/cpu.yaml"
        )
    if asked == "DEEPSPEED" and os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        raise MoyuError(
            "the launch configuration asks for DEEPSPEED with use_cpu, which accelerate runs as plain data parallel; "
            "remove use_cpu (ACCELERATE_USE_CPU): without a GPU DeepSpeed uses the CPU by itself"
        )
    if cpu and wanted > 1 and not asked:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    state = PartialState(cpu=cpu and wanted > 1)
    if state.num_processes != wanted:
        raise MoyuError(
            f"the launcher started {wanted} processes and accelerate joined {state.num_processes} "
            f"({state.distributed_type.value}); use one of the files in accelerate_configs/"
        )
    return state


def check_engine(trainer: Any) -> str:
    """Name of the engine that a trainer runs with, with the ZeRO stage.

    Raises: MoyuError where it is not the one that the launch configuration asked for.
    """
    found, asked = trainer.accelerator.distributed_type.value, asked_engine()
    if (found if found in ENGINES else "") != asked:
        raise MoyuError(
            f"the launch configuration asks for {asked or 'no engine'}, and training would run with {found}"
        )
    return f"{found} ZeRO-{trainer.accelerator.state.deepspeed_plugin.zero_stage}" if asked == "DEEPSPEED" else found


def leave_engine() -> None:
    """Make transformers load whole models again, which under ZeRO-3 it would share out as it loads them."""
    if asked_engine() == "DEEPSPEED":
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def whole_parameters(model: Any, only: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Copies on the CPU of a model's parameters, gathered where ZeRO-3 or FSDP2 has shared them out. All ranks call it.

    Args: only: names of the parameters wanted; default all.
    """
    wanted = None if only is None else set(only)
    found = {}
    for name, parameter in model.named_parameters():
        if wanted is not None and name not in wanted:
            continue
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().cpu().clone()
        elif hasattr(parameter, "full_tensor"):
            found[name] = parameter.detach().full_tensor().cpu()
        else:
            found[name] = parameter.detach().cpu().clone()
    return found


def end_processes() -> None:
    """Leave a launch of many processes once all are done.

    An ordinary exit runs the destructors of gloo's threads, which now and then abort (torch 2.13), and the launcher
    would report a finished run as failed.
    """
    state = PartialState()
    if state.num_processes > 1:
        state.wait_for_everyone()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
