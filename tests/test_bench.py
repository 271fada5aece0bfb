"""`moyu bench ops` and `moyu bench model`: names of the rows, the byte model, refusals; no test looks at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from moyu_kernels.inputs import SparseLinear
from moyu_kernels.ops.ffn import naive

from moyu_train.cli import main
from moyu_train.errors import MoyuError
from moyu_train.evaluation import bench, bench_bytes, bench_cases, bench_ops, shapes
from moyu_train.evaluation.bench_rows import check_shares, make_row, plot, tables
from moyu_train.evaluation.shapes import Shape

NAMES = (
    *("op", "backend", "dtype", "D", "F", "batch", "density", "time_us", "bytes", "gb_s", "bandwidth_share"),
    *("speedup_over_dense", "limit_speedup", "threads", "shape", "weights", "rounds", "load_average"),
)
TINY = Shape(64, 192, 3, 4, 2, 128, True, built=2)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny shape, a small cache, and a bandwidth that no timing here can reach."""
    monkeypatch.setitem(shapes.SHAPES, "smollm2-135m", TINY)
    monkeypatch.setattr(bench_cases, "cache_bytes", lambda device: 2**18)
    monkeypatch.setattr(bench_ops, "TURN", 1e-4)
    for module in (bench_ops, bench):
        monkeypatch.setattr(module, "read_bandwidth", lambda buffer: 1e4)


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows = json.loads(path.read_text())
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert set(NAMES) <= row.keys()
        time = row["time_us"]
        assert 0 < time["min"] <= time["median"] <= time["max"]
        assert row["gb_s"] == pytest.approx(row["bytes"] / time["median"] / 1e3, rel=1e-3)
        assert row["bandwidth_share"] == pytest.approx(row["gb_s"] / 1e4)
    return rows


def test_ops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--dtypes",
        "float32,bfloat16",
        "--densities",
        "0.1,0.5",
        "--batches",
        "1,4",
        "--rounds",
        "5",
        "--threads",
        "1",
    ]
    assert main(["bench", "ops", "--json", str(tmp_path / "ops.json"), *options]) == 0
    rows = rows_of(tmp_path / "ops.json")
    assert {(row["dtype"], row["batch"], row["masks"]) for row in rows} == {
        (dtype, batch, masks)
        for dtype in ("float32", "bfloat16")
        for batch, masks in ((1, "independent"), (4, "independent"), (4, "identical"))
    }
    for row in rows:
        matrices = 1 if "linear" in row["op"] else 2 if row["op"].startswith("plain") else 3
        size = matrices * 64 * 192 * (4 if row["dtype"] == "float32" else 2)
        size *= 3 if row["op"] == "ffn_linears" else 1
        assert row["limit_speedup"] == pytest.approx(size / row["bytes"], rel=2e-3)
        if row["density"] == 1.0:
            assert row["bytes"] == size
        elif row["op"] == "ffn_gate_threshold":
            assert row["bytes"] == pytest.approx(size * (1 + 2 * row["union_density"]) / 3 + 4 * 192, rel=2e-3)
        elif row["op"] in ("ffn_threshold", "ffn_topk"):
            assert row["bytes"] == pytest.approx(size * (2 + row["union_density"]) / 3 + 4 * 192, rel=2e-3)
        elif row["op"] == "sparse_linear":
            assert row["bytes"] == pytest.approx(size * row["union_density"] + 4 * 64, rel=2e-3)
        elif row["op"] == "plain_threshold":
            assert row["bytes"] == pytest.approx(size * (1 + row["union_density"]) / 2 + 4 * 192, rel=2e-3)
        elif row["op"] == "plain_lowbit_up":
            predictor = 192 * 16 + 4 * 4 * 192
            assert row["bytes"] == pytest.approx(size * row["union_density"] + predictor + 4 * 192, rel=2e-3)
        elif row["op"] == "ffn_lowbit":
            predictor = 2 * 192 * 16 + 6 * 4 * 192
            assert row["bytes"] == pytest.approx(size * row["union_density"] + predictor + 4 * 192, rel=2e-3)
        if row["batch"] == 1 or row["masks"] == "identical":
            assert row["union_density"] == pytest.approx(row["density"])
        elif row["density"] < 1:
            assert row["union_density"] > row["density"]
    sparse = [row for row in rows if row["density"] < 1]
    names = {row["op"].removeprefix("ffn_") for row in sparse}
    plain = {"plain_threshold", "plain_lowbit_up"}
    assert names == {*bench_cases.RULES, *bench_cases.FAMILIES, *plain, "sparse_linear"}
    assert all(min(abs(row["density"] - d) for d in (0.1, 0.5)) < 0.01 for row in sparse)
    assert "D 64, F 192, bfloat16, batch 4" in capsys.readouterr().out


