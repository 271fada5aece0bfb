"""Which processes really run: what the launcher asked for has to be what accelerate started, or nothing starts."""

import os

import torch
from accelerate import PartialState

from moyu_train.errors import MoyuError


def start_processes() -> PartialState:
    """Join the processes of this launch; without a GPU they talk over gloo, which accelerate has to be told twice.

    Raises: MoyuError where a launcher started more processes than accelerate joined (then each would train alone), or
        asked for an engine that accelerate quietly replaces on this machine.
    """
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if not torch.cuda.is_available():
        for engine in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
            if os.environ.get(engine, "false").lower() == "true":
                raise MoyuError(
                    f"the launch configuration asks for {engine.removeprefix('ACCELERATE_USE_')}, which "
                    "accelerate runs as plain DDP without a GPU; use accelerate_configs/cpu.yaml here"
                )
        if wanted > 1:
            os.environ["ACCELERATE_USE_CPU"] = "true"
    state = PartialState(cpu=not torch.cuda.is_available() and wanted > 1)
    if state.num_processes != wanted:
        raise MoyuError(
            f"the launcher started {wanted} processes and accelerate joined {state.num_processes} "
            f"({state.distributed_type.value}); use one of the files in accelerate_configs/"
        )
    return state
