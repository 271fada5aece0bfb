"""Whole models on a GPU: what they decode is what they decode on the CPU, and a step is one CUDA graph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import moyu_kernels
import pytest
import torch
from sparse_checkpoints import tiny_llama
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

IDS = torch.arange(3, 11)[None]
STEPS = 6


def load(folder: Path, **options: Any) -> Any:
    return moyu_kernels.from_pretrained(folder, dtype=torch.float32, **options)


def decode(model: Any, compile: bool, batch: int = 1) -> Tensor:
    """Logits `[STEPS + 1, batch, V]` of a prompt and of forced tokens after it."""
    runner = moyu_kernels.Runner(model, max_length=32, batch=batch, compile=compile)
    ids = IDS.expand(batch, -1) + torch.arange(batch)[:, None]
    logits = [runner.prefill(ids)] + [runner.step(ids[:, i : i + 1]) for i in range(STEPS)]
    runner.close()
    return torch.stack([step.float().cpu() for step in logits])


@pytest.mark.parametrize("mode", ["predicted", "rule", "dense"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_gpu_decodes_what_the_cpu_decodes(checkpoint: Callable[..., Path], mode: str, batch: int) -> None:
    folder = checkpoint()
    expected = decode(load(folder, mode=mode), compile=False, batch=batch)
    for compile in (False, True):
        model = load(folder, mode=mode, device_map="cuda")
        assert all(block.backend == "triton" for block in model.modules() if isinstance(block, moyu_kernels.SparseFFN))
        torch.testing.assert_close(decode(model, compile, batch), expected, rtol=1e-4, atol=1e-5)


def test_a_step_is_one_cuda_graph(checkpoint: Callable[..., Path]) -> None:
    model = load(checkpoint(), device_map="cuda")
    runner = moyu_kernels.Runner(model, max_length=32)
    runner.prefill(IDS)
    token = IDS[:, :1].cuda()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        runner.step(token)
    launched = [event.key for event in profile.key_averages() if "Launch" in event.key]
    assert "cudaGraphLaunch" in launched
    counts = [block.counts.clone() for block in model.modules() if isinstance(block, moyu_kernels.SparseFFN)]
    runner.step(token)
    for block, before in zip(
        (block for block in model.modules() if isinstance(block, moyu_kernels.SparseFFN)), counts, strict=True
    ):
        assert block.counts[0] == before[0] + 1


def test_a_step_never_waits_for_the_gpu(checkpoint: Callable[..., Path]) -> None:
    model = load(checkpoint(), device_map="cuda")
    runner = moyu_kernels.Runner(model, max_length=32, compile=False)
    runner.prefill(IDS)
    block = next(block for block in model.modules() if isinstance(block, moyu_kernels.SparseFFN))
    x = torch.randn(1, block.hidden, device="cuda")
    block(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        block(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_generate_of_transformers(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    outputs = [
        load(folder, device_map=device).generate(IDS.to(device), max_new_tokens=5, do_sample=False).cpu()
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(*outputs)


def test_two_tokens_of_a_sequence_run_the_ops(checkpoint: Callable[..., Path]) -> None:
    model = load(checkpoint(tiny_llama()), backend="triton", mode="rule", device_map="cuda")
    logits = model(input_ids=IDS[:, :2].cuda(), use_cache=False).logits
    assert logits.isfinite().all()
