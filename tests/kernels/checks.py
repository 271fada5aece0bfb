"""What every op on the CPU is held to, whatever it computes."""

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PAGE = 4096


def same_on_any_number_of_threads(op: Callable[..., Any], arguments: list[Any]) -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(op(*arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def reads_only(op: Callable[..., Any], arguments: list[Any], needed: dict[int, Tensor]) -> None:
    """The op gives the same where the rows that it does not need lie in memory that may not be read, one row a page.

    To be called in a process of its own, which reading them would end.

    Args: needed: by the place of a weight among the arguments, fp32 with rows of a page, which rows are, bool.
    """
    protect = ctypes.CDLL(None).mprotect
    expected = op(*arguments)
    for place, rows in needed.items():
        weight = arguments[place]
        pages = torch.frombuffer(mmap.mmap(-1, len(weight) * PAGE), dtype=torch.float32).view(len(weight), -1)
        arguments[place] = pages.copy_(weight)
        for row in (~rows).nonzero().flatten().tolist():
            assert protect(ctypes.c_void_p(pages.data_ptr() + PAGE * row), PAGE, 0) == 0
    found = op(*arguments)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
