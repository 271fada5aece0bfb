"""A compiled CPU step without the Python that inductor writes around its kernels: recorded once, then replayed.

That Python takes a quarter of a small model's step, since weights stream through the caches that it needs in between.
The step is recorded while it runs: each of inductor's kernels and of our ops, with the memory that it reads and
writes, which the tape keeps. It is what a CUDA graph is to a GPU.
"""

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .ops import cpu
from .ops.cpu.build import build_library

KERNEL = "cpp_fused"  # how the names of inductor's kernels begin in the module that it writes
# What else a module could call that does work. Ops of other namespaces than ours are told by `_Torch`.
FOREIGN = ("aten", "inductor_ops", "_quantized", "extern_kernels", "alloc_from_pool")


def replay(call: Callable[[Tensor], Tensor], code: Any) -> Callable[[Tensor], Tensor]:
    """`call`, which records the first step and then replays it; `call` itself where it cannot be recorded.

    Args: call: a step that runs `code` once, on memory that stays where it is but for its input, and returns logits
        that `code` made; code: inductor's compiled graph.
    """
    written = getattr(getattr(code, "current_callable", None), "__func__", None)
    if written is None or ".item()" in _source(written.__globals__) or not cpu.load():
        return call
    tape: _Tape | None = None
    plain = False

    def step(ids: Tensor) -> Tensor:
        nonlocal tape, plain
        if tape is not None:
            return tape.run(ids)
        if plain:
            return call(ids)
        recorder = _Recorder(written.__globals__)
        token = ids.clone()
        with recorder.recording():
            logits = call(token)
        if recorder.whole:
            tape = _Tape(recorder, token, logits)
        plain = tape is None
        return logits.clone()

    return step


def _source(names: dict[str, Any]) -> str:
    """Of a module, by its names; one with `.item()` may take another way next time."""
    try:
        return Path(names["__file__"]).read_text()
    except (KeyError, OSError):
        return ".item()"


@cache
def _library() -> Any:
    library = ctypes.CDLL(str(build_library()))
    library.moyu_tape_end.restype = ctypes.c_void_p
    library.moyu_tape_kernel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    library.moyu_tape_kernel.restype = ctypes.c_bool
    library.moyu_tape_replay.argtypes = [ctypes.c_void_p]
    library.moyu_tape_replay.restype = ctypes.c_char_p
    library.moyu_tape_free.argtypes = [ctypes.c_void_p]
    return library


class _Recorder:
    """Stands between a module that inductor has written and what it calls; our own ops note themselves down."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names, self.kept, self.whole, self.tape = names, list[Tensor](), True, 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        stand_ins: dict[str, Any] = {"torch": _Torch(self)}
        for name, value in self.names.items():
            if name.startswith(KERNEL):
                stand_ins[name] = self._kernel(value)
            elif name in FOREIGN:
                stand_ins[name] = _Foreign(self, value)
        before = {name: self.names[name] for name in stand_ins}
        self.names.update(stand_ins)
        _library().moyu_tape_begin()
        try:
            yield
        finally:
            self.tape = _library().moyu_tape_end()
            self.names.update(before)
            weakref.finalize(self, _library().moyu_tape_free, self.tape)

    def _kernel(self, kernel: Any) -> Callable[..., None]:
        """A kernel that notes down each of its calls. All it takes are pointers, where all shapes are fixed."""
        file = getattr(getattr(kernel, "__self__", None), "__file__", None)
        address = ctypes.cast(ctypes.CDLL(file).kernel, ctypes.c_void_p).value if file else None

        def call(*args: Any) -> None:
            kernel(*args)
            if address is None or not all(isinstance(arg, Tensor) for arg in args):
                self.whole = False
                return
            pointers = (ctypes.c_void_p * len(args))(*(arg.data_ptr() for arg in args))
            self.whole &= _library().moyu_tape_kernel(address, pointers, len(args))
            self.kept += args

        return call


class _Foreign:
    """Something that works but is not recorded."""

    def __init__(self, recorder: _Recorder, value: Any) -> None:
        self._recorder, self._value = recorder, value

    def __getattr__(self, name: str) -> Any:
        self._recorder.whole = False
        return getattr(self._value, name)

    def __call__(self, *args: Any, **named: Any) -> Any:
        self._recorder.whole = False
        return self._value(*args, **named)


class _Torch:
    """`torch`, of whose ops only ours are recorded."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder, self.ops = recorder, _Ops(recorder, torch.ops)

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        self._recorder.whole &= isinstance(found, torch.dtype)
        return found


class _Ops(_Foreign):
    @property
    def moyu(self) -> Any:
        return torch.ops.moyu


class _Tape:
    def __init__(self, recorder: _Recorder, token: Tensor, logits: Tensor) -> None:
        self._recorder, self._token, self._logits = recorder, token, logits

    def run(self, ids: Tensor) -> Tensor:
        """Raises: RuntimeError as the recorded step does."""
        self._token.copy_(ids)
        if error := _library().moyu_tape_replay(self._recorder.tape):
            raise RuntimeError(error.decode())
        return self._logits.clone()  # the next step writes over it
