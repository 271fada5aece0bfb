"""Compiled, replayed steps of every architecture against eager ones."""

import pytest
import torch
from moyu_kernels import Runner
from zoo import CASES


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_steps_equal_eager_ones(name: str) -> None:
    model, ids = CASES[name].model().requires_grad_(False), torch.arange(3, 15)[None]
    found = []
    for compiled in (True, False):
        runner = Runner(model, max_length=12, compile=compiled)
        logits = [runner.prefill(ids[:, :5]), *(runner.step(token) for token in ids[0, 5:])]
        runner.close()
        found.append(torch.cat(logits))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()
