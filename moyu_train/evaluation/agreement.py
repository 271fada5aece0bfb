"""Greedy continuations of questions: how long a variant says what the dense parent says, and whether it ends there."""

import re
import statistics
from itertools import islice
from typing import Any

import torch

from moyu_train.evaluation.inloop import SparseMasks, generating
from moyu_train.models.blocks import device_of
from moyu_train.progress import track
from moyu_train.settings_export import Agreement
from moyu_train.texts import read_texts

NUMBER = re.compile(r"(?<!\d)-?\d[\d,]*(?:\.\d+)?")


def equal_share(reference: list[int], tokens: list[int]) -> float:
    """Share of the reference's tokens before the first one that differs; 1 where all are the same."""
    equal = 0
    for expected, found in zip(reference, tokens, strict=False):
        if expected != found:
            break
        equal += 1
    return equal / len(reference)


def final_number(text: str) -> float | None:
    """The last number of an answer, which ends where the model asks itself another question."""
    found = NUMBER.findall(text.split("Question:")[0])
    return float(found[-1].replace(",", "")) if found else None


class GreedyAgreement:
    """Continues the same questions with each variant, at most `new_tokens` tokens or to the end of text."""

    def __init__(self, settings: Agreement, tokenizer: Any) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        questions = read_texts(settings.file, settings.field, "evaluate.agreement.field")
        self.prompts = [f"Question: {question}\nAnswer:" for question in islice(questions, settings.prompts)]
        self.tokens: dict[str, list[list[int]]] = {}
        self.neurons_off: float | None = None

    def add(self, variant: str, model: Any, masks: SparseMasks | None = None) -> None:
        what = f"evaluate: greedy continuations, {variant}"
        with generating(model, masks):
            self.tokens[variant] = [self._continue(model, prompt) for prompt in track(self.prompts, what)]
        if masks and not masks.looks_back:  # else every token is seen many times
            self.neurons_off = masks.neurons_off()

    @torch.no_grad()
    def _continue(self, model: Any, prompt: str) -> list[int]:
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"].to(device_of(model))
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=self.settings.new_tokens,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        tokens: list[int] = found[0, ids.shape[1] :].tolist()
        return tokens

    def figures(self) -> dict[str, Any]:
        """Per variant but the dense one: mean share of equal tokens with its standard error over the questions, share
        of identical continuations, and share of identical final numbers among the `numbers` questions that the dense
        parent answers with one (null where there is none).
        """
        found: dict[str, Any] = {"prompts": len(self.prompts), "new_tokens": self.settings.new_tokens}
        dense = self.tokens["dense"]
        expected = self._numbers(dense)
        found["numbers"] = sum(number is not None for number in expected)
        for variant, tokens in self.tokens.items():
            if variant == "dense":
                continue
            shares = [equal_share(a, b) for a, b in zip(dense, tokens, strict=True)]
            same = [a == b for a, b in zip(expected, self._numbers(tokens), strict=True) if a is not None]
            found[variant] = {
                "equal_tokens": statistics.fmean(shares),
                "equal_tokens_stderr": statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else None,
                "identical": statistics.fmean(a == b for a, b in zip(dense, tokens, strict=True)),
                "equal_numbers": statistics.fmean(same) if same else None,
            }
        return {"agreement": found | {"neurons_off": self.neurons_off}}

    def _numbers(self, continuations: list[list[int]]) -> list[float | None]:
        return [final_number(self.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in continuations]
