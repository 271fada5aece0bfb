"""Estimators of the MOYU notions on processes whose answers are known."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from moyu_kernels.ops.ffn.simulated import past_means
from moyu_kernels.rules import Rule
from tiny import save_tiny, tiny_model, tiny_settings, tokenizer
from torch import Tensor

from moyu_train.analysis import causal, gap, history, inertia, matched, over_activation
from moyu_train.analysis.subject import SKIP, Seen, Subject, Window, windows
from moyu_train.checkpoints.export import export
from moyu_train.cli import main
from moyu_train.data import Documents
from moyu_train.recipe import load_recipe

DOCUMENTS, LENGTH, NEURONS, MEANING = 60, 48, 512, 8


def process(
    hot: float, topic: float, strength: float, seed: int = 0, documents: int = DOCUMENTS, neurons: int = NEURONS
) -> tuple[Tensor, Tensor]:
    """A simulation: masks `w.e + b + strength * h + noise > 0`, bool `[documents, T, F]`, and e.

    hot: spread of b; topic: share of e that a document's tokens have in common; h: of the document, independent of e.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    own, common = normal(documents, LENGTH, MEANING), normal(documents, 1, MEANING)
    e = torch.nn.functional.normalize(math.sqrt(1 - topic**2) * own + topic * common, dim=-1)
    drive = 1.2 * e @ normal(MEANING, neurons) + hot * normal(neurons) - 1.5
    drive = drive + strength * normal(documents, 1, neurons) + normal(documents, LENGTH, neurons)
    return drive > 0, e


def sequences_of(documents: int, length: int = LENGTH) -> list[Window]:
    ids = torch.arange(documents * length)  # no id twice
    return [Window(d, d * length, ids[d * length :][:length]) for d in range(documents)]


def subject_of(neurons: int) -> Any:
    return SimpleNamespace(blocks=[SimpleNamespace(neurons=neurons)])


def seen(z: Tensor, n: Tensor | None = None, ratio: Tensor | None = None) -> Seen:
    n = z.float() if n is None else n
    return Seen(0, None, n[None], n[None], z[None], ratio)


def siai(z: Tensor, e: Tensor) -> dict[str, Any]:
    sequences = sequences_of(len(z), z.shape[1])
    bank, lags = matched.Bank([z.shape[-1]], sequences), inertia.Lags(subject_of(z.shape[-1]))
    for window, masks in zip(sequences, z, strict=True):
        for stream in (bank, lags):
            stream.see(window, seen(masks))
    flat = e.flatten(0, 1)
    found = matched.siai(bank, lambda a, b: (flat[a] * flat[b]).sum(-1), [lags.rates(0)])
    return found | lags.layers()[0]


@pytest.mark.parametrize(("hot", "topic"), [(0.3, 0.0), (0.3, 0.6), (1.5, 0.6)])
def test_siai_is_nothing_without_inertia_and_rises_with_it(hot: float, topic: float) -> None:
    """Whatever hot neurons and topics do to the raw numbers."""
    none, some, much = (siai(*process(hot, topic, strength)) for strength in (0.0, 0.5, 1.0))
    assert abs(none["siai"]) < 0.03
    assert all(abs(value) < 0.03 for value in none["bands"].values())
    assert some["siai"] > 0.04
    assert much["siai"] > 2 * some["siai"]
    low, high = some["interval"]
    assert low < some["siai"] < high
    assert 0.002 < high - low < 0.05


def test_raw_overlaps_would_mislead() -> None:
    """Jaccard without any inertia above that with much of it; chance correction alone leaves the topic."""
    topical, inert = siai(*process(1.5, 0.6, 0.0)), siai(*process(0.3, 0.0, 1.0))
    assert topical["jaccard"]["1"] > inert["jaccard"]["1"]
    assert topical["siai"] < 0.1 * inert["siai"]
    assert topical["overlap"]["1"] > 0.1
    hot_only = siai(*process(1.5, 0.0, 0.0))
    assert abs(hot_only["overlap"]["1"]) < 0.01 < 0.2 < hot_only["jaccard"]["1"]


def test_intervals_cover() -> None:
    """Without inertia the true value is 0, up to the bins' width."""
    hits = 0
    for seed in range(20):
        low, high = siai(*process(0.3, 0.0, 0.0, seed, documents=12, neurons=32))["interval"]
        hits += low <= 0.002 and high >= -0.002
    assert hits >= 16


