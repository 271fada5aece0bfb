"""Blocks are found by structure, in every layout; masks act at the seam and can be undone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import CONFIGS, tiny_model
from torch import nn
from transformers import BloomConfig

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import find_blocks
from moyu_train.models.marker import activation_field, base_activation, check_marker, clear_marker, set_marker
from moyu_train.models.masking import Masking

LAYOUTS = {"llama": "gated", "phi3": "fused", "gpt2": "plain", "opt": "plain", "mixtral": "experts"}
IDS = torch.arange(12)[None]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_layout_is_found(family: str) -> None:
    blocks = find_blocks(tiny_model(family))
    assert [block.layout for block in blocks] == [LAYOUTS[family]] * 2
    assert all(block.hidden == 32 for block in blocks)
    assert blocks[0].down_norms().shape[-1] == blocks[0].neurons


@pytest.mark.parametrize("family", CONFIGS)
def test_masking_everything_is_an_ffn_of_zero_and_can_be_undone(family: str) -> None:
    model = tiny_model(family)
    blocks = find_blocks(model)
    dense = model(IDS).logits
    seen = []

    def nothing(layer: int, a: torch.Tensor, expert: int | None) -> torch.Tensor:
        seen.append(a.shape[-1])
        return torch.zeros_like(a, dtype=torch.bool)

    with Masking(blocks, nothing):
        masked = model(IDS).logits
        with torch.no_grad():
            for block in blocks:
                block.weights()[-1].zero_()  # a down projection of zero must change nothing more
        torch.testing.assert_close(model(IDS).logits, masked)
    assert set(seen) == {blocks[0].neurons}
    assert not torch.allclose(dense, masked, atol=1e-3)
    torch.testing.assert_close(tiny_model(family)(IDS).logits, dense)


@pytest.mark.parametrize("family", CONFIGS)
def test_keeping_all_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    dense = model(IDS).logits
    with Masking(find_blocks(model), lambda layer, a, expert: torch.ones_like(a, dtype=torch.bool)):
        torch.testing.assert_close(model(IDS).logits, dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(IDS).logits, dense, rtol=0, atol=0)


def test_unknown_layout_says_what_was_looked_at() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(8, 4), "c": nn.Identity()})

    with pytest.raises(MoyuError, match=r"found in Odd: .* gate_proj/up_proj/down_proj") as error:
        find_blocks(Odd())
    assert "\n  inner.a.weight [8, 4] x 1\n" in str(error.value)
    assert "blocks:\n  - path: inner\n    up: a\n    down: b\n    act: c" in str(error.value)


def test_blocks_are_found_behind_lora() -> None:
    model = tiny_model()
    plain = [block.path for block in find_blocks(model)]
    wrapped = get_peft_model(model, LoraConfig(target_modules=["gate_proj", "down_proj"], r=2))
    blocks = find_blocks(wrapped)
    assert [block.path.removeprefix("base_model.model.") for block in blocks] == plain
    assert blocks[0].weights()[0].shape == (96, 32)


@pytest.mark.parametrize("family", CONFIGS)
def test_marker_goes_on_once_and_off(family: str) -> None:
    config = CONFIGS[family].__class__.from_dict(CONFIGS[family].to_dict())
    base = getattr(config, activation_field(config))
    set_marker(config, "threshold")
    set_marker(config, "threshold")
    assert getattr(config, activation_field(config)).startswith(f"moyu:threshold:{base} ")
    assert base_activation(config) == base
    clear_marker(config)
    assert getattr(config, activation_field(config)) == base


def test_a_family_without_an_activation_field_is_refused() -> None:
    class Config:
        pass

    with pytest.raises(MoyuError, match="no activation field"):
        activation_field(Config())


def test_a_field_that_stock_code_does_not_read_is_refused() -> None:
    config = BloomConfig(hidden_size=32, n_layer=1, n_head=2, hidden_act="gelu")  # Bloom's activation is fixed
    with pytest.raises(MoyuError, match="stock code does not read 'hidden_act' of BloomConfig"):
        check_marker(config)


def test_experts_keep_a_gate_of_their_own() -> None:
    model = tiny_model("mixtral")
    model.set_experts_implementation("batched_mm")  # asks `_apply_gate`, as our loop does
    unclamped = model(IDS).logits
    for block in find_blocks(model):
        experts = block.module

        def gated(x: torch.Tensor, act: nn.Module = experts.act_fn) -> torch.Tensor:
            gate, up = x.chunk(2, dim=-1)
            return act(gate.clamp(max=0.1)) * up.clamp(-0.1, 0.1)

        experts._apply_gate = gated
    clamped = model(IDS).logits
    assert not torch.allclose(clamped, unclamped, atol=1e-3)
    with Masking(find_blocks(model), lambda layer, a, expert: None):
        torch.testing.assert_close(model(IDS).logits, clamped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flag", ["has_bias", "is_transposed", "has_post_expert_norm"])
def test_experts_that_the_loop_would_not_compute_are_no_blocks(flag: str) -> None:
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        setattr(layer.mlp.experts, flag, True)
    with pytest.raises(MoyuError, match=r"Not quite: model\.layers\.0\.mlp\.experts: MixtralExperts: experts with"):
        find_blocks(model)
