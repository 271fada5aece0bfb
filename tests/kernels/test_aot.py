"""The Triton kernels compiled for GPUs that are not here: what they take, what they load and in which order.

The default run compiles one small model per target, `-m slow` every batch size, dtype and mode of a larger one.
"""

import os
import re
from functools import cache

import pytest
import torch
from moyu_kernels.ops.aot import Report, compile_launch
from moyu_kernels.ops.ffn import naive, triton
from moyu_kernels.ops.linear import triton as inputs
from predictors import KINDS, PLAIN_KINDS, random_predictor
from shared_memory import misaligned
from torch import Tensor
from triton.backends.compiler import GPUTarget

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
THREADS = 128
WEIGHT_KERNELS = ("gate_up_kernel", "down_kernel")


@cache
def compiled(
    target: str,
    n: int = 1,
    d: int = 576,
    f: int = 1536,
    r: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    act: str = "silu",
    family: str = "lowrank",
    plain: bool = False,
    keep: int = 0,
    int8: bool = False,
) -> dict[str, tuple[Report, int]]:
    """Name of each kernel of a call: its report, and the 16-byte weight loads that a thread has in flight.

    plain: a plain FFN, with biases; keep: of the rule "topk"; int8: the weights' rows.
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    predictor = [part.to("meta") for part in random_predictor(family, d, f, r)] if r else []
    weight, threshold = empty(f, d, dtype=torch.int8 if int8 else dtype), empty(f, dtype=torch.float32)
    fronts, biases = [weight] * (1 if plain else 2), (empty(f), empty(d)) if plain else (None, None)
    scales = (empty(len(fronts) + 1, f, dtype=torch.float32), empty(d, dtype=torch.float32)) if int8 else ()
    arguments = (empty(n, d), fronts, weight, threshold, act, predictor, TARGETS[target], *biases, keep, *scales)
    launches, _, _ = triton.plan(*arguments)
    reports = {}
    for launch in launches:
        rows = 2 if launch.kernel.__name__ == "gate_up_kernel" and not plain else 1
        for name in ("STEPS", "SLOTS", "CHAINS"):
            rows *= int(launch.constants.get(name, 1))
        loads = rows * int(launch.constants.get("COLUMNS", 0)) * weight.element_size() // (THREADS * 16)
        reports[launch.kernel.__name__] = compile_launch(launch, TARGETS[target]), loads
    return reports


def check_resources(target: str, report: Report) -> None:
    assert report.spills == 0
    assert report.registers <= (512 if target == "gfx942" else 255)
    assert report.shared <= 16 * 1024
    if target != "gfx942":
        assert not misaligned(report.kernel.asm["ptx"], 32 * report.kernel.metadata.num_warps)


def check_loads(target: str, name: str, report: Report, loads: int, narrow_loads: int = 0) -> None:
    """Weights come in 16-byte loads, all of a step before the barrier, 32 KB or more in flight on an SM or CU.

    On gfx942, where loads of x come before that barrier too, the first product counts as one. narrow_loads: at most, of
    a byte or two for other things.
    """
    hip = target == "gfx942"
    wide, narrow = r"global_load_dwordx4", r"global_load_[us]\w+" if hip else r"LDG\S*\.[US](?:8|16)\b"
    wide = wide if hip else r"\bLDG\S*\.128"
    barrier = r"\bs_barrier|\bv_(?:pk_)?fma" if hip else r"\bBAR\.SYNC"
    assert re.search(wide, report.assembly)
    assert len(re.findall(narrow, report.assembly)) <= narrow_loads
    if name in WEIGHT_KERNELS:
        counts = [len(re.findall(wide, part)) for part in re.split(barrier, report.assembly)]
        assert loads in counts
        assert resident(target, report) * THREADS * loads * 16 >= 32 * 1024


def resident(target: str, report: Report) -> int:
    """Programs that fit the registers of an SM or CU."""
    registers = -(-report.registers // 8) * 8
    if target == "gfx942":
        return 4 * min(8, 512 // registers) * 64 // THREADS
    return min(16, 65536 // (registers * THREADS))


@pytest.mark.parametrize(("family", "first"), [("lowrank", "hidden_kernel"), ("lowbit", "round_kernel")])
@pytest.mark.parametrize("target", TARGETS)
def test_resources_and_loads(target: str, family: str, first: str) -> None:
    reports = compiled(target, family=family)
    assert [*reports] == [first, "gate_up_kernel", "down_kernel"]
    for name, (report, loads) in reports.items():
        check_resources(target, report)
        check_loads(target, name, report, loads)


@pytest.mark.parametrize("target", TARGETS)
def test_a_given_mask_takes_no_kernel_of_its_own(target: str) -> None:
    reports = compiled(target, family="given")
    assert [*reports] == ["gate_up_kernel", "down_kernel"]
    for name, (report, loads) in reports.items():
        check_resources(target, report)
        check_loads(target, name, report, loads, narrow_loads=3)  # of the mask, once for each layout


@pytest.mark.parametrize("target", TARGETS)
def test_a_plain_ffn_has_as_many_loads_in_flight(target: str) -> None:
    """Of one matrix in front, but twice as many rows of it, or pieces of a row."""
    reports = compiled(target, family="lowbit_up", plain=True)
    assert [*reports] == ["round_kernel", "gate_up_kernel", "down_kernel"]
    for name, (report, loads) in reports.items():
        check_resources(target, report)
        check_loads(target, name, report, loads, narrow_loads=8)


@pytest.mark.parametrize("target", TARGETS)
def test_int8_rows(target: str) -> None:
    check_int8(target, compiled(target, int8=True))
    check_int8(target, compiled(target, family="lowbit_up", plain=True, int8=True), narrow_loads=8)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", triton.DTYPES[:2], ids=str)  # float32 activations spill up to 104 bytes
@pytest.mark.parametrize("family", [*KINDS, None])
@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("target", TARGETS)
def test_int8_rows_of_all_batches(
    target: str, n: int, family: str | None, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if target == "sm80" and n > 7:
        request.applymarker(pytest.mark.xfail(strict=True, reason="down's sums of 16 columns spill 8 bytes"))
    rank = 128 if family else 0
    check_int8(target, compiled(target, n, 2048, 8192, rank, dtype, family=family or "lowrank", int8=True))


def check_int8(target: str, reports: dict[str, tuple[Report, int]], narrow_loads: int = 3) -> None:
    for name, (report, loads) in reports.items():
        check_resources(target, report)
        check_loads(target, name, report, loads, narrow_loads=narrow_loads)


@pytest.mark.parametrize("target", TARGETS)
def test_topk_ranks_in_two_kernels_more(target: str) -> None:
    check_topk(target, compiled(target, r=0, keep=100))


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", triton.DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("target", TARGETS)
def test_topk_of_all_batches(target: str, n: int, dtype: torch.dtype, plain: bool) -> None:
    check_topk(target, compiled(target, n, 2048, 8192, 0, dtype, plain=plain, keep=100))


def check_topk(target: str, reports: dict[str, tuple[Report, int]]) -> None:
    assert [*reports] == ["gate_up_kernel", "least_kernel", "list_kernel", "down_kernel"]
    for name, (report, loads) in reports.items():
        check_resources(target, report)
        if name not in ("least_kernel", "list_kernel"):  # these read a few numbers of each neuron
            check_loads(target, name, report, loads, narrow_loads=8)


@pytest.mark.parametrize(
    ("n", "d", "f", "dtype"),
    [
        (1, 576, 1536, torch.bfloat16),
        *(
            pytest.param(n, 2048, 8192, dtype, marks=pytest.mark.slow)
            for n in (1, 2, 4, 5, 8)
            for dtype in triton.DTYPES
        ),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_sparse_inputs(target: str, n: int, d: int, f: int, dtype: torch.dtype) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    threshold = torch.empty(d, device="meta")
    launches, _, _ = inputs.plan(empty(n, d), empty(d, f), empty(f), threshold, TARGETS[target])
    assert [launch.kernel.__name__ for launch in launches] == ["inputs_kernel", "down_kernel"]
    for launch in launches:
        report = compile_launch(launch, TARGETS[target])
        check_resources(target, report)
        if launch is launches[-1]:
            check_loads(target, "down_kernel", report, int(launch.constants["STEPS"]), narrow_loads=8)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", triton.DTYPES, ids=str)
@pytest.mark.parametrize("family", [*PLAIN_KINDS, "given", None])
@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("target", TARGETS)
def test_plain_resources_and_loads_of_all_batches(target: str, n: int, family: str | None, dtype: torch.dtype) -> None:
    rank = 128 if family else 0
    reports = compiled(target, n, 2048, 8192, rank, dtype, family=family or "lowrank", plain=True)
    for name, (report, loads) in reports.items():
        check_resources(target, report)
        check_loads(target, name, report, loads, narrow_loads=8)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", triton.DTYPES, ids=str)
@pytest.mark.parametrize("family", [*KINDS, None])
@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("target", TARGETS)
def test_resources_and_loads_of_all_batches(target: str, n: int, family: str | None, dtype: torch.dtype) -> None:
    rank = 128 if family else 0
    for name, (report, loads) in compiled(target, n, 2048, 8192, rank, dtype, family=family or "lowrank").items():
        check_resources(target, report)
        check_loads(target, name, report, loads)


@pytest.mark.slow
@pytest.mark.parametrize("act", naive.ACTIVATIONS)
@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("target", TARGETS)
def test_resources_of_all_activations(target: str, n: int, act: str) -> None:
    report, _ = compiled(target, n, 2048, 8192, act=act)["gate_up_kernel"]
    check_resources(target, report)


@pytest.mark.parametrize("target", TARGETS)
def test_partial_sums_are_published_before_the_ticket(target: str) -> None:
    """Stores, barrier, release, ticket, barrier, loads that pass by the first-level cache."""
    if target == "gfx942":
        order = ["global_store_dword", "s_barrier", "buffer_wbl2 sc1", r"s_waitcnt vmcnt\(0\)", "global_atomic_add"]
        order += ["buffer_inv sc1", "s_barrier", "global_load"]
    else:
        order = [r"STG\.E", r"BAR\.SYNC", r"MEMBAR\.\w+\.GPU", "ATOMG", r"BAR\.SYNC", r"LDG\S*STRONG\.GPU"]
    report, _ = compiled(target)["down_kernel"]
    assert re.search(".*?".join(order), report.assembly, re.DOTALL)


@pytest.mark.parametrize("d", [576, 4096])
@pytest.mark.parametrize("target", ["sm90", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_sums_have_one_order_for_all_batches(target: str, d: int) -> None:
    """The layouts of all fp32 sums, which fix their order, are the same for 1 and 8 rows."""

    def layouts(n: int) -> dict[str, set[str]]:
        found = {}
        for name, (report, _) in compiled(target, n, d).items():
            ir = report.kernel.asm["ttgir"]
            names = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)$", ir, re.MULTILINE))
            sums = re.findall(r"\}\) : \(tensor<(\w+xf32), (#\w+)>\) ->", ir)
            found[name] = {f"{shape} {names[layout]}" for shape, layout in sums}
        return found

    assert {name: len(sums) for name, sums in layouts(1).items()} == {
        "hidden_kernel": 1,  # over D
        "gate_up_kernel": 2,  # over R and over D
        "down_kernel": 1,  # over the chains of a program; a thread adds neurons and programs by itself
    }
    assert layouts(8) == layouts(1)


def test_what_triton_3_6_made_of_a_kernel_is_found() -> None:
    """Reduced from the load that crashed: bytes of a mask, 16 at a time, at half the thread's number."""
    ptx = """.entry kernel() {
    mov.u32 %r2, %tid.x;
    and.b32 %r8, %r2, 1;
    mul.wide.u32 %rd57, %r2, 2147483648;
    cvt.u64.u32 %rd58, %r8;
    shl.b64 %rd59, %rd58, 36;
    or.b64 %rd60, %rd57, %rd59;
    mov.b64 {_, %r11}, %rd60;
    mov.b32 %r297, global_smem;
    add.s32 %r315, %r297, %r11;
    ld.shared.v4.b32 {%r316, %r317, %r318, %r319}, [%r315];
    }"""
    assert misaligned(ptx, 128) == ["ld.shared.v4.b32 [%r315] at 1 in thread 2"]
    assert misaligned(ptx.replace("mul.wide.u32 %rd57, %r2, 2147483648", "mul.wide.u32 %rd57, %r8, 0"), 128) == []
