"""Blocks are found by structure, in every layout; masks act at the seam and can be undone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import CONFIGS, tiny_model
from torch import nn

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import find_blocks
from moyu_train.models.marker import activation_field, base_activation, clear_marker, set_marker
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