def test_intervals_widen_where_documents_differ() -> None:
    """Twice as many tokens of the same documents are no more documents."""
    narrow, wide = siai(*process(0.3, 0.0, 1.0, documents=40)), siai(*process(0.3, 0.0, 1.0, documents=8))
    assert wide["interval"][1] - wide["interval"][0] > 1.5 * (narrow["interval"][1] - narrow["interval"][0])
    assert siai(*process(0.3, 0.0, 1.0, documents=3))["interval"] is None
    assert "siai" not in siai(*process(0.3, 0.0, 1.0, documents=1))


def test_packed_overlaps_are_those_of_the_formula() -> None:
    z, _ = process(0.5, 0.3, 0.5, documents=2, neurons=37)  # no whole bytes
    sequences = sequences_of(2)
    bank = matched.Bank([37], sequences)
    for window, masks in zip(sequences, z, strict=True):
        bank.see(window, seen(masks))
    flat, p = z.flatten(0, 1).double(), z.flatten(0, 1).double().mean(0)
    one, two = torch.randint(96, (50,)), torch.randint(96, (50,))
    expected = ((flat[one] - p) * (flat[two] - p)).sum(-1) / (p * (1 - p)).sum()
    torch.testing.assert_close(bank.overlaps(0, p, one, two), expected)
    torch.testing.assert_close(inertia.overlap(flat[one], flat[two], p), expected)


def test_pairs_stand_where_they_should() -> None:
    bank = matched.Bank([8], sequences_of(5, 200))
    for near in (True, False):
        pairs = matched.draw_pairs(bank, near, torch.Generator().manual_seed(0), 500)
        late, early = pairs.same
        distance = late - early
        assert len(late) == 500
        assert (bank.sequence[late] == bank.sequence[early]).all()
        assert ((distance >= 1) & (distance <= 64) if near else distance > 64).all()
        assert bank.position[early].min() >= SKIP
        first, other = pairs.different
        assert (bank.document[first] != bank.document[other]).all()
        assert set(bank.position[other].tolist()) <= set(bank.position[early].tolist())


