"""Bandwidth of the device that decodes, which speeds are measured by."""

from collections.abc import Callable

import torch
from moyu_kernels.ops import cpu
from torch import Tensor

BUFFER = 2**28  # int32: 1 GiB
REPEATS = 5  # of a reading on a GPU


def bandwidth_buffer(device: torch.device) -> Tensor:
    return torch.ones(BUFFER, dtype=torch.int32, device=device)


def read_bandwidth(buffer: Tensor) -> float:
    """GB/s at which memory is read: on a GPU the better of summing the buffer up and of copying half of it over the
    other, which counts as much reading and as much writing; on the CPU by the native kernel, on all its threads."""
    if buffer.device.type == "cpu":
        return cpu.read_bandwidth(buffer)
    floats = buffer.view(torch.float32)
    first, second = buffer.chunk(2)
    size = buffer.numel() * buffer.element_size()
    ways: tuple[Callable[[], object], ...] = (floats.sum, lambda: second.copy_(first))
    return size / min(gpu_seconds(way, REPEATS) for way in ways) / 1e9


def gpu_seconds(call: Callable[[], object], repeats: int) -> float:
    """Seconds of a call on the current GPU, the mean of so many after one that warms up."""
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats
