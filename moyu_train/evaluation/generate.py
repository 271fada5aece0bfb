"""`moyu generate`: stream text from a sparse checkpoint through the kernels."""

import sys
import time
from pathlib import Path
from typing import Any

import moyu_kernels
from moyu_kernels.checkpoint import CheckpointError

from moyu_train.errors import MoyuError
from moyu_train.models.context import check_window
from moyu_train.models.loading import load_sparse, load_tokenizer
from moyu_train.progress import console


def generate(
    folder: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    chat: bool,
    mode: str,
    backend: str,
) -> dict[str, Any]:
    """Print the continuation as it comes, then tokens per second and the density reached."""
    try:
        model = load_sparse(folder, mode=mode, backend=backend)
    except CheckpointError as error:
        raise MoyuError(str(error)) from error
    tokenizer = load_tokenizer(folder)
    if chat and not tokenizer.chat_template:
        raise MoyuError(f"the tokenizer in {str(folder)!r} has no chat template; leave --chat out")
    if chat:
        message = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids.shape[1]:
        raise MoyuError("the prompt has no tokens; give some text to --prompt")
    check_window(model, ids.shape[1] + max_new_tokens, "the prompt's length with --max-new-tokens")
    runner = moyu_kernels.Runner(model, max_length=ids.shape[1] + max_new_tokens)
    blocks = [module for module in model.modules() if isinstance(module, moyu_kernels.SparseFFN)]
    tokens: list[int] = []
    shown = ""
    sys.stdout.write(prompt)
    started = time.perf_counter()
    for token in runner.generate(ids, max_new_tokens, temperature=temperature, eos=tokenizer.eos_token_id):
        if not tokens:  # the first token comes from the prefill, and includes compiling
            started = time.perf_counter()
            for block in blocks:
                block.counts.zero_()
        tokens.append(int(token))
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith("�"):  # half of a character
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    seconds = time.perf_counter() - started
    selected, kept = moyu_kernels.density(model)
    figures = {
        "text": shown,
        "tokens": len(tokens),
        "tokens_per_second": (len(tokens) - 1) / seconds if len(tokens) > 1 else 0.0,
        "selected": selected,
        "kept": kept,
    }
    print(
        f"\n\n{figures['tokens']} tokens, {figures['tokens_per_second']:.1f} tokens per second after the first; of the "
        f"neurons {figures['selected']:.0%} selected, {figures['kept']:.0%} kept (mode {mode})"
    )
    if drift := moyu_kernels.density_drift(model):
        console.print(f"[yellow]{drift}[/yellow]")
    return figures
