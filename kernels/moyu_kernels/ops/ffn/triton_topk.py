"""Device code of the rule "topk": after all activations are there, the K largest of each row.

Activations are ranked by keys: the bits of `abs(a) / threshold`, which as integers are in the order of the numbers,
and -1 for what is no number. Counts alone decide, so nothing depends on the order in which programs run.
"""
# mypy: ignore-errors
# Triton compiles these functions from their source: their arguments have no Python types.

import triton
import triton.language as tl


@triton.jit
def _reaching(keys_ptr, held, F, least, COLUMNS: tl.constexpr, HELD: tl.constexpr):
    """How many of F keys are `least` or more. held: the keys, where they are HELD in registers."""
    if HELD:
        found = (held >= least).to(tl.int32)
    else:
        found = tl.zeros([COLUMNS], tl.int32)
        for start in range(0, F, COLUMNS):
            f = start + tl.arange(0, COLUMNS)
            found += (tl.load(keys_ptr + f, mask=f < F, other=-2) >= least).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit
def least_kernel(keys_ptr, least_ptr, F, K, COLUMNS: tl.constexpr, HELD: tl.constexpr):
    """The K-th largest key of a row, one row per program, bit by bit from the highest one.

    keys `[N, F]` int32, -1 or more. HELD: F is at most COLUMNS, so all are read once. Out: least `[N]` int32.
    """
    n = tl.program_id(0).to(tl.int64)
    keys_ptr += n * F
    f = tl.arange(0, COLUMNS)
    held = tl.load(keys_ptr + f, mask=f < F, other=-2)
    least = tl.full([], 0, tl.int32)
    numbers = _reaching(keys_ptr, held, F, least, COLUMNS, HELD)
    for bit in range(31):
        candidate = least | (1 << (30 - bit))
        least = tl.where(_reaching(keys_ptr, held, F, candidate, COLUMNS, HELD) >= K, candidate, least)
    tl.store(least_ptr + n, tl.where(numbers >= K, least, -1))


@triton.jit
def list_kernel(
    keys_ptr, least_ptr, scales_ptr, values_ptr, neurons_ptr, lengths_ptr, tallies_ptr, F,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Lists the neurons of one block that some row keeps: those with a key of its `least` or more, and not zero.

    values `[N, F]` are set to zero where they are not kept, others times scales `[F]` of down's int8 rows, or None;
    neurons, lengths and tallies as `gate_up_kernel` leaves them.
    """
    block = tl.program_id(0).to(tl.int64)
    blocks = tl.num_programs(0)
    row = tl.arange(0, ROWS)
    f = block * BLOCK + tl.arange(0, BLOCK)
    inside = (row < N)[:, None] & (f < F)[None, :]
    place = row[:, None] * F + f[None, :]
    key = tl.load(keys_ptr + place, mask=inside, other=-2)
    a = tl.load(values_ptr + place, mask=inside, other=0.0)
    least = tl.load(least_ptr + row, mask=row < N, other=0)
    keep = inside & (key >= least[:, None]) & (tl.abs(a) > 0)
    if scales_ptr is not None:
        a *= tl.load(scales_ptr + f, mask=f < F, other=0.0)[None, :]
    tl.store(values_ptr + place, tl.where(keep, a, 0.0), mask=inside)
    listed = tl.max(keep.to(tl.int32), 0)
    tl.store(neurons_ptr + block * BLOCK + tl.cumsum(listed, 0) - 1, f.to(tl.int32), mask=listed != 0)
    tl.store(lengths_ptr + block, tl.sum(listed, 0))
    tally_ptr = tallies_ptr + row * blocks + block
    tl.store(tally_ptr, tl.sum(inside.to(tl.int32), 1), mask=row < N)
    tl.store(tally_ptr + N * blocks, tl.sum(keep.to(tl.int32), 1), mask=row < N)
