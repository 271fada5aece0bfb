"""Gated and plain FFN with a dynamic mask in plain PyTorch: the definition that every backend is tested against.

Shapes: N rows (tokens), D hidden size, F neurons, R predictor rank. `gate`, `up` and `down` are
neuron-contiguous `[F, D]` (`down` is the transposed stock weight), so that one neuron is one row of each.

What is said of a gate holds for up in a plain FFN: the activation acts on it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor

from .simulated import SCORES

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "relu2": lambda g: functional.relu(g).square(),
    "gelu": functional.gelu,
    "gelu_tanh": lambda g: functional.gelu(g, approximate="tanh"),
}

# How the op drops neurons: by a threshold on a, or by what stands for act(g), see `ruled_gate`.
RULES = (
    "threshold",
    "gate_threshold",
    "relu",
    "fatrelu",
    "relu2",
    "drelu",
    "statistical_topk",
    "statistical_topk_soft",
    "topk",
)
WHOLE_ROW = ("statistical_topk", "statistical_topk_soft", "topk")  # rules that compare all neurons: no predictor
ON_GATE = tuple(rule for rule in RULES if rule not in ("threshold", "topk"))  # rules by which a gate drops its neuron
PLAIN_RULES = tuple(rule for rule in RULES if rule != "drelu")  # what a plain FFN takes: dReLU needs gate and up
SUBSTITUTES = ("relu", "fatrelu", "relu2", "drelu")  # rules that are another function, not a mask on the stock one

# Tensors of a predictor by family, in the order in which the ops take them. What a checkpoint stores:
PREDICTORS = {
    "lowrank": ("w1", "s1", "w2", "s2", "bias"),
    "lowbit": ("gate_codes", "gate_scales", "up_codes", "up_scales", "weight", "bias"),
    "lowbit_up": ("up_codes", "up_scales", "weight", "bias"),  # of a plain FFN
}
GIVEN = {"given": ("mask",)}  # a mask that was known before the call, in a predictor's place
# Those that no op computes yet (simulated.py): masks on a dense model only.
SIMULATED = {
    "signs": ("signs", "weight", "bias"),
    "mlp": ("w1", "s1", "w2", "s2", "b1", "scale", "bias"),
    "history": ("w1", "s1", "m1", "t1", "w2", "s2", "start", "decay", "bias"),
}


def predictor_family(predictor: list[Tensor]) -> str:
    """Families differ in how many tensors they have.

    Raises: ValueError where none has so many.
    """
    families = GIVEN | PREDICTORS | SIMULATED
    for family, names in families.items():
        if len(names) == len(predictor):
            return family
    known = " or ".join(f"[{', '.join(names)}] ({family})" for family, names in families.items())
    raise ValueError(f"predictor has shapes {[list(part.shape) for part in predictor]}: expected [] (none), {known}")


def op_family(predictor: list[Tensor]) -> str:
    """`predictor_family`, for the ops.

    Raises: ValueError also for a family that no op computes.
    """
    family = predictor_family(predictor)
    if family in SIMULATED:
        raise ValueError(f"predictor {family!r} has no op; pass [] or one of {', '.join(PREDICTORS)}")
    return family


def predictor_scores(x: Tensor, predictor: list[Tensor], act: Callable[[Tensor], Tensor]) -> Tensor:
    """Score of each neuron; a neuron is selected where its score is above zero.

    Args: x `[..., D]` model dtype, for the family "history" `[..., T, D]` from the start of a sequence on; predictor
        the tensors of a family in `PREDICTORS` or `SIMULATED`; act the FFN's activation, or what a rule puts there,
        of a plain FFN with up's bias added before.
    Returns: `[..., F]` fp32.
    """
    family = predictor_family(predictor)
    if family == "lowbit":
        return lowbit_scores(x, act, *predictor)
    if family == "lowbit_up":
        return lowbit_up_scores(x, act, *predictor)
    if family == "lowrank":
        return lowrank_scores(x, *predictor)
    return SCORES[family](x, *predictor)


def predictor_shapes(predictor: list[Tensor], hidden: int, neurons: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype that each tensor of a predictor must have for a block with D and F of `hidden` and `neurons`."""
    vector = ((neurons,), torch.float32)
    family = op_family(predictor)
    if family == "given":
        return [((neurons,), torch.uint8)]
    if family == "lowrank":
        rank = len(predictor[0])
        return [((rank, hidden), torch.int8), ((rank,), torch.float32), ((neurons, rank), torch.int8), vector, vector]
    codes = ((neurons, -(-hidden * code_bits(predictor[0], hidden) // 8)), torch.uint8)
    scales = ((2, neurons), torch.float32)
    return [codes, scales] * (2 if family == "lowbit" else 1) + [vector, vector]


def pack_mask(keep: Tensor) -> Tensor:
    """uint8 `[F]`, bit n of byte i: whether row n keeps neuron i; keep bool `[N, F]`, N up to 8."""
    places = 2 ** torch.arange(len(keep), dtype=torch.uint8, device=keep.device)
    return (keep * places[:, None]).sum(0, dtype=torch.uint8)


def unpack_mask(mask: Tensor, rows: int) -> Tensor:
    """bool `[N, F]` of the first N rows that went into `pack_mask`."""
    return ((mask >> torch.arange(rows, dtype=torch.uint8, device=mask.device)[:, None]) & 1).bool()


def lowrank_scores(x: Tensor, w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor, bias: Tensor) -> Tensor:
    """`score = s2 * (w2 @ (s1 * (w1 @ x))) + bias`, all in fp32: two matrices, no non-linearity between them.

    Args: x `[N, D]`; w1 `[R, D]` int8; s1 `[R]` fp32; w2 `[F, R]` int8; s2 `[F]` fp32; bias `[F]` fp32.
    """
    hidden = x.float() @ w1.float().T * s1
    return hidden @ w2.float().T * s2 + bias


def lowbit_scores(
    x: Tensor,
    act: Callable[[Tensor], Tensor],
    gate_codes: Tensor,
    gate_scales: Tensor,
    up_codes: Tensor,
    up_scales: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """`score = weight * E[a^2]^(1/4) + bias`: the FFN on copies of its weights, 2 bits or 1, that are known to err.

    `g = gate2 @ x8` and `u = up2 @ x8` have the standard deviations `s = s_gate * norm(x8)` and `r = s_up * norm(x8)`,
    so the mean square of `a = act(g) * u` is about `(act(g + s)^2 + act(g - s)^2) / 2 * (u^2 + r^2)`: a neuron whose
    copies say little is not taken as off. x8 is x rounded to int8 with a scale per row, so the products are sums of
    integers: exact, in any order.

    Args: x `[N, D]`; codes `[F, ceil(D * bits / 8)]` uint8 as `unpack_codes` reads them; scales `[2, F]` fp32, of the
        codes and of their errors (s_gate, s_up); weight and bias `[F]` fp32.
    """
    (g, s), (u, r) = _lowbit_products(x, (gate_codes, gate_scales), (up_codes, up_scales))
    return weight * (_mean_square(act, g, s) * (u * u + r * r)).sqrt().sqrt() + bias


def lowbit_up_scores(
    x: Tensor, act: Callable[[Tensor], Tensor], up_codes: Tensor, up_scales: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """`lowbit_scores` of a plain FFN, `a = act(up2 @ x8)`; tensors as there."""
    ((u, r),) = _lowbit_products(x, (up_codes, up_scales))
    return weight * _mean_square(act, u, r).sqrt().sqrt() + bias


def _mean_square(act: Callable[[Tensor], Tensor], g: Tensor, s: Tensor) -> Tensor:
    """Of `act` of a normal variable, by the two points that have its mean g and its standard deviation s.

    NaN where these are, which a rule's act may make zero of.
    """
    return ((act(g + s).square() + act(g - s).square()) / 2).masked_fill(s.isnan(), torch.nan)


def _lowbit_products(x: Tensor, *copies: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Product and error, fp32 `[..., F]`, of each copy, codes and scales, with x rounded to int8."""
    top = x.float().abs().amax(-1, keepdim=True)
    x8 = torch.where(top > 1e-30, x.float() * (top.reciprocal() * 127), 0.0).round()
    step = top * (1 / 127)
    norm = x8.square().sum(-1, keepdim=True).sqrt() * step
    return [(x8 @ unpack_codes(codes, x.shape[-1]).T * step * scale, norm * error) for codes, (scale, error) in copies]


def code_bits(codes: Tensor, columns: int) -> int:
    """1 or 2, by the bytes of a row of codes; rows of up to 4 columns are always of 2-bit codes."""
    return 2 if codes.shape[1] == -(-columns // 4) else 1


def unpack_codes(codes: Tensor, columns: int) -> Tensor:
    """fp32 `[F, D]` of -3, -1, 1 and 3 from 2-bit codes, of -1 and 1 from 1-bit codes, `[F, Q]` uint8.

    With 2 bits Q = ceil(D / 4), and bits 2k and 2k + 1 of byte j hold column k * Q + j: a vector of bytes then gives
    four runs of neighbouring columns. With 1 bit Q = ceil(D / 8), and bit k of byte j holds column k * Q + j.
    """
    bits = code_bits(codes, columns)
    top = 2**bits - 1
    planes = [(codes >> bits * k) & top for k in range(8 // bits)]
    return (torch.cat(planes, dim=1)[:, :columns].to(torch.float32) * 2).sub_(top)


def pack_codes(levels: Tensor, bits: int = 2) -> Tensor:
    """What `unpack_codes` undoes: levels `[F, D]` of -3, -1, 1 and 3, or -1 and 1; uint8 `[F, ceil(D * bits / 8)]`."""
    count = 8 // bits
    codes = functional.pad((levels + 2**bits - 1) / 2, (0, -levels.shape[1] % count)).to(torch.uint8)
    planes = codes.chunk(count, dim=1)
    packed = planes[0].clone()
    for k, plane in enumerate(planes[1:], 1):
        packed |= plane << bits * k
    return packed


def ruled_gate(rule: str, g: Tensor, stock: Tensor, act: Callable[[Tensor], Tensor], threshold: Tensor) -> Tensor:
    """What stands for `stock = act(g)` under a rule, zero where the gate drops the neuron; of the dtype of `g`.

    "gate_threshold": `act(g)` where `abs(act(g)) >= threshold` (CATS, arXiv 2404.08763); "relu" and "drelu":
    `relu(g - threshold)` (arXiv 2310.04564, 2406.05955); "fatrelu": g where `g > 0` and `g >= threshold` (ProSparse,
    arXiv 2402.13516); "relu2": `relu(g) ** 2` (arXiv 2402.03804); "statistical_topk": `act(g)` where g is above
    t = mean + threshold * deviation of g over the neurons; "statistical_topk_soft": `act(relu(g - t))` (Spark, arXiv
    2506.06644); "threshold" and "topk": `act(g)`.

    Args: g, stock `[..., F]`; act also for values of other neurons than g's; threshold `[F]` fp32.
    """
    if rule not in ON_GATE:
        return stock
    if rule == "gate_threshold":
        return torch.where(stock.abs() >= threshold, stock, 0.0)
    if rule in ("relu", "drelu"):
        return torch.relu(g - threshold.to(g.dtype))
    if rule == "fatrelu":
        return torch.where((g > 0) & (g >= threshold), g, 0.0)
    if rule == "relu2":
        return torch.relu(g).square()
    wide = g.float()
    level = wide.mean(-1, keepdim=True) + threshold * wide.std(-1, keepdim=True)
    if rule == "statistical_topk":
        return torch.where(wide > level, stock, 0.0)
    return act(torch.relu(wide - level).to(g.dtype))


def ruled_activation(
    g: Tensor, u: Tensor | None, threshold: Tensor, act: str, rule: str, keep: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """a `[..., F]` of g's dtype, set to zero where it is not kept, and of which neurons up and down are needed, bool.

    What is not a number is not kept.

    Args: g, u `[..., F]`, of a plain FFN up's output and None; threshold `[F]` fp32; act a name from `ACTIVATIONS`;
        rule one from `RULES`; keep of "topk".
    """
    function = ACTIVATIONS[act]
    gate = ruled_gate(rule, g, function(g), function, threshold)
    a = gate if u is None else gate * (torch.relu(u) if rule == "drelu" else u)
    by_gate = rule in ON_GATE and u is not None
    selected = gate.abs() > 0 if by_gate else torch.ones_like(a, dtype=torch.bool)
    least: Tensor | float = threshold if rule == "threshold" else 0.0
    size = a.abs()
    if rule == "topk":
        size = (size / threshold).nan_to_num(-1.0, torch.inf)
        least = size.topk(keep, dim=-1).values[..., -1:]
    kept = (size >= least) & (a.abs() > 0)
    return torch.where(kept, a, 0.0), selected, kept


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
    """`y = a @ down` with `a = act(x @ gate.T) * (x @ up.T)`, set to zero where it is not kept.

    By default a neuron is kept where `abs(a) >= threshold`, under "topk" where `abs(a) / threshold` is among the `keep`
    largest of its row (all that are as large as the last of them). The other rules put something else in place of
    `act(g)` (`ruled_gate`; with "drelu" also `relu(u)` in place of u) and keep what is not zero then. If a predictor is
    given, only neurons whose score is above zero are kept, and the rule's gate is its activation. In its place may
    stand a mask that is known already: bit n says whether row n may keep a neuron (`pack_mask`). Everything after the
    dtype of the weights is fp32; the output is cast back to the dtype of `x`. With `scales` the weights are int8,
    and a row stands for its codes times its scale, one of down also times `columns`: `g = (x @ gate.T) * scales[0]`, u
    alike, `y = ((a * scales[2]) @ down) * columns`.

    Args: x `[N, D]`; gate, up, down `[F, D]` of x's dtype, or int8 beside scales `[3, F]` and columns `[D]` fp32;
        threshold `[F]` fp32 (0 keeps all);
        act a name from `ACTIVATIONS`; predictor `[]`, `[mask]` with mask uint8 `[F]`, or the tensors of a family in
        `PREDICTORS`; rule one from `RULES`; keep 1 to F under "topk".
    Returns: y `[N, D]` of x's dtype, counts `[N, 2]` int32: neurons selected, which are those whose up row is needed
        (by the predictor or mask; without one by the gate, or all F under "threshold" and "topk"), and neurons kept.
    Raises: ValueError for a predictor beside a rule in `WHOLE_ROW`, a `keep` out of range, or int8 without scales.
    """
    check_scales("gate", gate, scales, columns, 3)
    check_rule(rule, keep, predictor, len(gate), gated=True)
    g, u = x.float() @ gate.float().T, x.float() @ up.float().T
    if scales is not None:
        g, u = g * scales[0], u * scales[1]
    a, counts = _masked(x, g, u, threshold, act, predictor, rule, keep, None)
    return _down(a, down, scales, columns).to(x.dtype), counts


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
    """`y = a @ down + down_bias` with `a = act(x @ up.T + up_bias)`, set to zero where it is not kept.

    Rules, predictors and masks are those of `gated_ffn` without its u, so up with its bias stands where the gate does.
    What is dropped adds nothing, whatever its bias.

    Args: as there, but rule one from `PLAIN_RULES`; up_bias `[F]` and down_bias `[D]` of x's dtype;
        with int8 weights scales `[2, F]`, of up and down.
    Returns: as there; without a predictor or mask all F neurons are selected, since all up rows are read.
    Raises: ValueError as there, and for the rule "drelu".
    """
    check_scales("up", up, scales, columns, 2)
    check_rule(rule, keep, predictor, len(up), gated=False)
    u = x.float() @ up.float().T
    if scales is not None:
        u = u * scales[0]
    if up_bias is not None:
        u = u + up_bias.float()
    a, counts = _masked(x, u, None, threshold, act, predictor, rule, keep, up_bias)
    y = _down(a, down, scales, columns)
    return (y if down_bias is None else y + down_bias.float()).to(x.dtype), counts


def check_rule(rule: str, keep: int, predictor: list[Tensor], neurons: int, gated: bool) -> None:
    """Raises: ValueError for what an FFN does not take, gated or plain."""
    known = RULES if gated else PLAIN_RULES
    if rule not in known:
        kind = "gated" if gated else "plain"
        raise ValueError(f"rule {rule!r} has no op in a {kind} FFN; use one of {', '.join(known)}")
    if predictor and rule in WHOLE_ROW:
        raise ValueError(f"rule {rule!r} needs the gates of all neurons, so a predictor has none to skip; pass []")
    if rule == "topk" and not 1 <= keep <= neurons:
        raise ValueError(f"keep is {keep}, rule 'topk' takes 1 to F = {neurons}")
    if predictor and op_family(predictor) == ("lowbit_up" if gated else "lowbit"):
        raise ValueError(
            f"predictor {op_family(predictor)!r} has copies of {'up alone' if gated else 'gate and up'}, and this FFN "
            f"{'has a gate' if gated else 'has no gate'}; pass [] or a predictor that was fitted for it"
        )


def check_scales(name: str, weight: Tensor, scales: Tensor | None, columns: Tensor | None, matrices: int) -> None:
    """Raises: ValueError for int8 weights, of so many matrices, without scales, or scales of others."""
    if {scales is None, columns is None} != {weight.dtype != torch.int8}:
        raise ValueError(
            f"{name} is {weight.dtype}: int8 weights go with scales [{matrices}, F] and columns [D], and no others do"
        )


def _down(a: Tensor, down: Tensor, scales: Tensor | None, columns: Tensor | None) -> Tensor:
    if scales is None or columns is None:
        return a @ down.float()
    return (a * scales[-1]) @ down.float() * columns


def _masked(
    x: Tensor,
    g: Tensor,
    u: Tensor | None,
    threshold: Tensor,
    act: str,
    predictor: list[Tensor],
    rule: str,
    keep: int,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """a `[N, F]`, zero where it is not kept by rule, predictor or mask, and the counts; bias: up's, of a plain FFN."""
    a, selected, kept = ruled_activation(g, u, threshold, act, rule, keep)
    if predictor:
        function = ACTIVATIONS[act]

        def ruled(g: Tensor) -> Tensor:
            g = g if bias is None else g + bias.float()
            return ruled_gate(rule, g, function(g), function, threshold)

        given = op_family(predictor) == "given"
        selected = unpack_mask(predictor[0], len(x)) if given else predictor_scores(x, predictor, ruled) > 0
        kept = kept & selected
    counts = torch.stack([selected.sum(-1), kept.sum(-1)], dim=-1).to(torch.int32)
    return torch.where(kept, a, 0.0), counts
