import pytest
import torch
from moyu_kernels.seam import Seam
from peft import LoraConfig, get_peft_model
from sparse_checkpoints import tiny_llama
from torch import Tensor


def mask(a: Tensor) -> Tensor:
    return torch.where(a.abs() >= 0.3, a, 0.0)


def test_masks_and_undoes() -> None:
    model = tiny_llama(torch.float32)
    block, ids = model.model.layers[0].mlp, torch.randint(128, (1, 6))
    plain, forward = model(ids).logits, type(block).forward
    seam = Seam(block, "down_proj", mask)
    masked = model(ids).logits
    assert not torch.allclose(masked, plain)
    assert type(block).forward is forward
    seam.remove()
    assert torch.equal(model(ids).logits, plain)
    assert not block._forward_pre_hooks
    assert not block.down_proj._forward_pre_hooks


@pytest.mark.parametrize("seam_first", [True, False])
def test_lora_merged_equals_unmerged(seam_first: bool) -> None:
    model, ids = tiny_llama(torch.float32), torch.randint(128, (1, 6))
    blocks = [layer.mlp for layer in model.model.layers]
    config = LoraConfig(r=4, target_modules=["down_proj", "up_proj"], init_lora_weights=False)
    if seam_first:
        seams = [Seam(block, "down_proj", mask) for block in blocks]
    wrapped = get_peft_model(model, config).eval()
    if not seam_first:
        seams = [Seam(block, "down_proj", mask) for block in blocks]
    unmerged = wrapped(ids).logits
    merged_model = wrapped.merge_and_unload()
    torch.testing.assert_close(merged_model(ids).logits, unmerged, rtol=1e-4, atol=1e-4)
    for seam in seams:
        seam.remove()
    assert not torch.allclose(merged_model(ids).logits, unmerged, atol=1e-2)