def test_the_timed_calls_skip_what_the_rows_say() -> None:
    """The ops' own counts on the inputs of a case, against what its bytes are computed from."""
    assert bench_ops.cpu.load()
    x = torch.randn(bench_cases.INPUTS * 3, 64, generator=torch.Generator().manual_seed(0))
    weights = bench_cases.Weights(TINY, torch.float32, CPU)
    case = bench_cases.Case(weights, x, 0.2, (1,))
    plain = case.plain()[1]
    for setting in (*case.sparse(), *plain):
        counts = torch.cat([setting.call(weights.count - 1, i)[1] for i in range(bench_cases.INPUTS)])
        assert (counts[:, 1] / 192).mean() == pytest.approx(setting.density, abs=2e-3)
        assert setting.density == pytest.approx(0.2, abs=5e-3)
        assert setting.union > 0.3
    _, (linear,) = case.linear()
    counts = torch.cat([linear.call(0, i)[1] for i in range(bench_cases.INPUTS)])
    assert (counts / 64).mean() == pytest.approx(linear.density, abs=1e-6)
    x = case.calls[0]
    expected, _ = naive.gated_ffn(x, *weights[0], torch.zeros(192), "silu", [])
    y, _ = case.dense()[-1].call(0, 0)
    torch.testing.assert_close(y, expected)
    torch_dense, our_dense = (setting.call(0, 0) for setting in case.plain()[0])
    up, _, down = weights[0]
    torch.testing.assert_close(our_dense[0], naive.plain_ffn(x, up, down, torch.zeros(192), "silu", [])[0])
    torch.testing.assert_close(torch_dense, torch.nn.functional.silu(x @ up.T) @ down.view(64, 192).T)


