"""Device code of the gated or plain FFN with a dynamic mask; `triton.py` launches it.

Shapes: N rows (tokens, 1 to 8), D hidden size, F neurons, R predictor rank; B blocks of at most 128 neurons, chains of
neighbouring blocks, C tiles of columns, all three fixed by the shape of the weights.

A program packs the needed neurons of its block into a list, so that every load it issues is useful. What is added to
what, and in which order, depends on the neuron's number and never on its place in a list: runs repeat bitwise, and a
row equals its batch-of-one result. A weight row is fetched once for the batch; a row of the batch that does not want
it multiplies it by zero, so weights must be finite.
"""
# mypy: ignore-errors
# Triton compiles these functions from their source: their arguments have no Python types.

import triton
import triton.language as tl

from .triton_select import activate, fused_sum, parts, select_lowbit, select_lowrank, zeros


@triton.jit
def gate_up_kernel(
    x_ptr, gate_ptr, up_ptr, shift_ptr, scales_ptr, threshold_ptr, hidden_ptr, w2_ptr, s2_ptr,
    x8_ptr, steps_ptr, sums_ptr, gate_codes_ptr, gate_scales_ptr, up_codes_ptr, up_scales_ptr, weight_ptr, bias_ptr,
    mask_ptr, keys_ptr, values_ptr, neurons_ptr, lengths_ptr, tallies_ptr, tickets_ptr, F, D, R, TILES,
    ACT: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PLANES: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr, AHEAD: tl.constexpr, CODES: tl.constexpr,
    EVEN_CODES: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, PARTS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Selects, computes and thresholds the neurons of one block and lists those that some row keeps.

    x `[N, D]`; gate, up `[F, D]`, of a plain FFN up in gate's place and None; shift: gate's bias `[F]` or None; scales
    fp32 of int8 rows, `[F]` of each matrix, down's last, or None; threshold `[F]` fp32. Predictor, all None where all
    neurons are selected: hidden `[N, R]` from `hidden_kernel`, w2 `[F, R]` int8, s2 `[F]` fp32; or x8, steps and sums
    from `round_kernel`, codes `[F, R]` uint8 with R = ceil(D / PLANES), or a quarter of it in `select_lowbit`'s words,
    scales `[2, F]` and weight `[F]` fp32; and bias `[F]` fp32. Or mask `[F]` uint8, bit n for row n. keys `[N, F]`
    int32 or None: under "topk" no threshold is applied, all values are written beside what they are ranked by, and
    `triton_topk` goes on. EVEN: D is a multiple of COLUMNS * STEPS, so no mask is held. PARTS: columns to an
    accumulator. GROUP, AHEAD, EVEN_CODES: of `select_lowbit`, which reads CODES at once, and `select_lowrank` four
    times as many bytes.
    Out: values `[N, F]` fp32, written where selected, times down's scales but where keys are; neurons `[F]` int32, the
    first `lengths[b]` entries of each block; lengths `[B]` int32; tallies `[2, N, B]` int32, selected and kept; tickets
    `[C]` int32, zeroed here for `down_kernel` so that no call needs a memset or finds a stale ticket.
    """
    block = tl.program_id(0).to(tl.int64)
    blocks = tl.num_programs(0)
    for tile in range(tl.program_id(0), TILES, blocks):
        tl.store(tickets_ptr + tile, 0)

    lane = tl.arange(0, BLOCK)
    f = block * BLOCK + lane
    if hidden_ptr is not None:
        wanted = select_lowrank(hidden_ptr, w2_ptr, s2_ptr, bias_ptr, f, F, R, N, 4 * CODES // BLOCK, AHEAD)
    elif x8_ptr is not None:
        wanted = select_lowbit(
            x8_ptr, steps_ptr, sums_ptr, gate_codes_ptr, gate_scales_ptr, up_codes_ptr, up_scales_ptr, weight_ptr,
            bias_ptr, shift_ptr, f, F, R, PLANES, PACKED, ACT, N, GROUP, CODES // BLOCK, AHEAD, EVEN_CODES,
        )  # fmt: skip
    elif mask_ptr is not None:
        wanted = tl.load(mask_ptr + f, mask=f < F, other=0).to(tl.int32) & ((1 << N) - 1)
    else:
        wanted = tl.where(f < F, (1 << N) - 1, 0)
    chosen = (wanted != 0).to(tl.int32)
    place = tl.where(wanted != 0, tl.cumsum(chosen, 0) - 1, BLOCK)
    selected = tl.sum(chosen, 0)

    length = 0
    row = tl.arange(0, ROWS)[None, :]
    kept = tl.zeros([SLOTS, ROWS], tl.int32)
    for first in range(0, selected, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        hit = place[None, :] == slot[:, None]
        bits = tl.sum(tl.where(hit, wanted[None, :], 0), 1)
        neuron = block * BLOCK + tl.sum(tl.where(hit, lane[None, :], 0), 1)
        live = slot < selected

        gate_acc = zeros(N, SLOTS, COLUMNS // PARTS)
        up_acc = zeros(N, SLOTS, COLUMNS // PARTS)
        for start in range(0, D, COLUMNS * STEPS):
            gates = ()
            ups = ()
            for step in tl.static_range(STEPS):
                d = start + step * COLUMNS + tl.arange(0, COLUMNS)[None, :]
                inside = live[:, None] & ((d < D) | EVEN)
                gates += (tl.load(gate_ptr + neuron[:, None] * D + d, mask=inside, other=0.0),)
                if up_ptr is not None:
                    ups += (tl.load(up_ptr + neuron[:, None] * D + d, mask=inside, other=0.0),)
            # Keeps all loads in flight: without it ptxas moves them between the products to save registers.
            tl.debug_barrier()
            for step in tl.static_range(STEPS):
                d = start + step * COLUMNS + tl.arange(0, COLUMNS)[None, :]
                gate = parts(gates[step].to(tl.float32), PARTS)
                if up_ptr is not None:
                    up = parts(ups[step].to(tl.float32), PARTS)
                new_gate = ()
                new_up = ()
                for n in tl.static_range(N):
                    x = tl.load(x_ptr + n * D + d + 0 * slot[:, None], mask=(d < D) | EVEN, other=0.0)
                    x = parts(x.to(tl.float32), PARTS)
                    new_gate += (fused_sum(gate, x, gate_acc[n]),)
                    if up_ptr is not None:
                        new_up += (fused_sum(up, x, up_acc[n]),)
                gate_acc = new_gate
                if up_ptr is not None:
                    up_acc = new_up

        g = tl.zeros([SLOTS, ROWS], tl.float32)
        u = tl.zeros([SLOTS, ROWS], tl.float32)
        for n in tl.static_range(N):
            g = tl.where(row == n, tl.sum(gate_acc[n], 1)[:, None], g)
            if up_ptr is not None:
                u = tl.where(row == n, tl.sum(up_acc[n], 1)[:, None], u)
        if scales_ptr is not None:
            g *= tl.load(scales_ptr + neuron, mask=live, other=0.0)[:, None]
            if up_ptr is not None:
                u *= tl.load(scales_ptr + F + neuron, mask=live, other=0.0)[:, None]
        if shift_ptr is not None:
            g += tl.load(shift_ptr + neuron, mask=live, other=0.0).to(tl.float32)[:, None]
        a = activate(g, ACT)
        if up_ptr is not None:
            a *= u
        threshold = tl.load(threshold_ptr + neuron, mask=live, other=0.0)
        keep = (bits[:, None] >> row) & 1 != 0
        if keys_ptr is not None:
            ratio = tl.div_rn(tl.abs(a), tl.zeros([SLOTS, ROWS], tl.float32) + threshold[:, None])
            key = tl.where(ratio >= 0, ratio.to(tl.int32, bitcast=True), -1)
            tl.store(keys_ptr + row * F + neuron[:, None], key, mask=live[:, None] & (row < N))
        else:
            keep = keep & (tl.abs(a) >= threshold[:, None]) & (a != 0)
        kept += keep.to(tl.int32)
        if scales_ptr is not None and keys_ptr is None:
            last = F if up_ptr is None else 2 * F
            a *= tl.load(scales_ptr + last + neuron, mask=live, other=0.0)[:, None]
        tl.store(values_ptr + row * F + neuron[:, None], tl.where(keep, a, 0.0), mask=live[:, None] & (row < N))

        listed = tl.max(keep.to(tl.int32), 1)
        entry = block * BLOCK + length + tl.cumsum(listed, 0) - 1
        tl.store(neurons_ptr + entry, neuron.to(tl.int32), mask=listed != 0)
        length += tl.sum(listed, 0)

    row = tl.arange(0, ROWS)
    tally_ptr = tallies_ptr + row * blocks + block
    tl.store(lengths_ptr + block, length)
    tl.store(tally_ptr, tl.sum((wanted[:, None] >> row[None, :]) & 1, 0), mask=row < N)
    tl.store(tally_ptr + N * blocks, tl.sum(kept, 0), mask=row < N)


@triton.jit
def down_kernel(
    down_ptr, columns_ptr, shift_ptr, values_ptr, neurons_ptr, lengths_ptr, tallies_ptr, tickets_ptr, partials_ptr,
    y_ptr, counts_ptr, F, D, BLOCKS,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LINKS: tl.constexpr, CHAINS: tl.constexpr,
    COLUMNS: tl.constexpr, STEPS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """`y = (a @ down) * columns + shift` over some chains, one tile of columns; its last program adds up all programs.

    down `[F, D]`; columns `[D]` fp32 of int8 rows or None; shift `[D]` or None; values, neurons, lengths, tallies,
    tickets as left by `gate_up_kernel`; partials `[P, N, D]` fp32 scratch, P programs to a tile. Out: y `[N, D]`,
    counts `[N, 2]` int32.
    """
    tile = tl.program_id(1).to(tl.int64)
    chain = tl.program_id(0).to(tl.int64) * CHAINS + tl.arange(0, CHAINS)
    d = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]

    # The lists of a chain's blocks, read as one: entry e lies behind the unused ends of the blocks before it.
    total = tl.zeros([CHAINS], tl.int32)
    ends = ()
    gaps = ()
    for link in tl.static_range(LINKS):
        block = chain * LINKS + link
        length = tl.load(lengths_ptr + block, mask=block < BLOCKS, other=0)
        total += length
        ends += (total,)
        gaps += (BLOCK - length,)

    # One thread adds the neurons of a chain in ascending order: a neuron that only other rows keep adds zero.
    acc = zeros(N, CHAINS, COLUMNS)
    for start in range(0, tl.max(total, 0), STEPS):
        neurons = ()
        for step in tl.static_range(STEPS):
            place = chain * (LINKS * BLOCK) + start + step
            for link in tl.static_range(LINKS):
                place += tl.where(start + step >= ends[link], gaps[link], 0)
            neurons += (tl.load(neurons_ptr + place, mask=start + step < total, other=0),)
        weights = ()
        for step in tl.static_range(STEPS):
            inside = (start + step < total)[:, None] & (d < D)
            offset = neurons[step][:, None].to(tl.int64) * D + d
            weights += (tl.load(down_ptr + offset, mask=inside, other=0.0),)
        tl.debug_barrier()  # as in `gate_up_kernel`
        for step in tl.static_range(STEPS):
            if down_ptr.dtype.element_ty == tl.int8 and N > 4 and step % 2 == 0 and step > 0:
                tl.debug_barrier()  # against values of too many steps in registers at once
            w = weights[step].to(tl.float32)
            new = ()
            for n in tl.static_range(N):
                a = tl.load(values_ptr + n * F + neurons[step], mask=start + step < total, other=0.0)
                new += (tl.fma(w, a[:, None], acc[n]),)
            acc = new

    own = tile * COLUMNS + tl.arange(0, COLUMNS)
    for n in tl.static_range(N):
        partial_ptr = partials_ptr + (tl.program_id(0).to(tl.int64) * N + n) * D + own
        tl.store(partial_ptr, tl.sum(acc[n], 0), mask=own < D)

    tl.debug_barrier()  # the partials of all threads come before the ticket
    if tl.atomic_add(tickets_ptr + tile, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        lane = tl.arange(0, ROWS * COLUMNS).to(tl.int64)
        row = lane // COLUMNS
        column = tile * COLUMNS + lane % COLUMNS
        inside = (row < N) & (column < D)
        y = tl.zeros([ROWS * COLUMNS], tl.float32)
        programs = tl.num_programs(0)
        for start in range(0, programs, RUNS):
            partials = ()
            for run in tl.static_range(RUNS):
                line = (start + run) * N + row
                live = inside & (line < programs * N)
                line_ptr = partials_ptr + line * D + column
                partials += (tl.load(line_ptr, mask=live, other=0.0, cache_modifier=".cg"),)
            for run in tl.static_range(RUNS):
                y += partials[run]
        if columns_ptr is not None:
            y *= tl.load(columns_ptr + column, mask=inside, other=0.0)
        if shift_ptr is not None:
            y += tl.load(shift_ptr + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * D + column, y.to(y_ptr.dtype.element_ty), mask=inside)

    if (tl.program_id(0) == 0) & (tile == 0):
        line = tl.arange(0, ROWS)
        for kind in tl.static_range(2):
            count = tl.zeros([ROWS, 128], tl.int32)
            for start in range(0, BLOCKS, 128):
                b = start + tl.arange(0, 128)[None, :]
                tally_ptr = tallies_ptr + (kind * N + line)[:, None] * BLOCKS + b
                count += tl.load(tally_ptr, mask=(line < N)[:, None] & (b < BLOCKS), other=0)
            tl.store(counts_ptr + 2 * line + kind, tl.sum(count, 1), mask=line < N)
