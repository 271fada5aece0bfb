from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from moyu_kernels import Runner, from_pretrained
from moyu_kernels.dense import Linear
from moyu_kernels.modules import set_mode
from moyu_kernels.seam import ExpertsSeam
from sparse_checkpoints import tiny_llama
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, MixtralConfig, MixtralForCausalLM

Factory = Callable[..., Path]


def prompt(length: int, batch: int = 1) -> Tensor:
    return torch.randint(128, (batch, length), generator=torch.Generator().manual_seed(1))


def decode(runner: Runner, ids: Tensor, start: int) -> list[Tensor]:
    """Logits of each position from the prompt's last on, the ids forced."""
    found = [runner.prefill(ids[:, :start])]
    return found + [runner.step(ids[:, i : i + 1]) for i in range(start, ids.shape[1])]


@torch.no_grad()
@pytest.mark.parametrize("sparse", [False, True])
def test_step_logits_equal_the_forward(checkpoint: Factory, sparse: bool) -> None:
    stock = tiny_llama(torch.float32)
    model = from_pretrained(checkpoint(stock, threshold=0.2), mode="rule") if sparse else stock
    ids = prompt(20)
    expected = model(ids).logits
    runner = Runner(model, max_length=20, compile=not sparse)
    for _ in range(2):
        found = decode(runner, ids, 12)
        torch.testing.assert_close(torch.cat(found), expected[0, 11:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_predicted_steps_and_rule_prefill(checkpoint: Factory) -> None:
    folder = checkpoint(tiny_llama(torch.float32), threshold=0.1)
    model = from_pretrained(folder)
    ids = prompt(7)
    runner = Runner(model, max_length=8)
    assert model.model.layers[0].mlp.counts.tolist() == [0, 0, 0]
    first = runner.prefill(ids[:, :5])
    assert model.model.layers[0].mlp.counts[:2].tolist() == [5, 5 * 192]
    steps = [runner.step(ids[:, 5:6]), runner.step(ids[:, 6:])]
    selected = model.model.layers[0].mlp.counts[1].item() - 5 * 192
    assert 0 < selected < 2 * 192
    eager = Runner(from_pretrained(folder, backend="reference"), max_length=8, compile=False)
    expected = decode(eager, ids, 5)
    torch.testing.assert_close([first, *steps], expected, rtol=1e-4, atol=1e-4)
    set_mode(model, "dense")
    assert not torch.allclose(decode(runner, ids, 5)[-1], expected[-1], atol=1e-3)


SMALL = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 2, "vocab_size": 128}


@torch.no_grad()
def test_sliding_windows_compiled() -> None:
    """Two masks, and a window shorter than the text: neither shared regions nor transformers' own cache would do."""
    config = Gemma2Config(**SMALL, num_hidden_layers=2, num_key_value_heads=1, head_dim=16, sliding_window=8)
    model, ids = Gemma2ForCausalLM(config).eval(), prompt(14)
    expected = model(ids).logits
    found = decode(Runner(model, max_length=14), ids, 6)
    torch.testing.assert_close(torch.cat(found), expected[0, 5:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_does_not_compile_runs_eagerly_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = MixtralConfig(**SMALL, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=4)
    model, ids = MixtralForCausalLM(config).eval(), prompt(9)
    for layer in model.model.layers:
        ExpertsSeam(layer.mlp.experts, lambda a, expert: a)
    expected = model(ids).logits
    found = decode(Runner(model, max_length=9), ids, 6)
    torch.testing.assert_close(torch.cat(found), expected[0, 5:], rtol=1e-4, atol=1e-4)
    assert caplog.text.count("does not compile, decoding runs eagerly") == 1


@torch.no_grad()
def test_batch_equals_single_sequences() -> None:
    model, ids = tiny_llama(torch.float32), prompt(9, batch=3)
    together = decode(Runner(model, max_length=9, batch=3, compile=False), ids, 6)
    runner = Runner(model, max_length=9, compile=False)
    for row in range(3):
        alone = decode(runner, ids[row : row + 1], 6)
        torch.testing.assert_close([logits[row : row + 1] for logits in together], alone, rtol=1e-4, atol=1e-4)


def test_generate() -> None:
    model, ids = tiny_llama(torch.float32), prompt(6)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 6:].tolist()
    runner = Runner(model, max_length=16, compile=False)
    assert list(runner.generate(ids, 8)) == expected
    assert list(runner.generate(ids, 8, eos=expected[2])) == expected[: expected.index(expected[2]) + 1]
    draws = [
        list(runner.generate(ids, 8, temperature=1.5, top_p=0.9, generator=torch.Generator().manual_seed(seed)))
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert list(runner.generate(ids, 8, temperature=1.0, top_p=1e-6)) == expected


def test_close_restores_the_model() -> None:
    model = tiny_llama()
    runner = Runner(model, max_length=4, compile=False)
    assert any(isinstance(module, Linear) for module in model.modules())
    assert model.config._attn_implementation == "moyu"
    runner.close()
    assert not any(isinstance(module, Linear) for module in model.modules())
    assert type(model.lm_head) is nn.Linear
    assert model.config._attn_implementation == "sdpa"


def test_limits_are_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="batch is 9"):
        Runner(model, max_length=4, batch=9)
    runner = Runner(model, max_length=4, compile=False)
    with pytest.raises(ValueError, match="5 tokens do not fit max_length=4"):
        runner.prefill(prompt(5))
    runner.prefill(prompt(4))
    with pytest.raises(ValueError, match="5 tokens do not fit"):
        runner.step(1)
    with pytest.raises(ValueError, match=r"shape \[2, 3\]"):
        runner.prefill(prompt(3, batch=2))


@torch.no_grad()
def test_a_step_that_fails_leaves_the_runner_where_it_stood() -> None:
    model, ids = tiny_llama(torch.float32), prompt(8)
    runner = Runner(model, max_length=9, compile=False)
    expected = decode(runner, ids, 5)
    runner.prefill(ids[:, :5])

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    for turn in range(5, 8):
        hook = model.model.layers[-1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):  # after the layers have written to their caches
            runner.step(ids[:, turn : turn + 1])
        hook.remove()
        assert runner.position == turn
        assert torch.equal(runner.step(ids[:, turn : turn + 1]), expected[turn - 4])
    hook = model.model.layers[-1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        runner.prefill(ids)
    assert runner.position == 0


def test_tokens_are_whole_numbers() -> None:
    runner = Runner(tiny_llama(), max_length=4, compile=False)
    with pytest.raises(ValueError, match="token ids are whole numbers"):
        runner.step(torch.tensor([[1.5]]))
