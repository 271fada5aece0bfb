"""Which processes really run: what the launcher asked for has to be what accelerate started, or nothing starts."""

import os
import sys

import torch
from accelerate import PartialState

from moyu_train.errors import MoyuError


def start_processes() -> PartialState:
    """Join the processes of this launch; without a GPU they talk over gloo, which accelerate has to be told twice.

    Raises: MoyuError where a launcher started more processes than accelerate joined (then each would train alone), or
        asked for an engine that accelerate quietly replaces on this machine.
    """
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    for engine in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(engine, "false").lower() == "true":
            raise MoyuError(
                f"the launch configuration asks for {engine.removeprefix('ACCELERATE_USE_')}, whose partitioned "
                "weights the stages cannot save yet (and which accelerate runs as plain DDP without a GPU); use a "
                "configuration without it, such as accelerate_configs/cpu.yaml"
            )
    if not torch.cuda.is_available() and wanted > 1:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    state = PartialState(cpu=not torch.cuda.is_available() and wanted > 1)
    if state.num_processes != wanted:
        raise MoyuError(
            f"the launcher started {wanted} processes and accelerate joined {state.num_processes} "
            f"({state.distributed_type.value}); use one of the files in accelerate_configs/"
        )
    return state


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
