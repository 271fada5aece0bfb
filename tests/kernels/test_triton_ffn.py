"""The Triton FFN against its naive twin, where `on_device` says."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from moyu_kernels.ops.ffn import naive
from on_device import agree, check_op, compiled, computed, interpreted, run_interpreted, run_on_device
from predictors import KINDS, random_predictor
from torch import Tensor


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fills the memory that `torch.empty` hands out with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(
    n: int,
    d: int = 65,
    f: int = 193,
    r: int = 17,
    dtype: torch.dtype = torch.float32,
    shift: float = 0.0,
    family: str = "lowrank",
) -> dict[str, Any]:
    """Arguments of `gated_ffn`; r 0 is exact mode; half of the neurons are selected, fewer where shift is below 0."""
    g = torch.Generator().manual_seed(n + d + f + r)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    x, gate, up, down = normal(n, d), normal(f, d) / d**0.5, normal(f, d) / d**0.5, normal(f, d) / f**0.5
    predictor = random_predictor(family, d, f, r, seed=n + d + f + r) if r else []
    if r and family != "given":
        predictor[-1] = predictor[-1] + 0.1 * normal(f) + shift
    return {
        "x": x.to(dtype),
        "gate": gate.to(dtype),
        "up": up.to(dtype),
        "down": down.to(dtype),
        "threshold": 0.2 * torch.rand(f, generator=g),
        "act": "silu",
        "predictor": predictor,
    }


def masks(args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Selected and kept neurons, `[N, F]` bool each, as `naive.gated_ffn` defines them."""
    x, threshold = args["x"].float(), args["threshold"]
    a = naive.ACTIVATIONS[args["act"]](x @ args["gate"].float().T) * (x @ args["up"].float().T)
    selected = torch.ones_like(a, dtype=torch.bool)
    if args["predictor"]:
        selected = naive.predictor_scores(x, args["predictor"], naive.ACTIVATIONS[args["act"]]) > 0
    return selected, selected & (a.abs() >= threshold) & (a != 0)


