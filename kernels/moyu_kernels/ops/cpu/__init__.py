"""Native ops: `moyu::gated_ffn`, `plain_ffn`, `sparse_linear`, `linear(s)`, `head_linear`, `attend`, and the yardstick
`read_sum`.

Importing this module declares the ops and their fake versions; `load()` compiles and registers the kernels.
"""

import functools
import logging
import time

import torch
from torch import Tensor

from ..ffn import naive
from ..linear import naive as naive_linear
from .build import BuildError, build_library

logger = logging.getLogger(__name__)

MAX_ROWS = 8

_library = torch.library.Library("moyu", "FRAGMENT")
_library.define(
    "gated_ffn(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor threshold, str act, Tensor[] predictor,"
    " str rule='threshold', int keep=0, Tensor? scales=None, Tensor? columns=None) -> (Tensor, Tensor)"
)
_library.define(
    "plain_ffn(Tensor x, Tensor up, Tensor down, Tensor threshold, str act, Tensor[] predictor,"
    " str rule='threshold', int keep=0, Tensor? up_bias=None, Tensor? down_bias=None, Tensor? scales=None,"
    " Tensor? columns=None) -> (Tensor, Tensor)"
)
_library.define("linear(Tensor x, Tensor weight, Tensor? bias, Tensor? scale=None) -> Tensor")
_library.define("linears(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? scales=None) -> Tensor")
_library.define("sparse_linear(Tensor x, Tensor weight, Tensor? bias, Tensor threshold) -> (Tensor, Tensor)")
_library.define(
    "head_linear(Tensor x, Tensor weight, Tensor? bias, Tensor router, Tensor scale, Tensor offset, int keep) -> Tensor"
)
_library.define("attend(Tensor q, Tensor k, Tensor v, Tensor mask, float scale, bool skip_zero=False) -> Tensor")
_library.define("read_sum(Tensor buffer) -> Tensor")


@torch.library.register_fake("moyu::gated_ffn")
def _(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    threshold: Tensor,
    act: str,
    predictor: list[Tensor],
    rule: str = "threshold",
    keep: int = 0,
    scales: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], 2), dtype=torch.int32)


@torch.library.register_fake("moyu::plain_ffn")
def _(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    threshold: Tensor,
    act: str,
    predictor: list[Tensor],
    rule: str = "threshold",
    keep: int = 0,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    scales: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], 2), dtype=torch.int32)


