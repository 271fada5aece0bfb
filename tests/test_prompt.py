"""Masks that are taken from the first tokens of a sequence and then stay."""

import copy
from pathlib import Path
from typing import Any

import moyu_kernels
import pytest
import torch
from moyu_kernels.modules import set_mode
from moyu_kernels.ops.ffn import naive
from moyu_kernels.prompt_ffn import PromptFFN
from moyu_kernels.seam import Seam
from tiny import CONFIGS, randomised, save_tiny, tiny_model, tiny_settings, tokenizer
from transformers import DynamicCache

from moyu_train.checkpoints.export import export
from moyu_train.checkpoints.verify import verify
from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.evaluation.bench_bytes import ffn_read
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.evaluation.perplexity import score
from moyu_train.evaluation.stage import evaluate_checkpoint
from moyu_train.models.blocks import find_blocks
from moyu_train.pipeline import Run
from moyu_train.recipe import Recipe
from moyu_train.registry import resolve
from moyu_train.settings import Method
from moyu_train.sparsifiers import SPARSIFIERS
from moyu_train.training.control import SparsityControl
from moyu_train.training.rule import calibrate_rule

DOCUMENTS = Documents([torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(i)) for i in range(6)])
IDS = torch.stack([document[:20] for document in DOCUMENTS.tokens[:3]])
PROMPT, DENSITY = 8, 0.3


def calibrated(name: str, model: torch.nn.Module) -> Any:
    cls, options = resolve("sparsifier", Method(name=name, prompt=PROMPT), SPARSIFIERS)
    return calibrate_rule(model, cls, options, DENSITY, DOCUMENTS, 600, passes=2)


@pytest.mark.parametrize("name", ["griffin", "tda"])
def test_the_mask_is_that_of_the_first_tokens(name: str) -> None:
    model = tiny_model()
    sparsifier = calibrated(name, model)
    block, seen = find_blocks(model)[0], []
    watch = Seam(block.module, block.down, lambda a: (seen.append(a), a)[1])
    with torch.no_grad():
        model(IDS)
    watch.remove()
    a, rule = seen[0], sparsifier.rules[0]
    mask = rule.mask(a)
    assert mask[:, :PROMPT].all()
    for row, found in zip(a, mask, strict=True):
        shares = row[:PROMPT] / row[:PROMPT].norm(dim=-1, keepdim=True)
        statistic = shares.norm(dim=0) / PROMPT**0.5
        if name == "griffin":
            expected = statistic >= statistic.sort(descending=True).values[round(DENSITY * 96) - 1]
            assert expected.sum() == round(DENSITY * 96)
        else:
            expected = statistic >= rule.threshold
        assert (found[PROMPT:] == expected).all()
    assert (mask[0, PROMPT] != mask[1, PROMPT]).any(), "every sequence has a mask of its own"


@pytest.mark.parametrize("short", [0, 40])
def test_the_level_keeps_the_density_after_the_prompt(short: int) -> None:
    """short: documents that end within the prompt, and so have no say."""
    model = tiny_model()
    cls, options = resolve("sparsifier", Method(name="tda", prompt=PROMPT), SPARSIFIERS)
    few = [torch.randint(0, 256, (4,), generator=torch.Generator().manual_seed(i)) for i in range(short)]
    text = Documents([*DOCUMENTS.tokens, *few])
    sparsifier = calibrate_rule(model, cls, options, DENSITY, text, 10_000, passes=2)
    with SparseMasks(model, sparsifier.rules, None) as masks:
        score(model, DOCUMENTS, 1024, "test")
    tokens = DOCUMENTS.total
    after = tokens - PROMPT * len(DOCUMENTS.tokens)
    kept = (masks.counts.kept / 96 - (tokens - after)) / after
    assert (kept - DENSITY).abs().max() < 0.03


def test_text_that_ends_with_the_prompt_is_refused() -> None:
    cls, options = resolve("sparsifier", Method(name="tda", prompt=64), SPARSIFIERS)
    with pytest.raises(MoyuError, match="no sequence of the calibration text goes on behind the 64 tokens"):
        calibrate_rule(tiny_model(), cls, options, DENSITY, DOCUMENTS, 600, passes=1)