def test_the_bank_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matched, "BANK_BYTES", 4 * 300)
    sequences = [Window(i // 10, 50 * i, torch.arange(50)) for i in range(30)]  # 3 documents of 500 tokens
    bank = matched.Bank([32], sequences)
    assert len(bank.ids) == 300
    assert torch.bincount(bank.document).tolist() == [100, 100, 100]


def hau(z: Tensor, ids: Tensor, senses: Tensor | None = None) -> dict[str, float | None]:
    sequences = [Window(0, 0, ids)]
    past = history.History(subject_of(z.shape[-1]), *history.frequent_rows(sequences, senses), senses is not None)
    past.see(sequences[0], seen(z))
    return past.layers()[0]


def test_hau_is_nothing_for_masks_that_the_token_fixes_and_all_for_those_that_ignore_it() -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (4000,), generator=g)
    table = torch.rand(20, 64, generator=g) < 0.3
    assert hau(table[ids], ids)["hau"] == 0
    free = torch.rand(4000, 64, generator=g) < 0.3
    assert hau(free, ids)["hau"] == pytest.approx(1, abs=0.003)  # without the correction 0.993
    half = torch.where(torch.arange(64) < 32, table[ids], free)
    assert 0.35 < hau(half, ids)["hau"] < 0.65


def test_excess_hau_is_what_senses_leave_open() -> None:
    g = torch.Generator().manual_seed(0)
    ids, sense = torch.randint(10, (6000,), generator=g), torch.randint(4, (6000,), generator=g)
    table = torch.rand(10, 4, 64, generator=g) < 0.3
    found = hau(table[ids, sense], ids, sense)
    assert found["hau"] > 0.5
    assert found["excess_hau"] == 0
    rare = torch.arange(6000) // (history.LEAST - 1)
    assert hau(table[ids, sense], rare)["hau"] is None


def test_senses_are_found() -> None:
    g = torch.Generator().manual_seed(0)
    label = torch.arange(600) % 3
    points = torch.eye(3, 32)[label] * 10 + torch.randn(600, 32, generator=g)
    found = history.k_means(points, 3, g)
    pairs = (label * 10 + found).unique()
    assert len(pairs) <= 4  # three clusters, or two where Lloyd's start was unlucky
    assert len(found.unique()) >= 2


def test_flip_margin() -> None:
    past = history.History(subject_of(4), torch.full((SKIP + 1,), -1), torch.zeros(0, dtype=torch.int64), False)
    ratio = torch.full((1, SKIP + 1, 4), 1.0)
    ratio[0, SKIP] = torch.tensor([1.09, 0.92, 1.2, 0.0])
    past.see(Window(0, 0, torch.arange(SKIP + 1)), seen(torch.ones(SKIP + 1, 4, dtype=torch.bool), ratio=ratio))
    assert past.layers()[0] == {"hau": None, "excess_hau": None, "flip_margin": 0.5}


def test_lagged_overlap_is_the_autocorrelation() -> None:
    """Bits that keep their value with probability 0.8 per step and are drawn anew else: rho(k) = 0.8^k."""
    g = torch.Generator().manual_seed(0)
    p = torch.rand(256, generator=g) * 0.8
    fresh, stay = torch.rand(3000, 256, generator=g) < p, torch.rand(3000, 1, generator=g) < 0.8
    rows = [fresh[0]]
    for new, keep in zip(fresh[1:], stay[1:], strict=True):
        rows.append(rows[-1] if keep else new)
    lags = inertia.Lags(subject_of(256))
    lags.see(Window(0, 0, torch.arange(3000)), seen(torch.stack(rows)))
    found = lags.layers()[0]
    for lag in (1, 2, 4, 8):
        assert found["overlap"][str(lag)] == pytest.approx(0.8**lag, abs=0.05)
    assert abs(found["overlap"]["64"]) < 0.05
    assert found["density"] == pytest.approx(p.mean().item(), abs=0.02)


def test_unions_and_stale_masks() -> None:
    g = torch.Generator().manual_seed(0)
    window = Window(0, 0, torch.arange(600))
    free, fixed = torch.rand(600, 400, generator=g) < 0.2, (torch.rand(400, generator=g) < 0.2).expand(600, -1)
    found = []
    for z in (free, fixed):
        lags, unions, stale = (cls(subject_of(400)) for cls in (inertia.Lags, inertia.Unions, inertia.Stale))
        for stream in (lags, unions, stale):
            stream.see(window, seen(z))
        found.append(unions.layers(lags)[0] | stale.layers()[0])
    for length in (1, 4, 16):
        assert found[0]["union"][str(length)] == pytest.approx(1 - 0.8**length, abs=0.02)
        assert found[0]["union_independent"][str(length)] == pytest.approx(1 - 0.8**length, abs=0.02)
        assert found[1]["union"][str(length)] == pytest.approx(found[1]["union"]["1"])
    assert found[1]["stale_error"] == {"1": 0, "8": 0, "64": 0, "prompt": 0}
    for error in found[0]["stale_error"].values():  # a random mask of a fifth holds a fifth of the contribution
        assert error == pytest.approx(0.75, abs=0.04)


def test_stale_error_is_missed_mass_beyond_the_oracle() -> None:
    n = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 3)
    mask = torch.tensor([[False, True, True, False], [True, True, False, False], [False] * 4])
    torch.testing.assert_close(inertia.stale_error(n, mask), torch.tensor([0.2, 0.0, 0.0]))


def test_needed_neurons_by_brute_force() -> None:
    g = torch.Generator().manual_seed(0)
    a, outputs = torch.randn(20, 24, generator=g), torch.randn(24, 8, generator=g)
    a[:, ::3] = 0
    n = a.abs() * outputs.norm(dim=-1)
    found = over_activation.needed(a, n, outputs, 0.2)
    order, whole = n.argsort(-1, descending=True), (a @ outputs).norm(dim=-1)

    def error(token: int, count: int) -> float:
        rest = order[token, count:]
        return ((a[token, rest] @ outputs[rest]).norm() / whole[token]).item()

    for token, count in enumerate(found.tolist()):
        assert error(token, count) <= 0.2 < error(token, count - 1)


def test_over_activation_of_a_model_and_its_levels() -> None:
    model = tiny_model()
    subject = Subject("tiny", model)
    text = Documents([torch.randint(0, 256, (400,), generator=torch.Generator().manual_seed(d)) for d in range(3)])
    found = over_activation.measure(subject, windows(text, 200), tau=0.2, density=None)
    errors: list[float] = []

    def see(one: Seen) -> None:
        outputs = model.model.layers[one.layer].mlp.down_proj.weight.T
        whole, kept = one.a[0] @ outputs, torch.where(one.active, one.a, 0.0)[0] @ outputs
        errors.append(((whole - kept).norm(dim=-1) / whole.norm(dim=-1)).mean().item())

    subject.run(text.tokens[0][None], see)
    assert errors == pytest.approx([0.2, 0.2], abs=0.04)
    for row in found.layers():
        assert row["over_activation"] == pytest.approx(1 - row["needed"], abs=1e-6)  # nothing is exactly zero
    over_activation.measure(subject, windows(text, 200), tau=0.2, density=0.3)
    density: list[float] = []
    subject.run(text.tokens[0][None], lambda one: density.append(one.active.float().mean().item()))
    assert density == pytest.approx([0.3, 0.3], abs=0.05)


