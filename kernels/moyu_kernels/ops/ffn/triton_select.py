"""Device code of the predictors: which neurons a block needs, before any of their weights is read.

Shapes: N rows (tokens, 1 to 8), D hidden size, F neurons, R rank of a low-rank predictor, Q bytes of a row of codes,
PLANES of which are in a byte: 4 of 2 bits or 8 of 1.
"""
# mypy: ignore-errors
# Triton compiles these functions from their source: their arguments have no Python types.

import triton
import triton.language as tl


@triton.jit
def zeros(N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tuple of N fp32 accumulators `[ROWS, COLUMNS]`."""
    acc = ()
    for _ in tl.static_range(N):
        acc += (tl.zeros([ROWS, COLUMNS], tl.float32),)
    return acc


@triton.jit
def halves(a):
    """Even and odd columns of `[ROWS, COLUMNS]`, neighbours in the same thread: half as many accumulators."""
    return tl.split(tl.reshape(a, [a.shape[0], a.shape[1] // 2, 2]))


@triton.jit
def parts(a, PARTS: tl.constexpr):
    """Columns of `[ROWS, COLUMNS]` in PARTS, 4 or 8, tuples of those with neighbours in other parts, as in `halves`."""
    even, odd = halves(a)
    found = halves(even) + halves(odd)
    if PARTS == 8:
        found = halves(found[0]) + halves(found[1]) + halves(found[2]) + halves(found[3])
    return found


@triton.jit
def fused_sum(a, b, acc):
    """`acc + sum(a * b)` of two equal tuples, one after another."""
    for part in tl.static_range(len(a)):
        acc = tl.fma(a[part], b[part], acc)
    return acc


@triton.jit
def activate(g, ACT: tl.constexpr):
    """`ACTIVATIONS[ACT](g)` for fp32 g."""
    if ACT == "silu":
        return g * tl.sigmoid(g)
    elif ACT == "relu":
        return tl.maximum(g, 0.0)
    elif ACT == "relu2":
        positive = tl.maximum(g, 0.0)
        return positive * positive
    elif ACT == "gelu":
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    else:
        tl.static_assert(ACT == "gelu_tanh")
        return g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))


@triton.jit
def hidden_kernel(x_ptr, w1_ptr, s1_ptr, hidden_ptr, D, R, N: tl.constexpr, COLUMNS: tl.constexpr):
    """`hidden = s1 * (w1 @ x)`, one predictor row per program.

    x `[N, D]`; w1 `[R, D]` int8; s1 `[R]` fp32. Out: hidden `[N, R]` fp32.
    """
    r = tl.program_id(0).to(tl.int64)
    acc = zeros(N, 1, COLUMNS // 2)
    for start in range(0, D, COLUMNS):
        d = start + tl.arange(0, COLUMNS)[None, :]
        w0, w1 = halves(tl.load(w1_ptr + r * D + d, mask=d < D, other=0).to(tl.float32))
        new = ()
        for n in tl.static_range(N):
            x0, x1 = halves(tl.load(x_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32))
            new += (tl.fma(w1, x1, tl.fma(w0, x0, acc[n])),)
        acc = new
    scale = tl.load(s1_ptr + r)
    for n in tl.static_range(N):
        tl.store(hidden_ptr + n * R + r + tl.arange(0, 1), tl.sum(acc[n], 1) * scale)


@triton.jit
def round_kernel(x_ptr, x8_ptr, steps_ptr, sums_ptr, D, PLANES: tl.constexpr, COLUMNS: tl.constexpr):
    """x rounded to int8 with a step per row, one row per program, as `naive.lowbit_scores` defines it.

    x `[N, D]`; PLANES codes to a byte. Out: x8 `[N, PLANES * ceil(D / PLANES)]` int8, zero from column D on; steps
    `[N, 2]` fp32: the step, NaN for a row that is not finite, and the norm of x8 times it; sums `[N]` int32 of x8.
    """
    n = tl.program_id(0).to(tl.int64)
    width = tl.cdiv(D, PLANES) * PLANES
    top = tl.zeros([COLUMNS], tl.float32)
    bad = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, D, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        size = tl.abs(tl.load(x_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32))
        finite = size <= 3.4028234e38
        top = tl.maximum(top, tl.where(finite, size, 0.0))
        bad += (finite == 0).to(tl.int32)
    largest = tl.max(top, 0)
    inverse = tl.where(largest > 1e-30, tl.div_rn(1.0, tl.maximum(largest, 1e-30)) * 127.0, 0.0)
    total = tl.zeros([COLUMNS], tl.int32)
    squares = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, width, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        scaled = tl.where(tl.abs(x) <= largest, x * inverse, 0.0)
        rounded = ((scaled + 12582912.0) - 12582912.0).to(tl.int32)  # 1.5 * 2^23: to the nearest, ties to even
        tl.store(x8_ptr + n * width + d, rounded.to(tl.int8), mask=d < width)
        total += rounded
        squares += rounded * rounded
    step = tl.where(tl.sum(bad, 0) > 0, float("nan"), largest * (1.0 / 127.0))
    tl.store(steps_ptr + 2 * n, step)
    tl.store(steps_ptr + 2 * n + 1, tl.sqrt_rn(tl.sum(squares, 0).to(tl.float32)) * step)
    tl.store(sums_ptr + n, tl.sum(total, 0))


@triton.jit
def _dot4(a, b, acc, PACKED: tl.constexpr):
    """`acc` plus the products of four int8 in each int32 of a, none of them negative, and of b."""
    if PACKED == "cuda":
        acc = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    elif PACKED == "hip":
        acc = tl.inline_asm_elementwise(
            "v_dot4_i32_i8 $0, $1, $2, $3", "=v,v,v,v", [a, b, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for byte in tl.static_range(4):
            acc += ((a >> (8 * byte)) & 255) * ((b << (24 - 8 * byte)) >> 24)
    return acc


@triton.jit
def _products(
    x8_ptr, steps_ptr, sums_ptr, codes_ptr, scales_ptr, f, F, Q,
    PLANES: tl.constexpr, PACKED: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    AHEAD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Twice ROWS times `[BLOCK]` fp32: a row of x, from FIRST on, times the weights of neurons `f`, PLANES to a byte,
    and how far that is off.

    Sums are of integers.
    """
    BITS: tl.constexpr = 8 // PLANES
    TOP: tl.constexpr = (1 << BITS) - 1
    BLOCK: tl.constexpr = f.shape[0]
    acc = ()
    for _ in tl.static_range(ROWS):
        acc += (tl.zeros([BLOCK, WIDTH], tl.int32),)
    for start in range(0, Q, WIDTH * AHEAD):
        codes = ()
        for step in tl.static_range(AHEAD):
            j = start + step * WIDTH + tl.arange(0, WIDTH)[None, :]
            inside = ((f[:, None] < F) & (j < Q)) | EVEN
            codes += (tl.load(codes_ptr + f[:, None] * Q + j, mask=inside, other=0),)
        for step in tl.static_range(AHEAD):
            j = start + step * WIDTH + tl.arange(0, WIDTH)[None, :]
            code = codes[step].to(tl.int32)
            new = ()
            for row in tl.static_range(ROWS):
                total = acc[row]
                for k in tl.static_range(PLANES):
                    # One pointer per code, though all neurons share the row: it loads where it is used.
                    x_ptr = x8_ptr + ((FIRST + row) * PLANES + k) * Q + j + 0 * f[:, None]
                    x = tl.load(x_ptr, mask=(j < Q) | EVEN, other=0).to(tl.int32)
                    if PACKED == "no":
                        total += ((code >> BITS * k) & TOP) * x
                    else:
                        total = _dot4((code >> BITS * k) & (TOP * 0x01010101), x, total, PACKED)
                new += (total,)
            acc = new
    scale = tl.load(scales_ptr + f, mask=f < F, other=0.0)
    error = tl.load(scales_ptr + F + f, mask=f < F, other=0.0)
    found = ()
    errors = ()
    for row in tl.static_range(ROWS):
        dots = 2 * tl.sum(acc[row], 1) - TOP * tl.load(sums_ptr + FIRST + row)
        found += (dots.to(tl.float32) * tl.load(steps_ptr + 2 * (FIRST + row)) * scale,)
        errors += (tl.load(steps_ptr + 2 * (FIRST + row) + 1) * error,)
    return found, errors


@triton.jit
def _select_rows(
    x8_ptr, steps_ptr, sums_ptr, gate_codes_ptr, gate_scales_ptr, up_codes_ptr, up_scales_ptr, shift_ptr, weight, bias,
    f, F, Q,
    PLANES: tl.constexpr, PACKED: tl.constexpr, ACT: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """`select_lowbit` for ROWS rows of x from FIRST on."""
    gates, gate_errors = _products(
        x8_ptr, steps_ptr, sums_ptr, gate_codes_ptr, gate_scales_ptr, f, F, Q, PLANES, PACKED, FIRST, ROWS, WIDTH,
        AHEAD, EVEN,
    )  # fmt: skip
    if up_codes_ptr is not None:
        ups, up_errors = _products(
            x8_ptr, steps_ptr, sums_ptr, up_codes_ptr, up_scales_ptr, f, F, Q, PLANES, PACKED, FIRST, ROWS, WIDTH,
            AHEAD, EVEN,
        )  # fmt: skip
    wanted = tl.zeros([f.shape[0]], tl.int32)
    for row in tl.static_range(ROWS):
        g = gates[row]
        if shift_ptr is not None:
            g += tl.load(shift_ptr + f, mask=f < F, other=0.0).to(tl.float32)
        above = activate(g + gate_errors[row], ACT)
        below = activate(g - gate_errors[row], ACT)
        square = (above * above + below * below) * 0.5
        if up_codes_ptr is not None:
            square *= ups[row] * ups[row] + up_errors[row] * up_errors[row]
        score = weight * tl.sqrt_rn(tl.sqrt_rn(square)) + bias
        finite = gate_errors[row] == gate_errors[row]  # relu makes zero of what is not
        wanted |= ((score > 0) & finite).to(tl.int32) << (FIRST + row)
    return wanted


@triton.jit
def select_lowbit(
    x8_ptr, steps_ptr, sums_ptr, gate_codes_ptr, gate_scales_ptr, up_codes_ptr, up_scales_ptr, weight_ptr, bias_ptr,
    shift_ptr, f, F, Q,
    PLANES: tl.constexpr, PACKED: tl.constexpr, ACT: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """`[BLOCK]` int32: bit n is set where neuron `f` scores above zero for row n.

    Of a plain FFN up's codes stand for gate's, None for up's, and shift is up's bias or None. PACKED: "no" where codes
    and x8 are bytes, Q of them a row; else they are int32, four bytes each, and Q counts these: "cuda" and "hip"
    multiply them by one instruction of such a GPU, "any" by plain ones. GROUP: rows of x for which codes are read once.
    WIDTH, AHEAD: codes of a row at once, and how often ahead; EVEN: these divide Q, and BLOCK divides F.
    """
    weight = tl.load(weight_ptr + f, mask=f < F, other=0.0)
    bias = tl.load(bias_ptr + f, mask=f < F, other=0.0)
    wanted = tl.zeros([f.shape[0]], tl.int32)
    for first in tl.static_range(0, N // GROUP * GROUP, GROUP):
        wanted |= _select_rows(
            x8_ptr, steps_ptr, sums_ptr, gate_codes_ptr, gate_scales_ptr, up_codes_ptr, up_scales_ptr, shift_ptr,
            weight, bias, f, F, Q, PLANES, PACKED, ACT, first, GROUP, WIDTH, AHEAD, EVEN,
        )  # fmt: skip
    if N % GROUP > 0:
        wanted |= _select_rows(
            x8_ptr, steps_ptr, sums_ptr, gate_codes_ptr, gate_scales_ptr, up_codes_ptr, up_scales_ptr, shift_ptr,
            weight, bias, f, F, Q, PLANES, PACKED, ACT, N // GROUP * GROUP, N % GROUP, WIDTH, AHEAD, EVEN,
        )  # fmt: skip
    return tl.where(f < F, wanted, 0)


@triton.jit
def select_lowrank(
    hidden_ptr, w2_ptr, s2_ptr, bias_ptr, f, F, R, N: tl.constexpr, WIDTH: tl.constexpr, AHEAD: tl.constexpr
):
    """`[BLOCK]` int32: bit n is set where neuron `f` scores above zero for row n. WIDTH, AHEAD: as there."""
    acc = zeros(N, f.shape[0], WIDTH // 4)
    for start in range(0, R, WIDTH * AHEAD):
        weights = ()
        for step in tl.static_range(AHEAD):
            r = start + step * WIDTH + tl.arange(0, WIDTH)[None, :]
            inside = (f[:, None] < F) & (r < R)
            weights += (tl.load(w2_ptr + f[:, None] * R + r, mask=inside, other=0),)
        for step in tl.static_range(AHEAD):
            r = start + step * WIDTH + tl.arange(0, WIDTH)[None, :]
            w = parts(weights[step].to(tl.float32), 4)
            new = ()
            for n in tl.static_range(N):
                h = tl.load(hidden_ptr + n * R + r + 0 * f[:, None], mask=r < R, other=0.0)
                new += (fused_sum(w, parts(h, 4), acc[n]),)
            acc = new
    scale = tl.load(s2_ptr + f, mask=f < F, other=0.0)
    bias = tl.load(bias_ptr + f, mask=f < F, other=0.0)
    wanted = tl.zeros([f.shape[0]], tl.int32)
    for n in tl.static_range(N):
        score = tl.sum(acc[n], 1) * scale + bias
        wanted |= (score > 0).to(tl.int32) << n
    return tl.where(f < F, wanted, 0)