@pytest.mark.parametrize("name", ["griffin", "tda"])
def test_decoding_in_pieces_uses_the_mask_of_the_whole(tmp_path: Path, name: str) -> None:
    model = tiny_model()
    sparsifier = calibrated(name, model)
    with SparseMasks(model, sparsifier.rules, None):
        expected = model(IDS).logits
    export(model, tokenizer(), tmp_path / "sparse", name, sparsifier.rules, None, None)
    found = moyu_kernels.from_pretrained(tmp_path / "sparse")
    for pieces in ([20], [8, 12], [10, *[1] * 10], [5, 1, 1, 1, 1, 11], [1] * 20):  # a new sequence each
        cache, logits = None, []
        for ids in IDS.split(pieces, dim=1):
            output = found(ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)
    generated = found.generate(IDS[:1], max_new_tokens=6, do_sample=False)
    with SparseMasks(model, sparsifier.rules, None):
        again = IDS[:1]
        for _ in range(6):
            again = torch.cat([again, model(again).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, again)


@pytest.mark.parametrize(("name", "family"), [("griffin", "llama"), ("tda", "llama"), ("griffin", "gpt2")])
def test_the_runner_decodes_by_the_masks_of_each_sequence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, family: str
) -> None:
    model = tiny_model(family)
    sparsifier = calibrated(name, model)
    export(model, tokenizer(), tmp_path / "sparse", name, sparsifier.rules, None, None)
    found = moyu_kernels.from_pretrained(tmp_path / "sparse")
    runner = moyu_kernels.Runner(found, max_length=20)
    assert "moyu:" not in caplog.text
    with SparseMasks(model, sparsifier.rules, None):
        expected = model(IDS).logits
    for row, prompt in ((0, 12), (1, 12), (2, 3), (0, 8)):  # longer and shorter than what masks are taken from
        ids = IDS[row : row + 1]
        logits = [runner.prefill(ids[:, :prompt]), *(runner.step(token) for token in ids[0, prompt:])]
        torch.testing.assert_close(torch.cat(logits), expected[row, prompt - 1 :], rtol=1e-4, atol=1e-4)
    assert len(runner._steps) == 1, "all masks run the one compiled step"
    assert caplog.text.count("steps until then read all neurons") == 1
    blocks = [module for module in found.modules() if isinstance(module, PromptFFN)]
    for block in blocks:
        block.counts.zero_()
    runner.seek(12)
    runner.step(int(IDS[0, 12]))
    kept = [int(block.prompt_rule.prompt_keeps(block.state.statistic).sum()) for block in blocks]
    assert [block.counts.tolist() for block in blocks] == [[1, count, count] for count in kept]
    assert all(0 < count < 0.5 * blocks[0].neurons for count in kept)
    with pytest.raises(ValueError, match="position 5 is within the 8 tokens that this model's masks are taken from"):
        runner.seek(5)


