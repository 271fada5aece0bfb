"""Whether a kernel's accesses to shared memory are aligned, from its PTX alone: their addresses depend on the thread.

Triton 3.6 compiled some kernels to loads of 16 bytes at odd addresses, which only a GPU reports (docs/log.md 50).
"""

import operator
import re
from collections.abc import Callable

BITS32, BITS64 = 2**32 - 1, 2**64 - 1
ACCESS = re.compile(r"\b((?:ld|st)\.shared[\w.:]*|(?:st|ld)matrix[\w.]*)\s+.*?\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]")
OPS: dict[str, Callable[..., int]] = {
    "mov": int,
    "cvt": int,
    "cvta": int,
    "lo": lambda a: a & BITS32,
    "hi": lambda a: a >> 32 & BITS32,
    "join": lambda a, b: a & BITS32 | (b & BITS32) << 32,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "mad": lambda a, b, c: a * b + c,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "neg": operator.neg,
    "shl": operator.lshift,
    "shr": operator.rshift,
    "bfe": lambda a, low, size: a >> low & (1 << size) - 1,
    "bfi": lambda a, b, low, size: b & ~((1 << size) - 1 << low) | (a & (1 << size) - 1) << low,
    "selp": lambda a, b, which: a if which else b,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
Definitions = dict[str, list[tuple[str, list[str]]]]


class UnknownError(Exception):
    """An address that depends on more than the thread."""


def misaligned(ptx: str, threads: int) -> list[str]:
    """What accesses to shared memory are not aligned to their size, each with the first such thread and address.

    Raises: AssertionError where more than a tenth of them cannot be told.
    """
    body = ptx[ptx.index("{") :]
    definitions, wrong, unknown, total = _definitions(body), [], 0, 0
    for op, base, offset in ACCESS.findall(body):
        total += 1
        try:
            for thread in range(threads):
                address = _value(base, definitions, {"%tid.x": thread, "global_smem": 0}) + int(offset or 0)
                if address % _size(op):
                    wrong.append(f"{op} [{base}] at {address} in thread {thread}")
                    break
        except UnknownError:
            unknown += 1
    assert unknown <= total / 10
    return wrong


def _size(op: str) -> int:
    if "matrix" in op:
        return 16
    vector, bits = re.search(r"\.v(\d)", op), re.search(r"\.[busf](8|16|32|64)\b", op)
    assert bits
    return int(bits[1]) // 8 * (int(vector[1]) if vector else 1)


def _definitions(body: str) -> Definitions:
    """Of each register, the operations that write it with their arguments."""
    found: Definitions = {}
    for line in body.splitlines():
        match = re.match(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(\{?[%_][^;]*);", line)
        if not match or match[1].startswith(("ld", "st", "atom", "bra", "bar")):
            continue
        op, names = match[1], re.findall(r"[%\w.-]+", match[2])
        if match[2].startswith("{"):
            for half, name in (("lo", names[0]), ("hi", names[1])):
                found.setdefault(name, []).append((half, names[2:]))
        else:
            found.setdefault(names[0], []).append(("join" if "{" in match[2] else op, names[1:]))
    return found


def _value(name: str, definitions: Definitions, known: dict[str, int | None]) -> int:
    """known: values so far; None while one is worked out, which a loop comes back to."""
    if re.fullmatch(r"-?\d+|0x[0-9A-Fa-f]+U?", name):
        return int(name.rstrip("U"), 0)
    if name not in known:
        known[name] = None
        values = set()
        for op, arguments in definitions.get(name, []):
            kind = op.split(".")[1][:2] if op.startswith("setp") else op.split(".")[0]
            if kind not in OPS:
                raise UnknownError(op)
            wide = BITS64 if op.endswith("64") or ".wide" in op or kind == "join" else BITS32
            values.add(OPS[kind](*(_value(argument, definitions, known) for argument in arguments)) & wide)
        known[name] = values.pop() if len(values) == 1 else None
    value = known[name]
    if value is None:
        raise UnknownError(name)
    return value
