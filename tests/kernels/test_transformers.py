"""A loaded sparse model under the tools of transformers: batches, padding, pipelines, chat, sharded weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from moyu_kernels import from_pretrained
from moyu_kernels.checkpoint import CheckpointError
from peft import LoraConfig, get_peft_model
from sparse_checkpoints import tiny_llama, write_checkpoint, write_manifest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, pipeline

Factory = Callable[..., Path]


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(126)} | {"<pad>": 126, "</s>": 127}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", padding_side="left")
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made


@pytest.mark.parametrize("family", ["lowbit", None])
def test_a_left_padded_batch_writes_what_its_rows_write(checkpoint: Factory, family: str | None) -> None:
    model = from_pretrained(checkpoint(tiny_llama(torch.float32), family=family))
    # each longer than 8 tokens, which alone would be rows of one predicted call
    prompts = [" ".join(f"w{(7 * i + seed) % 120}" for i in range(length)) for seed, length in enumerate((14, 9, 11))]
    batch = tokenizer()(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    assert batch["attention_mask"].sum() == 34
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=127, pad_token_id=126)
    together = model.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :]
    for prompt, row in zip(prompts, together, strict=True):
        ids = tokenizer()(prompt, return_tensors="pt", return_token_type_ids=False)
        alone = model.generate(**ids, generation_config=settings)[0, ids["input_ids"].shape[1] :]
        assert row[: len(alone)].tolist() == alone.tolist()


def test_the_text_generation_pipeline_and_a_chat(checkpoint: Factory) -> None:
    model = from_pretrained(checkpoint(tiny_llama(torch.float32)))
    write = pipeline("text-generation", model=model, tokenizer=tokenizer())
    settings = {"max_new_tokens": 4, "do_sample": False}
    text = write("w5 w9", **settings)[0]["generated_text"]
    assert text.startswith("w5 w9")
    assert text.count("w") == 6
    talk = write([{"role": "user", "content": "w5 w9"}], **settings)[0]["generated_text"]
    assert [turn["role"] for turn in talk] == ["user", "assistant"]


def test_sharded_weights_are_read_and_checked(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "whole", tiny_llama())
    model = tiny_llama()
    sharded = write_checkpoint(tmp_path / "sharded", model)
    config = (sharded / "config.json").read_text()
    (sharded / "model.safetensors").unlink()
    model.save_pretrained(sharded, max_shard_size="60KB")
    (sharded / "config.json").write_text(config)
    write_manifest(sharded, json.loads((sharded / "moyu/manifest.json").read_text())["ffn_sha256"])
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    ids = torch.randint(128, (1, 6))
    assert torch.equal(from_pretrained(sharded)(ids).logits, from_pretrained(whole)(ids).logits)


def test_a_device_map_places_all_or_is_refused(checkpoint: Factory) -> None:
    folder = checkpoint(tiny_llama(torch.float32))
    ids = torch.randint(128, (1, 6))
    placed = from_pretrained(folder, device_map={"": "cpu"})
    assert torch.equal(placed(ids).logits, from_pretrained(folder)(ids).logits)
    on_disk = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    on_disk |= {f"model.layers.{index}": "disk" for index in range(placed.config.num_hidden_layers)}
    with pytest.raises(CheckpointError, match=r"weights \(model\.layers\.0.* out of memory, .*hold the whole model"):
        from_pretrained(folder, device_map=on_disk)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("part", ["", "mlp", "embed_tokens"])
def test_short_texts_train_as_long_ones_do(checkpoint: Factory, part: str, training: bool) -> None:
    """Also where only the FFN trains, whose input then has no gradient."""
    folder = checkpoint(tiny_llama(torch.float32))
    ids = torch.arange(3, 9)[None]
    found = []
    for backend in ("reference", "cpu"):
        model = from_pretrained(folder, mode="rule", backend=backend).train(training)
        trained = [parameter.requires_grad_() for name, parameter in model.named_parameters() if part in name]
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([parameter.grad for parameter in trained])
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found[-1])
    torch.testing.assert_close(*found)


def test_adapters_of_the_ffn_are_refused(checkpoint: Factory) -> None:
    model = from_pretrained(checkpoint(tiny_llama(torch.float32)))
    ids = torch.arange(3, 9)[None]
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))(ids)
    adapted = get_peft_model(
        from_pretrained(checkpoint(tiny_llama(torch.float32))), LoraConfig(target_modules=["down_proj"])
    )
    for length in (1, 12):
        with pytest.raises(ValueError, match="down_proj of a sparse FFN holds an adapter"):
            adapted(torch.arange(3, 3 + length)[None])
