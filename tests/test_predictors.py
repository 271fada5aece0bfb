"""Predictor families against what they are defined as: planted maps, brute force, one token after another."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from moyu_kernels.ops.ffn.naive import PREDICTORS as WITH_OP
from moyu_kernels.ops.ffn.naive import SIMULATED, gated_ffn, predictor_family, predictor_scores, unpack_codes
from moyu_kernels.ops.ffn.simulated import PastMean, past_means
from moyu_kernels.rules import Rule
from tiny import tiny_model, tokenizer

from moyu_train.checkpoints.export import export
from moyu_train.cli import main
from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.evaluation.perplexity import score
from moyu_train.models.blocks import FFNBlock, find_blocks
from moyu_train.models.state import predictors_from_tensors, predictors_to_tensors, stored_bytes, thresholds_to_tensors
from moyu_train.predictors import PREDICTORS
from moyu_train.predictors.block import Block
from moyu_train.predictors.history import History
from moyu_train.predictors.imported import DejaVu, PowerInfer
from moyu_train.predictors.lowbit import LowBit
from moyu_train.predictors.lowrank import LowRank
from moyu_train.predictors.mlp import MLP
from moyu_train.predictors.shared import Shared
from moyu_train.predictors.signs import Signs
from moyu_train.predictors.svd import SVD
from moyu_train.registry import resolve
from moyu_train.settings import Calibrate, Method
from moyu_train.sparsifiers.threshold import Threshold
from moyu_train.training.fit import PredictorTrainer
from moyu_train.training.loop import calibrate_in_loop
from moyu_train.training.rule import calibrate_rule

CPU = torch.device("cpu")
DOCUMENTS = Documents([torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(i)) for i in range(3)])
FILES = tempfile.TemporaryDirectory()
IMPORTED = {"dejavu": "c4_layer{}_-0.98-100.pt", "powerinfer": "model_{}.pt"}


def save_foreign(family: str, folder: Path, bias: bool = False, hidden: int = 32) -> list[torch.nn.Sequential]:
    """Files as the other project writes them, for two layers, and the modules that they hold."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    modules = []
    for layer in range(2):
        first, second = torch.nn.Linear(hidden, 4, bias=bias), torch.nn.Linear(4, 96, bias=bias)
        state = torch.nn.Sequential(first, second).state_dict()
        if family == "powerinfer":
            state = {f"fc{int(name[0]) + 1}{name[1:]}": tensor for name, tensor in state.items()}
        torch.save(state, folder / IMPORTED[family].format(layer))
        between = torch.nn.ReLU() if family == "powerinfer" else torch.nn.Identity()
        modules.append(torch.nn.Sequential(first, between, second))
    return modules


for family in IMPORTED:
    save_foreign(family, Path(FILES.name) / family)

CASES: dict[str, tuple[type, dict]] = {
    "dejavu": (DejaVu, {"folder": f"{FILES.name}/dejavu"}),
    "powerinfer": (PowerInfer, {"folder": f"{FILES.name}/powerinfer"}),
    "block": (Block, {"rank": 4, "block": 16}),
    "history": (History, {"rank": 4, "decay": 0.5}),
    "lowbit": (LowBit, {"bits": 1}),
    "lowrank": (LowRank, {"rank": 4}),
    "mlp": (MLP, {"rank": 8, "batch": 25}),
    "shared": (Shared, {"rank": 4}),
    "signs": (Signs, {}),
    "svd": (SVD, {"rank": 4}),
}


def fitted(family: str, folder: Path, model: torch.nn.Module | None = None) -> tuple:
    model = model or tiny_model()
    rule = calibrate_rule(model, Threshold, Threshold.Options(), 0.5, DOCUMENTS, 600, passes=1)
    cls, options = CASES[family]
    trainer = PredictorTrainer(model, rule.rules, cls, cls.Options(**options), folder)
    return model, rule.rules, trainer.fit(DOCUMENTS.packed(50, 0), save_every=5)


