"""The three MOYU notions of one model, as figures: over-activation, history-related uncertainty, inertia.

What is measured and how to read it: docs/analysis.md.
"""

from typing import Any

from moyu_train.analysis import causal, history, inertia, matched, over_activation
from moyu_train.analysis.gap import measure_gap
from moyu_train.analysis.subject import Seen, Subject, Window, read, windows
from moyu_train.data import Documents
from moyu_train.models.context import longest_window
from moyu_train.progress import console
from moyu_train.settings import Analyze

CALIBRATION = 512  # tokens, in sequences of 256, for the needed neurons and the levels


def measure(subject: Subject, documents: Documents, settings: Analyze) -> dict[str, Any]:
    """Figures of `settings.measures`, each notion with means over layers; `layers` one row a block.

    Layers of experts have no order of tokens: of such models only over-activation is measured.
    """
    wanted = set(settings.measures)
    documents = documents.first(settings.tokens)
    rows: list[dict[str, Any]] = [{} for _ in subject.blocks]
    figures: dict[str, Any] = {"layers": rows}
    few = windows(documents.first(min(CALIBRATION, settings.tokens)), longest_window(subject.model, 256))
    found = over_activation.measure(subject, few, settings.tau, settings.density)
    _join(rows, found.layers())
    figures["over_activation"] = {"tau": settings.tau} | _means(rows, "over_activation", "needed")
    if "cett_ppl" in wanted:
        figures["over_activation"]["cett_ppl"] = over_activation.cett_ppl(
            subject, found, documents, settings.tokens, percent=1.0, steps=6
        )
    if not subject.ordered:
        console.print(f"{subject.name}: experts see tokens without their order, history and inertia are not measured")
        return figures
    sequences = windows(documents, longest_window(subject.model))
    if "gap" in wanted:
        figures["gap"], gaps = measure_gap(subject, sequences)
        _join(rows, gaps)
    streams: list[Any] = []
    lags, unions, stale = inertia.Lags(subject), inertia.Unions(subject), inertia.Stale(subject)
    if "history" in wanted or "senses" in wanted:
        senses = history.find_senses(subject, sequences) if "senses" in wanted else None
        past = history.History(subject, *history.frequent_rows(sequences, senses), senses is not None)
        streams.append(past)
    if "inertia" in wanted or "causal" in wanted:
        bank = matched.Bank([block.neurons for block in subject.blocks], sequences)
        streams += [lags, unions, stale, bank]
    if not streams:
        return figures

    def see(window: Window, seen: Seen) -> None:
        for stream in streams:
            stream.see(window, seen)

    read(subject, sequences, see, "masks")
    if "history" in wanted or "senses" in wanted:
        _join(rows, past.layers())
        figures["history"] = _means(rows, "hau", "excess_hau", "flip_margin") | past.covered()
    if "inertia" in wanted or "causal" in wanted:
        rates = [lags.rates(layer) for layer in range(len(rows))]
        similar = matched.siai(bank, matched.Meaning(subject.embeddings(), bank), rates)
        for part in (lags.layers(), unions.layers(lags), stale.layers(), similar.pop("layers", [])):
            _join(rows, part)
        figures["inertia"] = similar | _means(rows, "density")
        for name in ("overlap", "jaccard", "recall", "union", "union_independent", "stale_error"):
            keys = rows[0][name]
            figures["inertia"][name] = {key: sum(row[name][key] for row in rows) / len(rows) for key in keys}
    if "causal" in wanted:
        _join(rows, causal.swap(subject, documents, rates))
        cells = causal.probe(subject, documents, rates)
        _join(rows, cells.pop("layers"))
        figures["inertia"] |= _means(rows, "carry", "topic", "kept") | {"probe": cells}
    return figures


def _join(rows: list[dict[str, Any]], parts: list[dict[str, Any]]) -> None:
    for row, part in zip(rows, parts, strict=False):
        row |= part


def _means(rows: list[dict[str, Any]], *names: str) -> dict[str, float | None]:
    """Over the layers that have the figure."""
    found: dict[str, float | None] = {}
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        found[name] = sum(values) / len(values) if values else None
    return found