def test_what_has_no_op_says_that_its_steps_are_not_compiled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    config.mlp_bias = True
    model = randomised(config)
    sparsifier = calibrated("griffin", model)
    with SparseMasks(model, sparsifier.rules, None):
        expected = model(IDS[:1]).logits
    export(model, tokenizer(), tmp_path / "sparse", "griffin", sparsifier.rules, None, None)
    runner = moyu_kernels.Runner(moyu_kernels.from_pretrained(tmp_path / "sparse"), max_length=20)
    assert "is simulated" in caplog.text
    assert "steps are not compiled" in caplog.text
    logits = [runner.prefill(IDS[:1, :12]), *(runner.step(token) for token in IDS[0, 12:])]
    torch.testing.assert_close(torch.stack(logits, dim=1), expected[:, 11:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", ["stored", "int8"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_of_a_batch_have_their_own_masks(tmp_path: Path, backend: str, weights: str) -> None:
    model = tiny_model()
    sparsifier = calibrated("tda", model)
    export(model, tokenizer(), tmp_path / "sparse", "tda", sparsifier.rules, None, None, weights=weights)
    found = moyu_kernels.from_pretrained(tmp_path / "sparse", backend=backend)
    whole = found(IDS, use_cache=False).logits
    runner = moyu_kernels.Runner(found, max_length=20, batch=3, compile=False)
    logits = [runner.prefill(IDS[:, :12]), *(runner.step(IDS[:, i : i + 1]) for i in range(12, 20))]
    torch.testing.assert_close(torch.stack(logits, dim=1), whole[:, 11:], rtol=1e-4, atol=1e-4)
    block = next(module for module in found.modules() if isinstance(module, PromptFFN))
    assert len({tuple(row) for row in naive.unpack_mask(block.mask, 3).tolist()}) == 3
    with pytest.raises(ValueError, match="masks were taken from 3 prompts, and here are 2"):
        block(torch.zeros(2, 1, 32))


def test_only_kept_rows_are_read_by_steps(tmp_path: Path) -> None:
    model = tiny_model()
    sparsifier = calibrated("griffin", model)
    export(model, tokenizer(), tmp_path / "sparse", "griffin", sparsifier.rules, None, None)
    found = moyu_kernels.from_pretrained(tmp_path / "sparse")
    block = next(module for module in found.modules() if isinstance(module, PromptFFN))
    block(torch.randn(2, PROMPT, 32))
    x = torch.randn(2, 1, 32)
    expected = block(x)
    union = int(block.mask.count_nonzero())
    assert DENSITY * 96 < union < 96
    for rows in block._rows:
        rows[union:] = torch.nan
    for weight in block.weights:
        weight.data.fill_(torch.nan)
    assert torch.equal(block(x), expected)


def test_more_sequences_than_the_op_takes_are_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    sparsifier = calibrated("griffin", model)
    export(model, tokenizer(), tmp_path / "sparse", "griffin", sparsifier.rules, None, None)
    found = moyu_kernels.from_pretrained(tmp_path / "sparse")
    ids = torch.randint(256, (9, 14), generator=torch.Generator().manual_seed(0))
    cache = found(ids[:, :10], use_cache=True).past_key_values
    assert "9 sequences at once run dense matmuls" in caplog.text
    logits = [found(ids[:, i : i + 1], past_key_values=cache).logits[:, 0] for i in range(10, 14)]
    torch.testing.assert_close(torch.stack(logits, dim=1), found(ids).logits[:, 10:], rtol=1e-4, atol=1e-4)


def test_a_cache_of_another_sequence_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    export(model, tokenizer(), tmp_path / "sparse", "griffin", calibrated("griffin", model).rules, None, None)
    found = moyu_kernels.from_pretrained(tmp_path / "sparse")
    caches = [DynamicCache(), DynamicCache()]
    for cache, prompt in zip(caches, (12, 12), strict=True):
        found(IDS[:1, :prompt], past_key_values=cache)
    with pytest.raises(ValueError, match="not that of the sequence whose prompt the masks were taken from"):
        found(IDS[:1, 12:13], past_key_values=caches[0])
    found(IDS[:1, 12:13], past_key_values=caches[1])
    set_mode(found, "dense")
    cache = DynamicCache()
    found(IDS[:1, :5], past_key_values=cache)
    set_mode(found, "rule")
    with pytest.raises(ValueError, match="the cache holds 5 tokens and masks from the prompt have seen 0"):
        found(IDS[:1, 5:6], past_key_values=cache)


@pytest.mark.parametrize("compiled", [True, False])
def test_masks_of_a_sequence_decoded_elsewhere_are_refused(tmp_path: Path, compiled: bool) -> None:
    model = tiny_model()
    export(model, tokenizer(), tmp_path / "sparse", "griffin", calibrated("griffin", model).rules, None, None)
    found = moyu_kernels.from_pretrained(tmp_path / "sparse")
    refused = pytest.raises(ValueError, match="not that of the sequence whose prompt the masks were taken from")
    for later in ({"use_cache": True}, {"use_cache": True, "return_dict": False}, {"use_cache": False}):
        first = found(IDS[:1, :12], use_cache=True).past_key_values
        output = found(IDS[1:2, :12], **later)
        with refused:
            found(IDS[:1, 12:13], past_key_values=first)
        if later["use_cache"]:
            found(IDS[1:2, 12:13], past_key_values=output[1])
    set_mode(found, "dense")
    found(IDS[:1, 12:13], past_key_values=first)
    set_mode(found, "rule")
    with refused:
        found(IDS[:1, 13:14], past_key_values=first)

    runners = [moyu_kernels.Runner(found, max_length=20, compile=compiled) for _ in range(2)]
    for runner, ids in zip(runners, IDS, strict=False):
        runner.prefill(ids[None, :12])
    with refused:
        runners[0].step(IDS[0, 12])
    assert runners[0].position == 12
    expected = found(IDS[1:2, :13], use_cache=True).logits[:, -1]
    with refused:
        runners[1].step(IDS[1, 12])
    runners[1].prefill(IDS[1:2, :12])
    torch.testing.assert_close(runners[1].step(IDS[1, 12]), expected, rtol=1e-4, atol=1e-4)


def test_a_compiled_step_goes_on_after_another_backend(tmp_path: Path) -> None:
    model = tiny_model()
    sparsifier = calibrated("griffin", model)
    export(model, tokenizer(), tmp_path / "sparse", "griffin", sparsifier.rules, None, None)
    found = moyu_kernels.from_pretrained(tmp_path / "sparse")
    runner = moyu_kernels.Runner(found, max_length=20)
    with SparseMasks(model, sparsifier.rules, None):
        expected = model(IDS[1:2]).logits[0, 11:]
    set_mode(found, "rule", "reference")
    logits = [runner.prefill(IDS[1:2, :12])]
    for i, backend in enumerate(("reference", "cpu", "reference", "cpu")):
        set_mode(found, "rule", backend)
        found.float()  # which changes nothing, but starts the masks anew
        runner.prefill(IDS[1:2, : 12 + i])
        logits.append(runner.step(IDS[1, 12 + i]))
    for i, backend in enumerate(("cpu", "reference", "cpu", "cpu")):  # in the middle of a sequence
        set_mode(found, "rule", backend)
        logits.append(runner.step(IDS[1, 16 + i]))
    assert len(runner._steps) == 2, "one for each backend"
    torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-4, atol=1e-4)


def test_another_backend_and_a_move_keep_the_masks_right(tmp_path: Path) -> None:
    model = tiny_model()
    sparsifier = calibrated("griffin", model)
    export(model, tokenizer(), tmp_path / "sparse", "griffin", sparsifier.rules, None, None)
    found = moyu_kernels.from_pretrained(tmp_path / "sparse")
    with SparseMasks(model, sparsifier.rules, None):
        expected = model(IDS[:1]).logits[:, 12:16]
    cache = DynamicCache()
    found(IDS[:1, :12], past_key_values=cache)
    logits = []
    for i, backend in enumerate(("cpu", "reference", "cpu", "reference")):  # in the middle of a sequence
        set_mode(found, "rule", backend)
        logits.append(found(IDS[:1, 12 + i : 13 + i], past_key_values=cache).logits[:, 0])
    torch.testing.assert_close(torch.stack(logits, dim=1), expected, rtol=1e-4, atol=1e-4)
    set_mode(found, "rule", "cpu")
    found.to(torch.bfloat16)
    with pytest.raises(ValueError, match="have seen 0"):
        found(IDS[:1, 16:17], past_key_values=cache)
    assert found(IDS[:1], use_cache=False).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["griffin", "tda"])