def inputs(tokens: int, hidden: int = 32) -> torch.Tensor:
    """`[tokens, hidden]` that mostly vary in a quarter of the directions."""
    g = torch.Generator().manual_seed(0)
    few = torch.randn(tokens, hidden // 4, generator=g) @ torch.randn(hidden // 4, hidden, generator=g)
    return (few + 0.3 * torch.randn(tokens, hidden, generator=g)) / 2 + 0.2


def contributions(block: FFNBlock, x: torch.Tensor) -> torch.Tensor:
    gate, up, _ = block.weights()
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)).abs() * block.down_norms()


def test_every_family_has_a_case() -> None:
    assert set(CASES) == set(PREDICTORS)


@pytest.mark.parametrize("family", CASES)
def test_storage_form_bytes_and_round_trip(family: str, tmp_path: Path) -> None:
    cls, options = resolve("predictor", Method(name=family, **CASES[family][1]), PREDICTORS)
    _, rules, predictors = fitted(family, tmp_path)
    assert list(predictors[0]) == list((WITH_OP | SIMULATED)[cls.form])
    assert predictor_family(list(predictors[0].values())) == cls.form
    assert stored_bytes(predictors[0]) == cls.planned_bytes(options, 32, 96)
    tensors = thresholds_to_tensors([rule.threshold for rule in rules]) | predictors_to_tensors(predictors)
    again = predictors_from_tensors(tensors)
    assert [list(layer) for layer in again] == [list(layer) for layer in predictors]
    assert all(torch.equal(again[1][name], predictors[1][name]) for name in predictors[1])
    scores = predictor_scores(torch.randn(1, 40, 32), list(predictors[0].values()), torch.nn.functional.silu)
    assert scores.shape == (1, 40, 96)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("family", [family for family in CASES if family not in ("block", *IMPORTED)])
def test_beats_a_fixed_choice_of_neurons(family: str) -> None:
    """At half the neurons per token, on text that it was not fitted on; signs are too coarse for 32 inputs."""
    block = find_blocks(tiny_model())[0]
    x = inputs(6000)
    contribution = contributions(block, x)
    kept = contribution > contribution.flatten().median()
    cls, options = CASES[family]
    options = (
        options | ({"rank": 16} if "rank" in options else {}) | ({"learning_rate": 0.01} if family == "mlp" else {})
    )
    predictor = cls(cls.Options(**options), block, CPU)
    for part in range(0, 4000, 1000):
        place = slice(part, part + 1000)
        predictor.observe(x[place], contribution[place], kept[place])
    scores = predictor_scores(x[None, 4000:], list(predictor.solve().values()), block.activation())[0]
    held = contribution[4000:]

    def mass(chosen: torch.Tensor) -> float:
        return (held.gather(1, chosen.topk(48, dim=1).indices).sum() / held.sum()).item()

    fixed = mass(contribution[:4000].mean(0).expand_as(held))
    assert mass(scores) > fixed + (0.01 if family == "signs" else 0.02)