def test_int8_cases() -> None:
    """Rows of 64 bytes, all scales read; the dense rivals compute the same on them."""
    assert bench_ops.cpu.load()
    x = torch.randn(bench_cases.INPUTS * 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = bench_cases.Weights(TINY, torch.int8, CPU)
    scales = 4 * (3 * 192 + 64)
    assert weights.bytes == 3 * 64 * 192 + scales
    case = bench_cases.Case(weights, x, 0.2, (1,))
    for setting in case.sparse():
        counts = torch.cat([setting.call(weights.count - 1, i)[1] for i in range(bench_cases.INPUTS)])
        assert (counts[:, 1] / 192).mean() == pytest.approx(setting.density, abs=5e-3)
        if setting.op == "ffn_threshold":
            moved = sum(setting.moved) / bench_cases.INPUTS
            assert moved == pytest.approx(64 * 192 * (2 + setting.union) + 4 * 192 + scales)
    torch_dense, our_linears, our_ffn = (setting.call(0, 0) for setting in case.dense())
    torch.testing.assert_close(torch_dense, our_linears, rtol=5e-2, atol=5e-2)
    int8 = (weights.scales, weights.columns)
    expected, _ = naive.gated_ffn(case.calls[0], *weights[0], torch.zeros(192), "silu", [], "threshold", 0, *int8)
    torch.testing.assert_close(our_ffn[0], expected)
    (torch_linear, our_linear), none = case.linear()
    torch.testing.assert_close(torch_linear.call(0, 0), our_linear.call(0, 0), rtol=5e-2, atol=5e-2)
    assert none == []
    (torch_plain, our_plain), sparse = case.plain()
    up_down = (weights.scales[::2], weights.columns)
    expected, _ = naive.plain_ffn(
        case.calls[0], *weights[0][::2], torch.zeros(192), "silu", [], "threshold", 0, None, None, *up_down
    )
    torch.testing.assert_close(our_plain.call(0, 0)[0], expected)
    assert torch_plain.call(0, 0).shape == expected.shape
    assert torch_plain.moved == our_plain.moved == [2.0 * 64 * 192 + 4 * (2 * 192 + 64)] * bench_cases.INPUTS
    threshold = sum(sparse[0].moved) / bench_cases.INPUTS
    assert threshold == pytest.approx(64 * 192 * (1 + sparse[0].union) + 4 * 192 + 4 * (2 * 192 + 64))


@pytest.mark.usefixtures("without_llamacpp")
def test_model_of_a_shape_in_int8(tmp_path: Path) -> None:
    options = ["--dtypes", "int8", "--densities", "0.4", "--quick", "--threads", "1"]
    assert main(["bench", "model", "--shape", "smollm2-135m", "--json", str(tmp_path / "m.json"), *options]) == 0
    rows = {row["op"]: row for row in rows_of(tmp_path / "m.json")}
    assert rows.keys() == {"decode_dense_eager", "decode_dense_runner", "decode_dense_int8", "decode_sparse"}
    assert {row["dtype"] for row in rows.values()} == {"int8"}
    int8, plain = 2 * (3 * 192 * (64 + 4) + 4 * 64), 2 * 3 * 192 * 64 * 2
    assert rows["decode_dense_runner"]["bytes"] - rows["decode_dense_int8"]["bytes"] == plain - int8
    assert rows["decode_dense_int8"]["weights_over_dtype"] == pytest.approx(int8 / plain)


def test_cold_weights() -> None:
    weights = bench_cases.Weights(TINY, torch.bfloat16, CPU)
    assert weights.count * weights.bytes >= 8 * 2**18
    assert weights.count % bench_cases.INPUTS
    assert torch.equal(weights[0][1], weights[weights.count - 1][1])
    assert weights[0][1].data_ptr() != weights[1][1].data_ptr()


def test_bytes_of_sparse_inputs() -> None:
    layer = SparseLinear(torch.nn.Linear(64, 192, dtype=torch.bfloat16).requires_grad_(False), torch.full((64,), 0.5))
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    layer(x)
    kept = (x.abs() >= 0.5).sum().item() / 4
    skipped = bench_bytes.inputs_skipped(torch.nn.Sequential(layer, torch.nn.Linear(4, 4)), 2)
    assert skipped == pytest.approx(192 * 2 * (64 - kept) - 64 * 4)


@pytest.mark.usefixtures("without_llamacpp")
def test_model_of_a_shape(tmp_path: Path) -> None:
    options = ["--densities", "0.2,0.6", "--quick", "--threads", "1"]
    assert main(["bench", "model", "--shape", "smollm2-135m", "--json", str(tmp_path / "m.json"), *options]) == 0
    rows = rows_of(tmp_path / "m.json")
    assert [row["op"] for row in rows] == 2 * ["decode_dense_eager", "decode_dense_runner", "decode_sparse"]
    assert all((row["layers"], row["layers_of_model"], row["weights"]) == (2, 3, "random") for row in rows)
    sparse = [row for row in rows if row["op"] == "decode_sparse"]
    assert [row["density"] for row in sparse] == [pytest.approx(0.2, abs=0.08), pytest.approx(0.6, abs=0.08)]
    assert sparse[0]["limit_speedup"] > sparse[1]["limit_speedup"] > 1


def test_a_share_that_cannot_be_fails_after_the_rows_are_written() -> None:
    row = make_row([1e-3] * 5, 10.3e6, 20.6e6, [3e-3] * 5, [10.0] * 5)
    assert (row["gb_s"], row["limit_speedup"], row["speedup_over_dense"]) == pytest.approx((10.3, 2.0, 3.0))
    row |= {"op": "ffn_threshold"}
    with pytest.raises(MoyuError, match=r"1 of 1 rows read faster .* \(ffn_threshold at 10.3 of 10.0"):
        check_shares([row])
    check_shares([row | {"bandwidth_share": 1.0}])


def test_table_and_plot_of_one_row() -> None:
    row = make_row([1e-3] * 5, 1e6, 2e6, [3e-3] * 5, [10.0] * 5)
    row |= dict.fromkeys(NAMES[:6], "x") | {"batch": 1, "density": 0.5, "threads": 1, "shape": "s", "weights": "random"}
    (table,) = tables([row | {"rounds": 5, "load_average": 0.1}])
    assert table.row_count == 1
    assert len(plot([row]).axes[0].lines) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ops", "--densities", "0.5,1.5"], "--densities 1.5 is no share of the neurons from 0.001 to 0.999"),
        (["ops", "--batches", "9"], "--batches 9 is no batch from 1 to 8"),
        (["ops", "--rounds", "3"], "fewer than 5"),
        (["ops", "--dtypes", "int4"], "--dtypes int4 is unknown; known: bfloat16"),
        (["ops", "--bench.rounds", "7"], "bench ops takes no '--bench.rounds 7'"),
        (["model"], "either a sparse checkpoint's folder or a --shape"),
        (["model", "folder", "--densities", "0.5"], "are the checkpoint's own"),
        (["model", "--shape", "smollm2-135m", "--batches", "4"], "bench model decodes one sequence"),
        (["recipe.yaml", "--quick"], "--quick is an option of `bench ops` and `bench model`"),
    ],
)
def test_refusals(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options]) == 1
    assert message in capsys.readouterr().err


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cases, "cache_bytes", lambda device: 2**50)
    with pytest.raises(MoyuError, match="copies of the weights, 8 times the last-level cache"):
        bench_cases.Weights(TINY, torch.float32, CPU)