@torch.library.register_fake("moyu::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("moyu::linears")
def _(x: Tensor, weights: list[Tensor], biases: list[Tensor], scales: Tensor | None = None) -> Tensor:
    return x.new_empty((x.shape[0], sum(weight.shape[0] for weight in weights)))


@torch.library.register_fake("moyu::sparse_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], weight.shape[1])), x.new_empty((x.shape[0],), dtype=torch.int32)


@torch.library.register_fake("moyu::head_linear")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, router: Tensor, scale: Tensor, offset: Tensor, keep: int
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("moyu::attend")
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, skip_zero: bool = False) -> Tensor:
    batch, heads, _, size = q.shape
    return q.new_empty((batch, 1, heads, size))


@functools.cache
def load() -> bool:
    """Registers the CPU kernels, compiling them at first use.

    Returns: True for the native kernels; False where they could not be built: then a warning has said why, and the
    ops run the naive versions.
    """
    try:
        torch.ops.load_library(build_library())
        return True
    except (BuildError, OSError) as error:
        logger.warning("moyu: the CPU kernels are not available, decoding falls back to plain PyTorch: %s", error)
        _library.impl("gated_ffn", naive.gated_ffn, "CPU")
        _library.impl("plain_ffn", naive.plain_ffn, "CPU")
        _library.impl("linear", naive_linear.linear, "CPU")
        _library.impl("linears", naive_linear.linears, "CPU")
        _library.impl("sparse_linear", naive_linear.sparse_linear, "CPU")
        _library.impl("head_linear", naive_linear.head_linear, "CPU")
        _library.impl("attend", naive_linear.attend, "CPU")
        _library.impl("read_sum", lambda buffer: buffer.sum(dtype=torch.int32), "CPU")
        return False


def status() -> str:
    """Which CPU kernels run here, in a few words; compiles them at first use."""
    return "native, compiled for this machine" if load() else "plain PyTorch (the native kernels could not be built)"


def gated_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    threshold: Tensor,
    act: str,
    predictor: list[Tensor],
    rule: str = "threshold",
    keep: int = 0,
    scales: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`naive.gated_ffn` for 1 to 8 rows; a row's result is bitwise the same in any batch and with any threads.

    Down rows that no row keeps are not read. With a predictor, neither are gate and up rows of neurons that no row
    selects; without one, but a rule in `naive.ON_GATE`, up rows of neurons that no row's gate lets pass.

    Args and returns: as `naive.gated_ffn`; x bfloat16, float16 or float32, weights contiguous.
    Raises: RuntimeError where a shape or dtype does not fit, saying which.
    """
    load()
    op = torch.ops.moyu.gated_ffn.default
    return op(x, gate, up, down, threshold, act, predictor, rule, keep, scales, columns)


def plain_ffn(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    threshold: Tensor,
    act: str,
    predictor: list[Tensor],
    rule: str = "threshold",
    keep: int = 0,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    scales: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`naive.plain_ffn` for 1 to 8 rows; a row's result is bitwise the same in any batch and with any threads.

    Down rows that no row keeps are not read. With a predictor or mask, neither are up rows of neurons that no row
    selects.

    Args and returns: as `naive.plain_ffn`; x bfloat16, float16 or float32, weights and biases contiguous.
    Raises: RuntimeError where a shape or dtype does not fit, saying which.
    """
    load()
    op = torch.ops.moyu.plain_ffn.default
    return op(x, up, down, threshold, act, predictor, rule, keep, up_bias, down_bias, scales, columns)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for 1 to 8 rows, fp32 accumulation, a row's result bitwise the same in any batch.

    Args: x `[N, D]`, weight `[outputs, D]` contiguous, bias `[outputs]`, all of one dtype (bfloat16, float16, float32);
        or weight int8 beside the scale fp32 `[outputs]` of its rows.
    Returns: `[N, outputs]` of x's dtype.
    Raises: RuntimeError where a shape or dtype does not fit, saying which.
    """
    load()
    return torch.ops.moyu.linear.default(x, weight, bias, scale)


def linears(x: Tensor, weights: list[Tensor], biases: list[Tensor], scales: Tensor | None = None) -> Tensor:
    """Several linear layers on one input, their outputs side by side, each bitwise what `linear` gives.

    Args: x `[N, D]`, weights each `[outputs, D]`, biases one each or `[]`; as in `linear`; scales `[sum of outputs]`.
    Returns: `[N, sum of outputs]` of x's dtype.
    Raises: RuntimeError where a shape or dtype does not fit, saying which.
    """
    load()
    return torch.ops.moyu.linears.default(x, weights, biases, scales)


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """`naive.sparse_linear` of `ops/linear` for 1 to 8 rows; a row's result is bitwise the same in any batch.

    Weight rows of inputs that no row keeps are not read.

    Args and returns: as there; weight, bias and x bfloat16, float16 or float32, weight contiguous.
    Raises: RuntimeError where a shape or dtype does not fit, saying which.
    """
    load()
    return torch.ops.moyu.sparse_linear.default(x, weight, bias, threshold)


def head_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, router: Tensor, scale: Tensor, offset: Tensor, keep: int
) -> Tensor:
    """`naive.head_linear` of `ops/linear` for 1 to 8 rows; a row's result is bitwise the same in any batch.

    Weight rows of units that no row chooses are not read.

    Args and returns: as there; weight, bias and x bfloat16, float16 or float32, all but x contiguous.
    Raises: RuntimeError where a shape or dtype does not fit, saying which.
    """
    load()
    return torch.ops.moyu.head_linear.default(x, weight, bias, router, scale, offset, keep)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, skip_zero: bool = False) -> Tensor:
    """`naive.attend` of `ops/linear`, fp32 inside; positions outside the mask's first and last True are not read.

    With `skip_zero` neither are keys and values of which all heads are off.

    Args and returns: as there; k and v contiguous.
    Raises: RuntimeError where a shape or dtype does not fit, saying which.
    """
    load()
    return torch.ops.moyu.attend.default(q, k, v, mask, scale, skip_zero)


def read_bandwidth(buffer: Tensor | None = None, repeats: int = 3) -> float:
    """Best rate, in GB/s (1e9 bytes), of a vectorised read-only sum with torch's threads.

    Args: buffer int32, contiguous, best of 1 GiB or more (allocated when not given); repeats: the best one counts.
    """
    load()
    if buffer is None:
        buffer = torch.ones(2**28, dtype=torch.int32)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.ops.moyu.read_sum.default(buffer)
        best = min(best, time.perf_counter() - start)
    return buffer.numel() * buffer.element_size() / best / 1e9
