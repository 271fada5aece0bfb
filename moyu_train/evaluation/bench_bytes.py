"""Bytes that a decoded token has to read, counted at the dtype in which they are stored."""

from typing import Any

from moyu_kernels.ffn import installed_ffn
from moyu_kernels.heads import HeadQuery
from moyu_kernels.inputs import SparseLinear
from torch import Tensor

from moyu_train.evaluation.inloop import line_bytes, row_bytes
from moyu_train.models.blocks import FFNBlock, ffn_bytes, scale_bytes


def bytes_per_token(model: Any, context: int) -> tuple[int, int]:
    """(weights, keys and values) that a dense batch-1 step reads; an untied input embedding is not read."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is not head:
        weights -= embedding.numel() * embedding.element_size()
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return weights, 2 * config.num_hidden_layers * heads * size * context * model.dtype.itemsize


def stored_size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def ffn_read(model: Any, blocks: list[FFNBlock]) -> tuple[float, float]:
    """(bytes read, bytes dense) of all FFNs per decoded token, from the counters of the sparse modules.

    Both in the format in which the modules hold their weights.
    """
    read = dense = 0.0
    for block in blocks:
        module = installed_ffn(model, block.path, block.up)
        tokens, selected, kept = module.counts.tolist()
        gates, itemsize = selected if module.names_neurons else tokens * module.neurons, weight_size(module)
        gates = gates if module.gated else 0
        read += row_bytes(block, itemsize) * (gates + selected + kept) / tokens
        read += stored_size([module.threshold, *module.predictor]) + scale_bytes(block, itemsize)
        read += stored_size(list(module.compensation.parameters())) if module.compensation else 0
        dense += ffn_bytes(block, itemsize)
    return read, dense


def weight_size(module: Any) -> int:
    """Bytes of a weight of a sparse FFN module; 1 is int8."""
    size: int = module.weights[0].element_size()
    return size


def inputs_skipped(model: Any, itemsize: int) -> float:
    """Bytes that linear layers with sparse inputs do not read per decoded token, from their counters."""
    skipped = 0.0
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            tokens, kept = layer.counts.tolist()
            skipped += layer.in_features * layer.out_features * itemsize - layer.constant_bytes
            skipped -= line_bytes(layer.out_features * itemsize) * kept / tokens
    return skipped


def heads_skipped(model: Any, itemsize: int, context: int) -> float:
    """Bytes of q rows, keys and values that a batch-1 step does not read, from the counters of routers that decoded.

    Routers count as read. What the output projection skips is in `inputs_skipped`.
    """
    skipped = 0.0
    for query in model.modules():
        if isinstance(query, HeadQuery) and query.mode == "predicted":
            tokens, groups = query.counts.tolist()
            row, units = query.in_features * itemsize, len(query.router)
            skipped += query.out_features * row - query.keep * query.out_features // units * line_bytes(row)
            skipped -= stored_size([query.router, query.scale, query.offset])
            skipped += (query.groups - groups / tokens) * 2 * query.size * context * itemsize
    return skipped