@pytest.mark.parametrize("family", CASES)
def test_interrupted_fit_goes_on_to_the_same_predictors(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    _, _, whole = fitted(family, tmp_path / "a")
    save = PredictorTrainer._save

    def interrupted(self: PredictorTrainer, path: Path, done: int) -> None:
        save(self, path, done)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PredictorTrainer, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fitted(family, tmp_path / "b")
    _, _, resumed = fitted(family, tmp_path / "b")
    for one, other in zip(whole, resumed, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", CASES)
def test_in_loop_calibration_takes_every_family(family: str, tmp_path: Path) -> None:
    model, rules, predictors = fitted(family, tmp_path)
    _, figures = calibrate_in_loop(
        model, rules, predictors, DOCUMENTS, Calibrate(tokens=600, bytes_skipped=0.2), itemsize=4
    )
    assert abs(figures["bytes_skipped"] - 0.2) <= 0.002


def test_one_bit_codes_are_signs_rounded_for_their_text() -> None:
    block = find_blocks(tiny_model())[0]
    predictor = LowBit(LowBit.Options(bits=1), block, CPU)
    x = inputs(3000)
    predictor.observe(x, contributions(block, x))
    stored = predictor.solve()
    levels = unpack_codes(stored["gate_codes"], 32)
    assert levels.unique().tolist() == [-1, 1]
    gate = block.weights()[0]
    plain = gate.sign() * gate.abs().mean(1, keepdim=True)

    def error(rounded: torch.Tensor) -> float:
        return ((x @ (rounded - gate).T).norm() / (x @ gate.T).norm()).item()

    assert error(levels * stored["gate_scales"][0, :, None]) < 0.8 * error(plain)


def test_signs_count_equal_bits() -> None:
    block = find_blocks(tiny_model())[0]
    predictor = Signs(Signs.Options(), block, CPU)
    x = torch.randn(50, 32)
    predictor.observe(x, contributions(block, x))
    stored = predictor.solve()
    found = predictor_scores(x, list(stored.values()), torch.nn.functional.silu)
    gate = block.weights()[0]
    equal = torch.stack([((row >= 0) == (gate >= 0)).sum(1) for row in x])
    expected = stored["weight"] * (2.0 * equal - 32) / 32 + stored["bias"]
    torch.testing.assert_close(found, expected)


def test_svd_is_the_best_cut_for_the_inputs() -> None:
    """Against the SVD of the weights alone, at the same rank: a smaller error of the products with x."""
    block = find_blocks(tiny_model())[0]
    x = inputs(4000)
    predictor = SVD(SVD.Options(rank=6, ridge=1e-4), block, CPU)
    predictor.observe(x, contributions(block, x))
    stored = predictor.solve()
    whole = SVD(SVD.Options(rank=32, ridge=1e-4), block, CPU)
    whole.load(predictor.state())
    matrix = whole.solve()

    def scores(parts: dict[str, torch.Tensor]) -> torch.Tensor:
        return predictor_scores(x, list(parts.values()), torch.nn.functional.silu)

    full = scores(matrix)
    dense = (matrix["w2"] * matrix["s2"][:, None]) @ (matrix["w1"] * matrix["s1"][:, None])
    u, s, v = torch.linalg.svd(dense, full_matrices=False)
    plain = x @ ((u[:, :6] * s[:6]) @ v[:6]).T + matrix["bias"]
    assert (scores(stored) - full).norm() < 0.5 * (plain - full).norm()


def test_past_means_are_causal_and_equal_decoding_token_by_token() -> None:
    x, start = torch.randn(2, 40, 5), torch.randn(5)
    for decay in (0.0, 0.6, 1.0):
        found = past_means(x, decay, start)
        for row, means in zip(x, found, strict=True):
            state = PastMean(decay, start)
            for token, mean in zip(row, means, strict=True):
                torch.testing.assert_close(state.value(), mean, rtol=1e-4, atol=1e-5)
                state.push(token)
        changed = x.clone()
        changed[:, 20:] += 1
        assert torch.equal(past_means(changed, decay, start)[:, :21], found[:, :21])
        assert not torch.equal(past_means(changed, decay, start)[:, 21], found[:, 21])
    torch.testing.assert_close(past_means(x, 0.0, start)[:, 1:], x[:, :-1])
    torch.testing.assert_close(past_means(x, 1.0, start)[:, 7], x[:, :7].mean(1))


def test_history_finds_what_the_previous_token_decides() -> None:
    """A target that is a map of the previous input: nothing for `lowrank` to find, all of it for `history`."""
    g = torch.Generator().manual_seed(0)
    block = FFNBlock("", torch.nn.Identity(), "gated", "gate", "up", "down", hidden=16, neurons=24)
    x = torch.randn(3000, 16, generator=g)
    before = torch.cat([torch.zeros(1, 16), x[:-1]])
    root = 4 + 0.3 * before @ torch.randn(16, 3, generator=g) @ torch.randn(3, 24, generator=g)
    root = root.clamp_min(0)
    errors = {}
    for name, cls in (("history", History), ("lowrank", LowRank)):
        predictor = cls(cls.Options(rank=3, ridge=1e-6), block, CPU)
        predictor.observe(x, root.square())
        scores = predictor_scores(x[None], list(predictor.solve().values()), torch.nn.functional.silu)[0]
        errors[name] = (scores - root / root.mean())[1:].square().mean() / (root / root.mean()).var(0).mean()
    assert errors["history"] < 0.03 < 0.9 < errors["lowrank"]


def test_history_does_not_cross_documents(tmp_path: Path) -> None:
    """Scores of a document's window do not depend on the documents scored before it."""
    model, rules, predictors = fitted("history", tmp_path)
    seen: list[list[torch.Tensor]] = []
    for documents in (Documents(DOCUMENTS.tokens[1:2]), Documents(DOCUMENTS.tokens[:2])):
        last: list[torch.Tensor] = []
        with SparseMasks(model, rules, predictors, observe=lambda layer, scores: last.append(scores)):  # noqa: B023
            score(model, documents, 1024, "test")
        seen.append(last[-2:])
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


def test_blocks_are_scored_and_selected_as_a_whole(tmp_path: Path) -> None:
    """A planted map from x to blocks is found, though single neurons are noise; through the op all of a block goes."""
    g = torch.Generator().manual_seed(0)
    block = FFNBlock("", torch.nn.Identity(), "gated", "gate", "up", "down", hidden=8, neurons=64)
    x = torch.randn(4000, 8, generator=g)
    root = (4 + 0.3 * x @ torch.randn(8, 2, generator=g) @ torch.randn(2, 4, generator=g)).clamp_min(0)  # of 4 blocks
    noise = torch.rand(4000, 64, generator=g) * 2  # of mean 1
    predictor = Block(Block.Options(rank=2, ridge=1e-6), block, CPU)
    predictor.observe(x, root.square().repeat_interleave(16, dim=1) * noise)
    scores = predictor_scores(x, list(predictor.solve().values()), torch.nn.functional.silu)
    of_blocks = scores.unflatten(1, (4, 16))
    assert torch.equal(of_blocks, of_blocks[..., :1].expand_as(of_blocks))
    found, wanted = of_blocks[..., 0], root / root.mean()
    assert (found - wanted).square().mean() < 0.05 * wanted.var(0).mean()

    model, rules, predictors = fitted("block", tmp_path)
    gate, up, down = find_blocks(model)[0].weights()
    parts = list((predictors[0] | {"bias": predictors[0]["bias"] - 1}).values())
    _, counts = gated_ffn(torch.randn(30, 32), gate, up, down.T, rules[0].threshold, "silu", parts)
    assert (counts[:, 0] % 16 == 0).all()
    assert (counts[:, 1] % 16 != 0).any()
    assert 0 < counts[:, 0].float().mean() < 96


def test_blocks_that_do_not_divide_a_layer_are_refused() -> None:
    with pytest.raises(MoyuError, match=r"predictor\.block 64 does not divide a layer's 96 neurons"):
        Block.planned_bytes(Block.Options(block=64), 32, 96)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", IMPORTED)
def test_imported_predictors_score_as_they_did(family: str, bias: bool, tmp_path: Path) -> None:
    modules = save_foreign(family, tmp_path, bias)
    cls, options = resolve("predictor", Method(name=family, folder=str(tmp_path)), PREDICTORS)
    for block, module in zip(find_blocks(tiny_model()), modules, strict=True):
        predictor = cls(options, block, CPU)
        x = inputs(500)
        predictor.observe(x, contributions(block, x))
        scores = predictor_scores(x, list(predictor.solve().values()), torch.nn.functional.silu)
        expected = module(x).detach()
        expected = expected / expected.square().mean().sqrt()
        assert (scores - expected).norm() < 0.02 * expected.norm()


def llama_with_norms() -> torch.nn.Module:
    """Whose norms have weights that are not all 1, one of them 0."""
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.uniform_(0.2, 3, generator=torch.Generator().manual_seed(3))
            layer.post_attention_layernorm.weight[5] = 0
    return model


@pytest.mark.parametrize("family", ["mlp", *IMPORTED])
def test_powerinfer_selects_what_the_checkpoint_does(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cls, options = CASES[family]
    options = options | ({"biases": False} if family == "mlp" else {})
    model, residual = llama_with_norms(), 7 * inputs(300)
    seen = [layer.post_attention_layernorm(residual).detach() for layer in model.model.layers]
    predictors = []
    for block, x in zip(find_blocks(model), seen, strict=True):
        predictor = cls(cls.Options(**options), block, CPU)
        contribution = contributions(block, x)
        predictor.observe(x, contribution, contribution > contribution.median())
        predictors.append(predictor.solve())
    rules = [Rule(torch.zeros(96), gate="relu", keep="nonzero") for _ in predictors]

    def exported(folder: Path) -> int:
        export(llama_with_norms(), tokenizer(), folder, "relu", rules, predictors, cls.form)
        return main(["export-predictors", str(folder), str(tmp_path / "out")])

    assert exported(tmp_path / "sparse") == 0
    said = capsys.readouterr().out
    assert "2 layers" in said
    threshold = float(said.split()[-1])
    for layer, (predictor, x) in enumerate(zip(predictors, seen, strict=True)):
        state = torch.load(tmp_path / "out" / f"model_{layer}.pt", weights_only=True)
        scores = torch.relu(residual @ state["fc1.weight"].T) @ state["fc2.weight"].T
        chosen = predictor_scores(x, list(predictor.values()), torch.nn.functional.silu) > 0
        assert ((scores >= threshold) == chosen).float().mean() > 0.999  # sums in another order
        assert 0.02 < chosen.float().mean() < 0.98
    predictors[0]["bias"] = predictors[0]["bias"] - 0.5
    assert exported(tmp_path / "cut") == 1
    assert "cut of layer 0 is 0.5, and PowerInfer's predictors read what no norm" in capsys.readouterr().err
    predictors[0]["bias"][3] += 1
    assert exported(tmp_path / "biases") == 1
    assert "predictor of layer 0 has biases" in capsys.readouterr().err


def test_powerinfer_files_are_taken_for_the_residual_that_they_read() -> None:
    folder = Path(FILES.name) / "powerinfer"
    model, residual = llama_with_norms(), 7 * inputs(300)
    residual[:, 5] = 0  # of which the norm leaves nothing
    for block, layer, module in zip(
        find_blocks(model), model.model.layers, save_foreign("powerinfer", folder), strict=True
    ):
        predictor = PowerInfer(PowerInfer.Options(folder=str(folder)), block, CPU)
        x = layer.post_attention_layernorm(residual).detach()
        predictor.observe(x, x)
        scores = predictor_scores(x, list(predictor.solve().values()), torch.nn.functional.silu)
        assert ((scores > 0) == (module(residual) > 0)).float().mean() > 0.98  # int8


@pytest.mark.parametrize("name", ["Gemma", "OLMo 2", "OPT"])  # weight is 1 + w; norm after the FFN; norm with bias
def test_powerinfer_files_for_other_layers_than_llamas_are_refused(name: str) -> None:
    block = find_blocks(zoo.CASES[name].model())[0]
    with pytest.raises(MoyuError, match=r"known for llama, mistral, and .* is of another architecture"):
        PowerInfer(PowerInfer.Options(folder=f"{FILES.name}/powerinfer"), block, CPU)


def test_a_shared_trunk_is_one_matrix_and_alone_it_is_lowrank(tmp_path: Path) -> None:
    _, _, predictors = fitted("shared", tmp_path)
    assert torch.equal(predictors[0]["w1"], predictors[1]["w1"])
    assert not torch.equal(predictors[0]["w2"], predictors[1]["w2"])
    g = torch.Generator().manual_seed(0)
    block = FFNBlock("", torch.nn.Identity(), "gated", "gate", "up", "down", hidden=16, neurons=24)
    x = torch.randn(3000, 16, generator=g) @ torch.randn(16, 16, generator=g)
    directions = torch.randn(16, 3, generator=g)  # the layers' neurons depend on two of them each
    layers = [Shared(Shared.Options(rank=3, ridge=1e-6), block, CPU) for _ in range(2)]
    roots = [
        (9 + 0.1 * x @ directions[:, own : own + 2] @ torch.randn(2, 24, generator=g)).clamp_min(0) for own in (0, 1)
    ]
    for layer, root in zip(layers, roots, strict=True):
        layer.observe(x, root.square())
    alone = LowRank(layers[0].options, block, CPU)
    alone.load(layers[0].state())
    single = Shared(layers[0].options, block, CPU)
    single.load(layers[0].state())

    def scores(predictor: LowRank) -> torch.Tensor:
        return predictor_scores(x, list(predictor.solve().values()), torch.nn.functional.silu)

    torch.testing.assert_close(scores(single), scores(alone), rtol=0, atol=0.02)
    Shared.together(layers)
    for layer, root in zip(layers, roots, strict=True):
        wanted = root / root.mean()
        assert (scores(layer) - wanted).square().mean() < 0.01 * wanted.var(0).mean()


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def test_foreign_files_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block, options = find_blocks(tiny_model())[1], PowerInfer.Options(folder=str(tmp_path))

    def refused(match: str, cls: Any = PowerInfer) -> None:
        with pytest.raises(MoyuError, match=match):
            cls(options, block, CPU)

    refused(r"has predictors of the layers \[\]; it needs one file a layer")
    save_foreign("powerinfer", tmp_path, hidden=31)
    refused(r"has fc1\.weight \[4, 31\] and fc2\.weight \[96, 4\]; the block needs \[R, 32\] and \[96, R\]")
    refused(r"model_1\.pt holds fc1\.weight, fc2\.weight; predictor 'dejavu' needs 0\.weight, 1\.weight", DejaVu)
    torch.save({"fc1.weight": torch.ones(4), "fc2.weight": torch.ones(96, 4)}, tmp_path / "model_1.pt")
    refused(r"both must be matrices")
    torch.save({"fc1.weight": torch.full((4, 32), torch.nan), "fc2.weight": torch.ones(96, 4)}, tmp_path / "model_1.pt")
    refused("values that are not finite")
    torch.save({"fc1.weight": Evil()}, tmp_path / "model_1.pt")
    refused("could not be read as a state dict of tensors and nothing else")
    (tmp_path / "model_1.pt").write_bytes(b"not a file of torch's")
    refused("could not be read")
    assert "code ran" not in capsys.readouterr().out
    (tmp_path / "model_1.pt").unlink()
    refused("has 1 layers and the model has more")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "model_0.pt").symlink_to(tmp_path / "model_0.pt")
    options = PowerInfer.Options(folder=str(tmp_path / "inside"))
    refused("is a link out of the folder")


def trained(**options: float) -> tuple[float, float]:
    """Recall and precision of an MLP at score 0 on text that it was not trained on."""
    block = find_blocks(tiny_model())[0]
    x = inputs(8000)
    contribution = contributions(block, x)
    kept = contribution > contribution.flatten()[:300_000].quantile(0.9)
    predictor = MLP(MLP.Options(rank=16, learning_rate=3e-3, **options), block, CPU)
    for part in range(0, 6000, 1000):
        predictor.observe(x[part : part + 1000], contribution[part : part + 1000], kept[part : part + 1000])
    chosen = predictor_scores(x[6000:], list(predictor.solve().values()), torch.nn.functional.silu) > 0
    hit = (chosen & kept[6000:]).sum()
    return (hit / kept[6000:].sum()).item(), (hit / chosen.sum().clamp_min(1)).item()


def test_weights_of_the_loss_trade_precision_for_recall() -> None:
    plain, weighted = trained(negative_weight=1.0), trained()
    assert weighted[0] > plain[0] + 0.2
    assert weighted[1] < plain[1]


def test_loss_is_the_formula() -> None:
    block = find_blocks(tiny_model())[0]
    logits, kept = torch.tensor([[0.5, -1.0], [2.0, 0.1]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    p = logits.sigmoid()
    weight = torch.where(kept > 0, 1.0, 0.5 + 0.005)
    plain = -(kept * p.log() + (1 - kept) * (1 - p).log())
    truth = kept * p + (1 - kept) * (1 - p)
    for focal in (0.0, 2.0):
        found = MLP(MLP.Options(rank=2, focal=focal), block, CPU).loss(logits, kept)
        torch.testing.assert_close(found, (weight * plain * (1 - truth) ** focal).mean())


def test_an_mlp_that_has_diverged_is_refused_by_name() -> None:
    block = find_blocks(tiny_model())[0]
    predictor = MLP(MLP.Options(rank=2), block, CPU)
    predictor.sums["w1"].fill_(float("inf"))
    with pytest.raises(MoyuError, match=r"predictor of model\.layers\.0\.mlp has diverged; lower"):
        predictor.solve()


def test_ops_refuse_families_that_they_do_not_compute(tmp_path: Path) -> None:
    model, rules, predictors = fitted("history", tmp_path)
    gate, up, down = find_blocks(model)[0].weights()
    arguments = (torch.randn(1, 32), gate, up, down.T, rules[0].threshold, "silu", list(predictors[0].values()))
    with pytest.raises(ValueError, match="predictor 'history' has no op"):
        gated_ffn(*arguments)


WORKER = """
import sys, torch
sys.path[:0] = {paths!r}
import test_predictors as tests
rank, family, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{{folder}}/meet", rank=rank, world_size=2)
predictor = tests.observe(family, [rank, rank + 2])
predictor.gather()
torch.save(predictor.state(), f"{{folder}}/{{rank}}.pt")
"""


def observe(family: str, windows: list[int], together: bool = False) -> Any:
    """A predictor that has seen some of four windows; `together`: two by two as one, as two processes take them."""
    block = find_blocks(tiny_model())[0]
    x = inputs(400)
    contribution = contributions(block, x)
    kept = contribution > contribution.flatten().median()
    cls, options = CASES[family]
    options = options | ({"batch": 200 if together else 100, "negative_weight": 1.0} if family == "mlp" else {})
    predictor = cls(cls.Options(**options), block, CPU)
    parts = [windows[:2], windows[2:]] if together else [[window] for window in windows]
    for part in parts:
        place = torch.cat([torch.arange(100 * window, 100 * window + 100) for window in part])
        predictor.observe(x[place], contribution[place], kept[place])
    return predictor


@pytest.mark.parametrize("family", ["history", pytest.param("mlp", marks=pytest.mark.slow)])
def test_two_processes_fit_what_one_does(family: str, tmp_path: Path) -> None:
    """Sums add up; steps of `mlp` are common ones."""
    code = WORKER.format(paths=[str(Path(__file__).parent)])
    processes = [subprocess.Popen([sys.executable, "-c", code, str(rank), family, str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(120) for process in processes] == [0, 0]
    expected = observe(family, [0, 1, 2, 3], together=family == "mlp").state()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