def test_cett_ppl_drops_what_costs_nothing() -> None:
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] *= 1e-4  # half of the neurons hardly matter
    subject = Subject("tiny", model)
    text = Documents([torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(d)) for d in range(3)])
    found = over_activation.measure(subject, windows(text, 200), tau=0.2, density=None)
    figure = over_activation.cett_ppl(subject, found, text, 600, percent=0.01, steps=6)
    assert 0.4 < figure["sparsity"] < 0.75
    assert figure["perplexity_ratio"] <= 1.0001


class Scripted:
    """A subject whose masks are a function of the ids, `[B, T, F]`."""

    name, blocks = "scripted", (None,)

    def __init__(self, masks: Any) -> None:
        self.masks = masks

    def run(self, ids: Tensor, see: Any, positions: Tensor | None = None) -> None:
        z = self.masks(ids)
        see(Seen(0, None, z.float(), z.float(), z, None))

    def embeddings(self) -> Tensor:
        return torch.zeros(64, 1)


def text_of(documents: int = 4) -> Documents:
    return Documents(
        [torch.randint(0, 64, (400,), generator=torch.Generator().manual_seed(d)) for d in range(documents)]
    )


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([300, 300, 300], [0, 1, 2, 0, 1, 2]),
        ([900, 300], [0, 1, 0, 1]),
        ([400, 260, 130], [0, 1, 2, 0, 1]),
        ([400, 130, 130], [0, 1, 2]),
        ([2000, 100], []),
        ([400], []),
    ],
)
def test_a_swapped_prefix_is_of_another_document(lengths: list[int], expected: list[int]) -> None:
    documents = Documents([torch.full((length,), index) for index, length in enumerate(lengths)])
    found = [int(ids[0]) for ids in causal.apart(causal.texts(documents, 128), 12)]
    assert found == expected
    assert all(found[i] != found[i - 1] for i in range(len(found)))


def test_interventions_see_memory_and_only_memory() -> None:
    g = torch.Generator().manual_seed(0)
    table, text = torch.rand(64, 256, generator=g) < 0.3, text_of()
    p = [table.double().mean(0).clamp(0.02, 0.98)]

    def forgetful(ids: Tensor) -> Tensor:
        return table[ids]

    def inert(ids: Tensor) -> Tensor:
        """Half of the neurons follow the first tokens of the sequence for ever."""
        start = table[ids[:, 1:5]].float().sum(1, keepdim=True) >= 2
        return torch.where(torch.arange(256) < 128, start, table[ids])

    none, much = (causal.swap(Scripted(masks), text, p)[0] for masks in (forgetful, inert))
    assert none["carry"] == pytest.approx(0, abs=1e-9)
    assert none["kept"] == pytest.approx(1, abs=0.1)
    assert much["carry"] > 0.3
    assert much["kept"] < 0.7
    cells = causal.probe(Scripted(forgetful), text, p)
    assert cells["random_sequence"] == pytest.approx(cells["random_alone"])
    assert cells["index"] is None  # no persistence at all, so no share of it
    cells = causal.probe(Scripted(inert), text, p)
    assert cells["index"] == pytest.approx(1, abs=0.3)  # it does not care for meaning


def test_a_token_at_a_later_position_still_sees_the_one_before() -> None:
    """The probe's tokens stand alone behind one sink token, at the positions that they have in their sequence."""
    subject = Subject("dense", tiny_model())
    subject.levels = [0.0] * len(subject.blocks)

    def second(sink: int) -> torch.Tensor:
        found: list[torch.Tensor] = []
        subject.run(torch.tensor([[sink, 7]]), lambda seen: found.append(seen.a[0, 1]), torch.tensor([[0, 9]]))
        return found[-1]

    assert not torch.allclose(second(1), second(2), rtol=1e-3)


