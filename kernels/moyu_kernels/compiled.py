"""The compiled single-token step: one graph, little cost of its own.

Three things keep it fast to make and to run. Layers that repeat are compiled once. Linear layers that read the same
input (q, k and v; gate and up) become one call. And once compiled, the graph is called directly, on a GPU as a CUDA
graph, on a CPU replayed (replay.py): all its inputs but the token are the model's own tensors, the same in every step.
"""

import logging
import operator
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from .replay import replay

logger = logging.getLogger(__name__)

_counter = iter(range(2**62))


class _LateReadError(Exception):
    """The graph cannot have shared regions, see `_reads_late`."""


class CompiledStep:
    """`step(ids) -> logits [batch, V]` for a model and its static cache, compiled in the first call.

    It keeps the tensors that the model had then: changes in place are seen, tensors that replace them are not. A model
    that does not compile as one graph runs eagerly, and a warning says so.

    Args: forward: `forward(model, cache, ids) -> logits`, a plain function. `cache` must have been used once.
    """

    def __init__(self, forward: Callable[[Any, Any, Tensor], Tensor], model: Any, cache: Any) -> None:
        self._forward, self._model, self._cache = forward, model, cache
        self._graph: Any = None
        self._code: Any = None
        self._inputs: list[Any] = []
        self._outputs: Sequence[Any] = ()
        self._call: Callable[[Tensor], Tensor] | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        if self._call is not None:
            return self._call(ids)
        from torch._dynamo.exc import TorchDynamoException
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
        from transformers.cache_utils import StaticLayer

        # Other kinds of cache layer keep Python values that change, which dynamo's guards would have to watch.
        plain = all(type(layer) is StaticLayer for layer in self._cache.layers)
        reason = "its cache has layers that are no StaticLayer"
        for layers in (_repeated(self._model), []) if plain else ():
            try:
                logits, self._call = self._compile(ids, layers)
                return logits
            except (TorchDynamoException, GuardOnDataDependentSymNode) as error:
                reason = str(error).strip().splitlines()[0]
        logger.warning("moyu: %s does not compile, decoding runs eagerly: %s", type(self._model).__name__, reason)
        self._call = partial(self._forward, self._model, self._cache)
        return self._call(ids)

    def _compile(self, ids: Tensor, layers: list[Any]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Run the first step, compiling it with `layers` as shared regions. Returns its logits and the next steps."""
        # A function of its own for each graph: torch.compile keeps its results with the code object.
        code = self._forward.__code__.replace(co_name=f"step_{next(_counter)}")
        compiled = torch.compile(
            FunctionType(code, self._forward.__globals__),
            fullgraph=True,
            dynamic=False,
            backend=self._backend,
            options={"guard_filter_fn": lambda guards: [False] * len(guards)},
        )
        shared = _shared_regions(layers)
        try:
            for layer in layers:
                layer.forward = MethodType(shared[type(layer)], layer)
            logits = compiled(self._model, self._cache, ids)
        finally:
            for layer in layers:
                del layer.forward
        direct = self._direct_call(ids, logits)
        self._inputs, self._outputs = [], ()
        if direct and not ids.is_cuda:
            return logits, replay(direct, self._code)
        call = direct or partial(compiled, self._model, self._cache)
        return logits, _captured(call, ids) if ids.is_cuda else call

    def _backend(self, graph: fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        from torch._functorch import config as functorch_config
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        if _reads_late(graph.graph):
            raise _LateReadError
        for module in graph.modules():
            if isinstance(module, fx.GraphModule):
                _merge_linears(module)

        def compile_inner(*args: Any, **named: Any) -> Any:
            self._code = compile_fx_inner(*args, **named)
            return self._code

        # A graph from that cache would not pass through `compile_inner`; inductor's own cache stays in use.
        with functorch_config.patch(enable_autograd_cache=False):
            compiled: Any = compile_fx(graph, inputs, compile_inner, config_patches={"size_asserts": False})

        def first(*args: Any) -> Any:
            outputs = compiled(*args)
            self._inputs, self._outputs = list(args), outputs
            return outputs

        self._graph = compiled
        return first

    def _direct_call(self, ids: Tensor, logits: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The graph without dynamo around it, where what goes in and comes out can be told."""
        places = [i for i, value in enumerate(self._inputs) if value is ids]
        results = [i for i, value in enumerate(self._outputs) if value is logits]
        if len(places) != 1 or len(results) != 1:
            return None
        graph, place, result = self._graph, places[0], results[0]
        # Aliases, which keep memory that a parameter has since left: a replay reads it.
        inputs = [value.detach() if isinstance(value, Tensor) else value for value in self._inputs]

        def call(ids: Tensor) -> Tensor:
            inputs[place] = ids
            return graph(*inputs)[result]

        return call


def _captured(call: Callable[[Tensor], Tensor], ids: Tensor) -> Callable[[Tensor], Tensor]:
    """`call`, which has run once, as a CUDA graph; capturing runs nothing, so no state moves on."""
    token, graph = ids.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = call(token)

    def replay(ids: Tensor) -> Tensor:
        token.copy_(ids)
        graph.replay()
        return logits.clone()  # the next replay writes over it

    return replay


def _repeated(model: nn.Module) -> list[Any]:
    """The decoder layers: the children of the longest ModuleList."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    longest = max(lists, key=len, default=())
    return [layer for layer in longest if "forward" not in vars(layer)]


def _shared_regions(layers: list[nn.Module]) -> dict[type, Any]:
    """For each class of layer its `forward`, marked so that equal layers are compiled once and not one by one."""
    regions = {}
    for cls in {type(layer) for layer in layers}:
        # Marking sets attributes on the function, so a copy is marked, not the class's own.
        stock: Any = cls.forward
        copy = FunctionType(stock.__code__, stock.__globals__, stock.__name__, stock.__defaults__, stock.__closure__)
        copy.__kwdefaults__ = stock.__kwdefaults__
        regions[cls] = torch.compiler.nested_compile_region(copy)
    return regions


def _reads_late(graph: fx.Graph) -> bool:
    """Whether something computed before the first region is used after it, but not in it.

    Inductor may then compute it after that region, which has moved the cache's length on: with two masks, one for
    sliding windows, the second one came out a position too long (torch 2.13).
    """
    regions = graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)
    if not regions:
        return False
    early = set()
    for node in graph.nodes:
        if node is regions[0]:
            break
        early.add(node)
    return any(
        node.op not in ("placeholder", "get_attr") and regions[0] not in node.users and not early.issuperset(node.users)
        for node in early
    )


def _merge_linears(module: fx.GraphModule) -> None:
    """Make one `moyu::linears` of all `moyu::linear` that read the same input, which gives the same numbers."""
    groups: dict[Any, list[Any]] = {}
    node: Any
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.moyu.linear.default):
        x, weight, bias = node.args
        if all(value is None or value.op in ("placeholder", "get_attr") for value in (weight, bias)):
            # Each layer reshapes its input anew: the reshape's own arguments tell what is read.
            source = (x.target, x.args) if x.op == "call_method" and x.target == "reshape" else (x, ())
            groups.setdefault((*source, bias is None), []).append(node)
    for nodes in groups.values():
        if len(nodes) < 2:
            continue
        weights = [node.args[1] for node in nodes]
        biases = [node.args[2] for node in nodes if node.args[2] is not None]
        with module.graph.inserting_before(nodes[0]):
            arguments = (nodes[0].args[0], weights, biases)
            merged = module.graph.call_function(torch.ops.moyu.linears.default, arguments)
            sizes = [weight.meta["example_value"].shape[0] for weight in weights]
            parts = module.graph.call_function(torch.split, (merged, sizes, 1))
            for index, node in enumerate(nodes):
                node.replace_all_uses_with(module.graph.call_function(operator.getitem, (parts, index)))
        for node in nodes:
            module.graph.erase_node(node)
    module.recompile()