def test_figures_are_those_of_decode_steps(tmp_path: Path, name: str) -> None:
    model = tiny_model()
    sparsifier = calibrated(name, model)
    with SparseMasks(model, sparsifier.rules, None) as masks:
        model(IDS)
    export(model, tokenizer(), tmp_path / "sparse", name, sparsifier.rules, None, None)
    found = moyu_kernels.from_pretrained(tmp_path / "sparse")
    runner = moyu_kernels.Runner(found, max_length=20, compile=False)
    blocks = [module for module in found.modules() if isinstance(module, PromptFFN)]
    total = torch.zeros(3, dtype=torch.int64)
    for row in IDS:
        runner.prefill(row[None, :PROMPT])
        before = sum(block.counts.clone() for block in blocks)
        for token in row[PROMPT:]:
            runner.step(token)
        total += sum(block.counts for block in blocks) - before
    tokens, selected, kept = total.tolist()
    assert tokens == 2 * 3 * 12
    skipped = 1 - ((2 * selected + kept) * 128 + 5 * 96 * tokens) / (tokens * 3 * 96 * 128)
    assert masks.bytes_skipped(4) == pytest.approx(skipped)
    for block in blocks:
        block.counts.zero_()
    runner.prefill(IDS[:1, :PROMPT])
    for block in blocks:
        block.counts.zero_()
    runner.step(IDS[0, PROMPT])
    kept_now = sum(block.counts[2].item() for block in blocks)
    read, dense = ffn_read(found, masks.blocks)
    assert read / dense == pytest.approx((3 * kept_now * 128 + 2 * 5 * 96) / (2 * 3 * 96 * 128))
    with SparseMasks(model, sparsifier.rules, None) as short:
        model(IDS[:, :PROMPT])
    with pytest.raises(MoyuError, match="no decode step was counted"):
        short.bytes_skipped(4)