def test_mean_overlap_is_the_mean_over_pairs() -> None:
    z, p = torch.rand(7, 20, generator=torch.Generator().manual_seed(0)) < 0.4, torch.full((20,), 0.4).double()
    pairs = [inertia.overlap(z[i].double(), z[j].double(), p) for i in range(7) for j in range(7) if i != j]
    assert causal.mean_overlap(z, p) == pytest.approx(torch.stack(pairs).mean().item())


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_the_predictor_gap_tells_context_from_memory(memory: float) -> None:
    """Contributions are functions of x (the token and its context) and, with memory, of the inputs before it."""
    hidden, neurons, length, documents = 16, 64, 200, 6
    g = torch.Generator().manual_seed(0)
    table, wide = torch.randn(40, hidden, generator=g), torch.randn(hidden, neurons, generator=g)
    subject: Any = SimpleNamespace(
        blocks=[SimpleNamespace(hidden=hidden, neurons=neurons)] * 2, embeddings=lambda: table, name="made"
    )
    found = gap.Gap(subject)
    assert found.chosen == [1]
    for take in (found.see, found.judge):
        for document in range(documents):
            ids = torch.randint(40, (length,), generator=g)
            context = torch.randn(length, hidden, generator=g)
            x = table[ids] + context
            drive = (x + memory * past_means(x, gap.DECAY, torch.zeros(hidden))) @ wide
            before = x + 3 * torch.randn(length, hidden, generator=g)
            for layer, view in ((0, before), (1, x)):
                n = torch.relu(drive + 2).square()[None]
                take(Window(document, 0, ids), Seen(layer, None, n, n, n > 0, None, view[None]))
    row = found.layers(2)[1]["gap"]
    assert row["oracle"] > row["input"] - 1e-9
    assert row["input"] > row["token"] + 0.05
    assert row["input"] > row["previous"] + 0.05
    extra = row["past"] - row["input"]
    assert extra > 0.02 if memory else abs(extra) < 0.01


def names_in(figures: Any) -> set[str]:
    """Every name of a figure, but those of blocks, lags and models."""
    if isinstance(figures, list):
        return set().union(*map(names_in, figures))
    if not isinstance(figures, dict):
        return set()
    return {name for name in figures if not name.isdigit()}.union(*map(names_in, figures.values()))


def test_the_verb_reports_side_by_side(tmp_path: Path) -> None:
    """Every measure on a dense model and a sparse checkpoint, by the command line: documented figures, offline page."""
    settings = tiny_settings(tmp_path, save_tiny(tmp_path / "model"))
    measures = ["history", "inertia", "senses", "causal", "gap", "cett_ppl"]
    settings["analyze"] = {"tokens": 2000, "sparsities": [0.5], "measures": measures}
    settings["data"]["validation_documents"] = 5
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    rules = [Rule(torch.full((96,), 0.05)) for _ in range(2)]
    export(tiny_model(), tokenizer(), tmp_path / "sparse", "threshold", rules, None, None)
    command = ["analyze", str(tmp_path / "r.yaml"), "--json", str(tmp_path / "f.json")]
    assert main([*command, "--against", str(tmp_path / "sparse")]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert list(figures) == ["model", "sparse"]
    for found in figures.values():
        assert found["perplexity"] > 1
        assert len(found["inertia"]["interval"]) == 2
        assert found["layers"][0]["gap"] is None
        assert found["gap"]["oracle"] > found["gap"]["input"]
        for row in found["layers"]:
            assert {"needed", "hau", "excess_hau", "siai", "siai_interval", "carry", "stale_error"} <= set(row)
    assert figures["sparse"]["inertia"]["density"] < 1
    documented = (Path(__file__).parent.parent / "docs" / "analysis.md").read_text()
    for name in names_in(list(figures.values())) - {"prompt"}:
        assert re.search(rf"[`.]{name}[`.]", documented), f"analyze gives {name}, docs/analysis.md does not explain it"
    page = (tmp_path / "run" / "analysis" / "analysis.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "http" not in page
    assert "SIAI" in page


def test_experts_have_over_activation_alone(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, save_tiny(tmp_path / "model", "mixtral"))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings | {"predictor": None, "bench": None}))
    assert main(["analyze", str(tmp_path / "r.yaml"), "--json", str(tmp_path / "f.json")]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert 0 < figures["over_activation"]["needed"] < 1
    assert "inertia" not in figures
    assert (tmp_path / "run" / "analyze" / "analysis.html").is_file()


def test_measuring_more_trains_no_control_again() -> None:
    key = [load_recipe("m", over).digest("analyze.tokens") for over in ([], ["--analyze.measures", "[]"])]
    assert key[0] == key[1] != load_recipe("m", ["--analyze.tokens", "7"]).digest("analyze.tokens")
