"""The model class that vLLM builds for a sparse checkpoint; vllm_plugin.py has what it puts on the model."""

from typing import Any

from vllm.model_executor.models.transformers import TransformersForCausalLM

from .reading import CheckpointError
from .vllm_plugin import put_activations, put_masks, read_blocks


class MoyuForCausalLM(TransformersForCausalLM):
    """A causal LM of vLLM's transformers backend under the exact rule of its sparse checkpoint.

    Raises: CheckpointError for what vLLM cannot run under it, see `read_blocks`, more than one device, quantised
        weights and LoRA, whose layers would not see the masks.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        model = vllm_config.model_config
        unsupported = {
            "tensor_parallel_size and pipeline_parallel_size above 1": vllm_config.parallel_config.world_size > 1,
            f"quantization {model.quantization!r}": vllm_config.quant_config is not None,
            "enable_lora": vllm_config.lora_config is not None,
        }
        if given := [what for what, there in unsupported.items() if there]:
            raise CheckpointError(f"{model.model}: a sparse checkpoint runs in vLLM without {', '.join(given)}")
        sparse = model.hf_config.architectures  # as vLLM goes on calling this class
        self.ruled_blocks, self.masks_are_on = read_blocks(model.model, model.hf_config), False
        device = vllm_config.device_config.device
        for block in self.ruled_blocks:
            block.rule.threshold = block.rule.threshold.to(device)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model.hf_config.architectures = sparse
        if not self.masks_are_on:
            raise CheckpointError(
                f"{model.model}: this vLLM does not call recursive_replace, where the masks go in; use another version"
            )

    def recursive_replace(self) -> None:
        """Between vLLM's building of the stock model and its replacing of modules go the gates, and after it masks."""
        put_activations(self.model, self.ruled_blocks)
        super().recursive_replace()
        put_masks(self.model, self.ruled_blocks)
        self.masks_are_on = True