def run(args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    from moyu_kernels.ops.ffn import triton

    return run_on_device(triton.gated_ffn, **args)


def check(args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Runs the kernel, compares with the naive twin in fp32 and returns what the kernel returned."""
    found = run(args)
    weights = {name: args[name].float() for name in ("x", "gate", "up", "down")}
    agree(found, naive.gated_ffn(**(args | weights)), args["x"].dtype, 2e-6)
    return found


def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.slow
def test_the_rest_under_the_interpreter() -> None:
    run_interpreted(__file__, "slow")


@computed
@pytest.mark.parametrize(
    ("family", "n", "dtype"),
    [
        pytest.param(
            family, n, dtype, marks=[pytest.mark.slow] if family == "onebit" and dtype != torch.bfloat16 else []
        )
        for family in KINDS
        for n, dtype in (
            (1, torch.bfloat16),
            (3, torch.bfloat16),
            (3, torch.float16),
            (3, torch.float32),
            (8, torch.float32),
        )
    ],
)
def test_predicted(family: str, n: int, dtype: torch.dtype) -> None:
    args = make(n, dtype=dtype, family=family)
    selected, kept = masks(args)
    assert 0.3 < selected.float().mean() < 0.7
    assert 0.1 < kept.float().mean() < selected.float().mean() - 0.1
    check(args)


@computed
@pytest.mark.parametrize(("n", "dtype"), [(1, torch.bfloat16), (3, torch.float16), (8, torch.float32)])
def test_exact(n: int, dtype: torch.dtype) -> None:
    check(make(n, r=0, dtype=dtype))


@computed
@pytest.mark.parametrize(("n", "dtype"), [(1, torch.bfloat16), (3, torch.float16), (8, torch.float32)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_given_masks(n: int, dtype: torch.dtype, density: float) -> None:
    args = make(n, r=0, dtype=dtype)
    keep = torch.rand(n, 193, generator=torch.Generator().manual_seed(n)) < density
    args["predictor"] = [naive.pack_mask(keep)]
    args["threshold"] *= density < 1
    y, counts = check(args)
    assert counts[:, 0].tolist() == keep.sum(1).tolist()
    spoiled = {name: torch.where(keep.any(0)[:, None], args[name], torch.nan) for name in ("gate", "up", "down")}
    assert torch.equal(run(args | spoiled)[0], y)
    alone, _ = run(args | {"x": args["x"][:1]})
    assert torch.equal(alone[0], y[0]), "bits of rows that are not there count for nothing"


@computed
@pytest.mark.parametrize("act", naive.ACTIVATIONS)
def test_activations(act: str) -> None:
    check(make(1, r=0) | {"act": act})


@computed
@pytest.mark.parametrize(
    ("n", "d", "f", "r", "shift"),
    [
        (1, 1, 1, 1, 1.0),
        (1, 40, 1100, 3, -0.3),  # two blocks a chain
        (2, 1030, 33, 130, 0.0),  # several steps over D and over R, several tiles of columns
        (3, 96, 40, 16, 0.0),  # codes in words, a row and a half of them at once
    ],
)
@pytest.mark.parametrize(
    "family", [pytest.param(kind, marks=[pytest.mark.slow] if kind == "lowbit" else []) for kind in KINDS]
)
def test_sizes(family: str, n: int, d: int, f: int, r: int, shift: float) -> None:
    check(make(n, d, f, r, shift=shift, family=family))


@computed
@pytest.mark.parametrize(("family", "r"), [*((family, 8) for family in KINDS), ("lowrank", 0)])
def test_larger_blocks(family: str, r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from moyu_kernels.ops.ffn import triton_lists

    monkeypatch.setattr(triton_lists, "BLOCKS", 3)  # of 64 neurons, as a model of 16,384 has
    check(make(2, 32, r=r, family=family))


@computed
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_input_that_is_not_finite_selects_nothing(value: float) -> None:
    args = make(2, family="lowbit")
    y, counts = run(args)
    args["x"][1, 3] = value
    spoiled, spoiled_counts = run(args)
    assert torch.equal(spoiled[0], y[0])
    assert counts[1, 0] > spoiled_counts[1, 0] == 0


@computed
def test_nothing_selected() -> None:
    y, counts = check(make(3, shift=-1e3))
    assert not y.any()
    assert not counts.any()


@computed
def test_nothing_kept() -> None:
    y, counts = check(make(3, r=0) | {"threshold": torch.full((193,), torch.inf)})
    assert not y.any()
    assert counts.tolist() == [[193, 0]] * 3


@computed
def test_all_active() -> None:
    _, counts = check(make(3, shift=1e3) | {"threshold": torch.zeros(193)})
    assert counts.tolist() == [[193, 193]] * 3


@computed
def test_ties_are_kept_and_zeros_are_not() -> None:
    args = make(3, d=7, f=40, r=0)
    whole = {name: (3 * args[name]).round() for name in ("x", "gate", "up")}
    _, counts = check(args | whole | {"act": "relu", "threshold": (40 * args["threshold"]).round()})
    assert counts[:, 1].min() > 0


@computed
@pytest.mark.parametrize(("r", "family"), [(0, "lowrank"), (17, "lowrank"), (17, "lowbit")])
def test_row_equals_its_batch_of_one(r: int, family: str) -> None:
    args = make(8, f=97, r=r, family=family)
    y, counts = run(args)
    for row in (0, 6):
        alone, alone_counts = run(args | {"x": args["x"][row : row + 1]})
        assert torch.equal(alone[0], y[row])
        assert torch.equal(alone_counts[0], counts[row])


@computed
def test_calls_repeat_bitwise() -> None:
    args = make(3)
    assert torch.equal(run(args)[0], run(args)[0])


@interpreted
def test_only_needed_rows_are_loaded_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    args = make(3, shift=-0.2)
    loads = {name: torch.zeros(args[name].numel(), dtype=torch.int32) for name in ("gate", "up", "down")}
    masked_load = InterpreterBuilder.create_masked_load

    def counting(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        addresses = torch.from_numpy(pointers.data[mask.data].astype("int64"))
        for name, count in loads.items():
            index = (addresses - args[name].data_ptr()) // args[name].element_size()
            index = index[(index >= 0) & (index < count.numel())]
            count.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        return masked_load(self, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting)
    run(args)
    selected, kept = (mask.any(0) for mask in masks(args))
    assert 0 < kept.sum() < selected.sum() < 193
    for name, needed in {"gate": selected, "up": selected, "down": kept}.items():
        assert torch.equal(loads[name].view(193, 65), needed.int()[:, None].expand(193, 65)), name


@computed
def test_nan_in_rows_that_are_not_needed() -> None:
    args = make(3, shift=-0.2, dtype=torch.bfloat16)
    y, _ = run(args)
    selected, kept = (mask.any(0) for mask in masks(args))
    for name, needed in {"gate": selected, "up": selected, "down": kept}.items():
        args[name][~needed] = torch.nan
    assert torch.equal(run(args)[0], y)


@computed
def test_library_checks() -> None:
    from moyu_kernels.ops.ffn import triton

    check_op(triton.gated_ffn, list(make(2, 16, 32, 4).values()))


@pytest.mark.parametrize(
    ("r", "family", "launches"), [(0, "lowrank", 2), (17, "lowrank", 3), (17, "lowbit", 3), (17, "given", 2)]
)
def test_nothing_but_kernels_is_launched(r: int, family: str, launches: int) -> None:
    from moyu_kernels.ops.ffn import triton
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton.backends.compiler import GPUTarget

    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(call))
            return call(*args, **(kwargs or {}))

    args = make(2, r=r, family=family)
    fronts = (args.pop("gate"), args.pop("up"))
    torch.use_deterministic_algorithms(False)
    with Recorder():
        plan, _, _ = triton.plan(fronts=fronts, **args, target=GPUTarget("cuda", 90, 32))
    assert len(plan) == launches
    assert set(calls) == {"aten.empty.memory_format"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act": "tanh"}, "act is 'tanh'"),
        ({"rule": "relu"}, "rule 'relu' has no triton op yet"),
        ({"x": torch.zeros(1, 65, dtype=torch.float64)}, "float64: the triton backend supports bfloat16"),
        ({"x": torch.zeros(9, 65)}, "N from 1 to 8"),
        ({"x": torch.zeros(0, 65)}, "N from 1 to 8"),
        ({"x": torch.zeros(1, 64)}, r"x is torch.float32 \[1, 64\]: expected torch.float32 \[1, 65\]"),
        ({"up": torch.zeros(193, 65, dtype=torch.bfloat16)}, "up is torch.bfloat16"),
        ({"down": torch.zeros(65, 193)}, r"down is .* \[65, 193\]: expected .* \[193, 65\]"),
        ({"down": torch.zeros(65, 193).T}, r"down has strides \(1, 193\)"),
        ({"threshold": torch.zeros(193, dtype=torch.bfloat16)}, "threshold is torch.bfloat16"),
        ({"gate": torch.zeros(193, 65, device="meta")}, "gate is on meta but x is on cpu"),
        ({"predictor": [torch.zeros(1)] * 2}, r"predictor has shapes \[\[1\], \[1\]\]"),
        ({"predictor": [torch.zeros(193)]}, r"mask is torch.float32 \[193\]: expected torch.uint8 \[193\]"),
        ({"predictor": [torch.zeros(65, dtype=torch.uint8)]}, r"mask is torch.uint8 \[65\]: expected"),
        ({"predictor": make(1, r=16)["predictor"][:2] + make(1)["predictor"][2:]}, r"w2 is .* \[193, 17\]: expected"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    from moyu_kernels.ops.ffn import triton

    with pytest.raises(ValueError, match=message):
        triton.gated_ffn(**(make(1) | change))


@compiled
def test_needs_a_gpu() -> None:
    from moyu_kernels.ops.ffn import triton

    with pytest.raises(ValueError, match="needs a GPU"):
        triton.gated_ffn(**make(1))


def test_a_triton_that_compiles_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from moyu_kernels.ops.ffn import triton

    monkeypatch.setattr(triton, "OLD_TRITON", True)
    x = torch.empty(0, device="meta")
    monkeypatch.setattr(type(x), "is_cuda", True)
    monkeypatch.setattr(triton, "down_kernel", None)
    with pytest.raises(ValueError, match=r"misaligned loads.*install 3\.7 or later"):
        triton.run_on(x, lambda target: pytest.fail("planned"))
