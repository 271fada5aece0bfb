"""Run by tests/test_vllm.py in a process of its own: `python in_vllm.py FOLDER` prints what vLLM answers, as JSON.

The answer: the class that runs, and of each of two prompts decoded together all tokens and their log probabilities.
"""

import json
import os
import sys

PROMPTS = [list(range(20, 60)), list(range(100, 130))]
ENVIRONMENT = {  # of a CPU that others use too
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def main(folder: str) -> None:
    os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=4,
        enforce_eager=True,
        kv_cache_memory_bytes=2**26,
    )
    sampling = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0, logprobs=0)
    answers = []
    for prompt, output in zip(PROMPTS, llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling), strict=True):
        ids = [*prompt, *output.outputs[0].token_ids]
        places = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        answers.append((ids, [place[token].logprob for token, place in zip(ids[1:], places, strict=True)]))
    runs = type(llm.llm_engine.model_executor.driver_worker.worker.model_runner.model).__name__
    print("\n" + json.dumps({"class": runs, "answers": answers}))


if __name__ == "__main__":
    main(sys.argv[1])