def test_verify_decodes_after_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    export(model, tokenizer(), tmp_path / "sparse", "griffin", calibrated("griffin", model).rules, None, None)
    assert verify(tmp_path / "sparse")["stock_refuses"]
    monkeypatch.setattr("moyu_kernels.prompt_ffn.pack_mask", lambda keep: naive.pack_mask(~keep))
    with pytest.raises(MoyuError, match="logits are not the rule's"):
        verify(tmp_path / "sparse")


def test_a_checkpoint_is_evaluated_through_the_kernels(tmp_path: Path) -> None:
    model = tiny_model()
    export(model, tokenizer(), tmp_path / "sparse", "tda", calibrated("tda", model).rules, None, None)
    figures = evaluate_checkpoint(tmp_path / "sparse", DOCUMENTS, 64, 64)
    assert not figures["simulated"]
    assert figures["bytes_skipped"] > 0.6
    assert figures["neurons_off"] < figures["bytes_skipped"], "the prompt keeps all and is not decoded"
    kernels = figures["kernels"]
    assert kernels["fp32_perplexity"] == pytest.approx(kernels["masked_perplexity"], rel=1e-3)


def test_what_does_not_go_with_masks_from_the_prompt_is_refused(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, save_tiny(tmp_path / "model"))
    settings |= {"sparsifier": {"name": "griffin", "prompt": 16}}
    with pytest.raises(MoyuError, match="'griffin' names the neurons of a whole sequence"):
        Run(Recipe.model_validate(settings | {"bench": None}))
    settings |= {"predictor": None, "bench": {"contexts": [8, 64]}}
    with pytest.raises(MoyuError, match=r"first 16 tokens .* bench.contexts has 8"):
        Run(Recipe.model_validate(settings))
    Run(Recipe.model_validate(settings | {"bench": {"contexts": [16]}}))


def test_training_text_padded_where_masks_are_taken_is_refused() -> None:
    model = tiny_model()
    control = SparsityControl(model, calibrated("griffin", model), DENSITY)
    real = torch.ones_like(IDS)
    real[0, -3:] = 0
    with control.armed(True, real):
        model(IDS, attention_mask=real)
    with pytest.raises(MoyuError, match="pad on the right"), control.armed(True, real.flip(1)):
        model(IDS)


def test_padding_and_blocks_without_sequences_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    sparsifier = calibrated("griffin", model)
    export(model, tokenizer(), tmp_path / "sparse", "griffin", sparsifier.rules, None, None)
    found = moyu_kernels.from_pretrained(tmp_path / "sparse")
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="cannot tell padding from text"):
        found(IDS, attention_mask=mask)
    with pytest.raises(ValueError, match=r"need blocks that see sequences .* here is \[20, 96\]"):
        sparsifier.rules[0].mask(torch.ones(20, 96))


@pytest.mark.parametrize("section", ["finetune", "evaluate"])
def test_windows_that_end_with_the_prompt_are_refused(tmp_path: Path, section: str) -> None:
    settings = tiny_settings(tmp_path, save_tiny(tmp_path / "model"))
    settings |= {"sparsifier": {"name": "griffin", "prompt": 16}, "predictor": None, "bench": None}
    Run(Recipe.model_validate(settings))
    settings[section] |= {"window": 16}
    with pytest.raises(MoyuError, match=rf"{section}.window is 16: lower sparsifier.prompt"):
        Run(Recipe.model_validate(settings))
