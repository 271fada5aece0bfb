"""Tasks against likelihoods by hand, greedy agreement against a loop without a cache, and both in the pipeline."""

import json
import math
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from moyu_kernels.rules import Rule
from tiny import save_tiny, tiny_model, tiny_settings, tokenizer

from moyu_train.checkpoints.export import read_state
from moyu_train.cli import main
from moyu_train.errors import MoyuError
from moyu_train.evaluation.agreement import GreedyAgreement, equal_share, final_number
from moyu_train.evaluation.extras import check_extras
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.evaluation.tasks import Tasks
from moyu_train.models.loading import load_dense
from moyu_train.pipeline import Run
from moyu_train.recipe import Recipe, RecipeError, load_recipe
from moyu_train.settings_export import Agreement, Evaluate

ROOT = Path(__file__).parent.parent
LAST_WORDS = ["the cat sat on the mat", "a dog ran to it", "birds fly up", "no one is here now", "it rains a lot"]
GOALS = [
    {
        "goal": f"open a jar {i}",
        "sol1": "twist the lid" + "!" * i,
        "sol2": "boil it in oil " * (i % 3 + 1),
        "label": i % 2,
    }
    for i in range(5)
]
QUESTIONS = [
    {
        "question": f"What is {i}?",
        "choices": {"text": ["a number", "cat" * i + "s", "hot water"], "label": ["A", "B", "C"]},
        "answerKey": "ABCAB"[i],
    }
    for i in range(5)
]


def save_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return {
        "lambada": save_rows(tmp_path / "lambada.jsonl", [{"text": text} for text in LAST_WORDS]),
        "piqa": save_rows(tmp_path / "piqa.jsonl", GOALS),
        "arc_easy": save_rows(tmp_path / "arc.jsonl", QUESTIONS),
    }


@torch.no_grad()
def log_likelihood(model: Any, context: str, continuation: str) -> float:
    before, after = (tokenizer()(text)["input_ids"] for text in (context, continuation))
    logits = model(input_ids=torch.tensor([before + after]), use_cache=False).logits[0]
    chosen = torch.log_softmax(logits[len(before) - 1 : -1].double(), -1)[range(len(after)), after]
    return chosen.sum().item()


def right(model: Any, question: str, choices: list[str], gold: int, by_length: bool) -> bool:
    scores = [log_likelihood(model, f"Question: {question}\nAnswer:", f" {choice}") for choice in choices]
    if by_length:
        scores = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
    return max(range(len(choices)), key=scores.__getitem__) == gold


def by_hand(model: Any) -> dict[str, dict[str, list[float]]]:
    """Per task and metric the value of each example."""
    found: dict[str, dict[str, list[float]]] = {"local_piqa": {}, "local_arc_easy": {}}
    for metric, by_length in (("acc", False), ("acc_norm", True)):
        found["local_piqa"][metric] = [
            right(model, row["goal"], [row["sol1"], row["sol2"]], row["label"], by_length) for row in GOALS
        ]
        found["local_arc_easy"][metric] = [
            right(model, row["question"], row["choices"]["text"], "ABC".index(row["answerKey"]), by_length)
            for row in QUESTIONS
        ]
    words = [text.rpartition(" ") for text in LAST_WORDS]
    found["local_lambada"] = {"perplexity": [log_likelihood(model, start, f" {word}") for start, _, word in words]}
    return found


def local(files: dict[str, str], **settings: Any) -> Evaluate:
    data = {f"local_{name}": file for name, file in files.items()}
    return Evaluate(tasks=tuple(data), task_data=data, **settings)


def half_off(model: Any) -> SparseMasks:
    """A threshold on the activation that leaves about half of the neurons of `noisy_model`."""
    return SparseMasks(model, [Rule(torch.full((96,), 0.3)) for _ in range(2)], None)


def noisy_model() -> Any:
    """Another model, which gets other examples right and does not repeat one token for ever."""
    model, generator = tiny_model(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def test_tasks_agree_with_likelihoods_taken_by_hand(files: dict[str, str]) -> None:
    model, tasks = noisy_model(), Tasks(local(files), tokenizer())
    tasks.add("dense", tiny_model())
    expected = {"dense": by_hand(tiny_model())}
    with half_off(model) as masks:
        tasks.add("sparse", model, masks)
        counted = masks.neurons_off()
        expected["sparse"] = by_hand(model)
    figures = tasks.figures()
    assert figures["task_neurons_off"] == counted
    assert 0.2 < counted < 0.8
    assert set(figures["tasks"]) == set(expected["dense"])
    for variant, tables in expected.items():
        for task, metrics in tables.items():
            found = figures["tasks"][task]
            assert found["examples"] == 5
            for metric, values in metrics.items():
                if metric == "perplexity":
                    assert found[variant][metric] == pytest.approx(math.exp(-statistics.fmean(values)), rel=1e-4)
                    assert found[variant]["perplexity_stderr"] > 0
                    continue
                assert found[variant][metric] == pytest.approx(statistics.fmean(values))
                assert found[variant][f"{metric}_stderr"] == pytest.approx(statistics.stdev(values) / 5**0.5)
    means = []
    for task in ("local_piqa", "local_arc_easy"):
        for metric in ("acc", "acc_norm"):
            pairs = zip(expected["sparse"][task][metric], expected["dense"][task][metric], strict=True)
            differences = [float(after) - float(before) for after, before in pairs]
            found = figures["tasks"][task]["sparse"]
            assert found[f"{metric}_minus_dense"] == pytest.approx(statistics.fmean(differences))
            assert found[f"{metric}_minus_dense_stderr"] == pytest.approx(statistics.stdev(differences) / 5**0.5)
            assert f"{metric}_minus_dense" not in figures["tasks"][task]["dense"]
            means.append(statistics.fmean(differences))
    assert min(means) < 0 or max(means) > 0, "no example changed, so this test has compared nothing"
    unmasked = by_hand(model)["local_lambada"]["perplexity"]
    assert unmasked != pytest.approx(expected["sparse"]["local_lambada"]["perplexity"], rel=0.01)


def test_shipped_tasks_are_those_of_lm_eval_on_a_local_file(files: dict[str, str], tmp_path: Path) -> None:
    """Also: `task_data` gives lm-eval's own tasks a file, and both forms of the rows mean the same."""
    own = {name + ("_openai" if name == "lambada" else ""): file for name, file in files.items()}
    other = {
        "lambada": save_rows(
            tmp_path / "pairs.jsonl",
            [dict(zip(("context", "_", "continuation"), text.rpartition(" "), strict=True)) for text in LAST_WORDS],
        ),
        "arc_easy": save_rows(
            tmp_path / "queries.jsonl",
            [
                {
                    "query": f"Question: {row['question']}",
                    "choices": row["choices"]["text"],
                    "gold": "ABC".index(row["answerKey"]),
                }
                for row in QUESTIONS
            ],
        ),
    }
    found = []
    for settings in (
        local(files, task_limit=3),
        Evaluate(tasks=tuple(own), task_data=own, task_limit=3),
        local(files | other, task_limit=3),
    ):
        tasks = Tasks(settings, tokenizer())
        tasks.add("sparse", tiny_model())
        found.append({name.removeprefix("local_"): row for name, row in tasks.figures()["tasks"].items()})
    assert found[0] == found[2]
    assert found[0] == {name.removesuffix("_openai"): row for name, row in found[1].items()}
    assert found[0]["piqa"]["examples"] == 3


def test_tasks_of_a_folder_and_of_a_yaml_file(files: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    task = {
        "task": "jars",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": files["piqa"]}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
    }
    (folder / "jars.yaml").write_text(yaml.safe_dump(task))
    expected = statistics.fmean(by_hand(tiny_model())["local_piqa"]["acc"])
    for settings in (
        Evaluate(task_folder=str(folder)),
        Evaluate(task_folder=str(folder), tasks=("jars",)),
        Evaluate(tasks=(str(folder / "jars.yaml"),)),
    ):
        tasks = Tasks(settings, tokenizer())
        tasks.add("sparse", tiny_model())
        figures = tasks.figures()["tasks"]
        assert list(figures) == ["jars"]
        assert figures["jars"]["sparse"]["acc"] == pytest.approx(expected)


def test_lm_evals_own_tasks_on_local_files(tmp_path: Path) -> None:
    """MMLU by likelihoods, GSM8K by generation with its two ways to find the number."""
    sums = [{"question": f"Tom has {i} jars. How many?", "answer": f"He has {i}.\n#### {i}"} for i in range(8)]
    parts = [
        {"question": f"What is {i}?", "choices": ["a", "b", "c", "d"], "answer": i % 4, "subject": "x"}
        for i in range(5)
    ]
    data = {"gsm8k": save_rows(tmp_path / "gsm.jsonl", sums), "mmlu_anatomy": save_rows(tmp_path / "mmlu.jsonl", parts)}
    tasks = Tasks(Evaluate(tasks=tuple(data), task_data=data, task_limit=3), tokenizer())
    tasks.add("dense", tiny_model())
    tasks.add("sparse", tiny_model())
    figures = tasks.figures()["tasks"]
    assert {name: row["examples"] for name, row in figures.items()} == {"gsm8k": 3, "mmlu_anatomy": 3}
    for way in ("strict-match", "flexible-extract"):
        assert 0 <= figures["gsm8k"]["sparse"][f"exact_match/{way}"] <= 1
        assert figures["gsm8k"]["sparse"][f"exact_match/{way}_minus_dense"] == 0
    assert figures["mmlu_anatomy"]["sparse"]["acc"] == figures["mmlu_anatomy"]["dense"]["acc"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["local_piqa"]}, r"evaluate.task_data: \{local_piqa: FILE\}"),
        ({"tasks": ["local_pika"]}, "did you mean 'local_piqa'"),
        ({"tasks": ["local_piqa"], "task_data": {"local_piqa": "no.jsonl"}}, "local_piqa 'no.jsonl' does not exist"),
        ({"tasks": ["no.yaml"]}, "evaluate.tasks 'no.yaml' does not exist"),
        ({"task_folder": "no"}, "evaluate.task_folder 'no' is not a folder"),
        ({"task_folder": "EMPTY"}, "holds no task"),
        ({"task_folder": "EMPTY", "tasks": ["piqa"], "task_data": {"arc": "EMPTY/x"}}, "not exist"),
        ({"agreement": {"file": "no.jsonl"}}, "evaluate.agreement.file 'no.jsonl' does not exist"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_runs(tmp_path: Path, settings: Any, message: str) -> None:
    (tmp_path / "empty").mkdir()
    text = json.dumps(settings).replace("EMPTY", str(tmp_path / "empty"))
    with pytest.raises(MoyuError, match=message):
        check_extras(Evaluate.model_validate_json(text))


def test_data_of_a_task_that_is_not_asked_for(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m")
    with pytest.raises(RecipeError, match=r"task_data names piqa, which evaluate\.tasks does not ask for"):
        load_recipe(str(tmp_path / "r.yaml"), ["--evaluate.tasks", "[arc_easy]", "--evaluate.task_data", "{piqa: x}"])
    tag = Evaluate(tasks=("ai2_arc",), task_data={"ai2_arc": files["arc_easy"]})
    with pytest.raises(MoyuError, match="not the name of one of the tasks"):
        check_extras(tag)


def test_rows_without_the_fields_and_a_missing_harness(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MoyuError, match="'goal' is undefined"):
        Tasks(local({"piqa": files["lambada"]}), tokenizer())
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MoyuError, match=r"pip install 'moyu\[eval\]'"):
        check_extras(local(files))


@pytest.mark.parametrize(
    ("reference", "tokens", "share"),
    [([1, 2, 3, 4], [1, 2, 9, 4], 0.5), ([1, 2], [1, 2], 1.0), ([1, 2], [3, 2], 0.0), ([1, 2, 3, 4], [1], 0.25)],
)
def test_share_of_equal_tokens(reference: list[int], tokens: list[int], share: float) -> None:
    assert equal_share(reference, tokens) == share


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("16 - 3 = 13, times 2 is $26.", 26.0),
        ("It costs $1,250.50", 1250.5),
        ("from 9-4 to -7", -7.0),
        ("#### 18\nQuestion: what are 3 and 4?", 18.0),
        ("none at all", None),
    ],
)
def test_final_number(text: str, number: float | None) -> None:
    assert final_number(text) == number


@torch.no_grad()
def greedy(model: Any, prompt: str, count: int) -> list[int]:
    ids = tokenizer()(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + count and ids[-1] != tokenizer().eos_token_id:
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[start:]


def test_greedy_agreement(tmp_path: Path) -> None:
    rows = [{"query": f"What are {i} and 2?"} for i in range(4)]
    file = save_rows(tmp_path / "q.jsonl", rows)
    with pytest.raises(MoyuError, match=r"no field 'question'.*set evaluate\.agreement\.field"):
        GreedyAgreement(Agreement(file=file), tokenizer())
    agreement = GreedyAgreement(Agreement(file=file, field="query", prompts=3, new_tokens=12), tokenizer())
    model, prompts = noisy_model(), [f"Question: {row['query']}\nAnswer:" for row in rows[:3]]
    agreement.add("control", model)
    agreement.add("dense", model)
    assert agreement.tokens["dense"] == [greedy(model, prompt, 12) for prompt in prompts]
    with half_off(model) as masks:
        agreement.add("sparse", model, masks)
        assert agreement.tokens["sparse"] == [greedy(model, prompt, 12) for prompt in prompts]
    assert agreement.tokens["sparse"] != agreement.tokens["dense"]
    agreement.tokens["dense"] = [tokenizer()(text)["input_ids"] for text in ("so 12", "so 7.", "none.")]
    agreement.tokens["sparse"] = [tokenizer()(text)["input_ids"] for text in ("so 12", "so 4.", "none.")]
    agreement.tokens["control"] = [tokenizer()(text)["input_ids"] for text in ("is 12", "is 7.", "is 5")]
    figures = agreement.figures()["agreement"]
    assert (figures["prompts"], figures["new_tokens"], figures["numbers"]) == (3, 12, 2)
    assert 0.2 < figures["neurons_off"] < 0.8
    shares = [1.0, 0.6, 1.0]
    assert figures["sparse"]["equal_tokens"] == pytest.approx(statistics.fmean(shares))
    assert figures["sparse"]["equal_tokens_stderr"] == pytest.approx(statistics.stdev(shares) / 3**0.5)
    assert figures["sparse"]["identical"] == pytest.approx(2 / 3)
    assert figures["sparse"]["equal_numbers"] == 0.5
    assert figures["control"] | {"equal_tokens_stderr": 0} == {
        "equal_tokens": 0.0,
        "equal_tokens_stderr": 0,
        "identical": 0.0,
        "equal_numbers": 1.0,
    }


def test_masks_from_the_prompt_agree_with_whole_sequences(tmp_path: Path) -> None:
    """A cache's steps would be taken for prompts of their own."""
    file = save_rows(tmp_path / "q.jsonl", [{"question": f"What are {i} and 2?"} for i in range(2)])
    agreement, model = GreedyAgreement(Agreement(file=file, new_tokens=12), tokenizer()), noisy_model()
    agreement.add("dense", model)
    rules = [Rule(torch.ones(96), keep="prompt_topk", share=0.1, prompt=8) for _ in range(2)]
    with SparseMasks(model, rules, None) as masks:
        agreement.add("sparse", model, masks)
        assert agreement.tokens["sparse"] == [greedy(model, prompt, 12) for prompt in agreement.prompts]
    assert agreement.tokens["sparse"] != agreement.tokens["dense"]
    assert agreement.figures()["agreement"]["neurons_off"] is None


def test_in_the_pipeline(files: dict[str, str], tmp_path: Path) -> None:
    """Every variant under its own masks, in the stage's figures, the result table, the report, and on a folder."""
    questions = save_rows(tmp_path / "q.jsonl", [{"question": f"What are {i} and 2?"} for i in range(3)])
    settings = tiny_settings(tmp_path, save_tiny(tmp_path / "model")) | {"bench": None}
    settings["control"] = {"learning_rates": [1e-3]}
    settings["evaluate"] |= {
        "kernel_tokens": 0,
        "tasks": ["local_lambada"],
        "task_data": {"local_lambada": files["lambada"]},
        "agreement": {"file": questions, "new_tokens": 8},
    }
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    assert main(["run", str(recipe), "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    documented = (ROOT / "docs" / "results.md").read_text()
    for name in ("tasks", "task_neurons_off", "agreement"):
        assert f"`{name}" in documented
    run = tmp_path / "run"
    model = load_dense(run / "export" / "checkpoint")
    rules, predictors = read_state(run / "export" / "checkpoint")
    assert predictors
    with SparseMasks(model, rules, predictors):
        sparse = by_hand(model)["local_lambada"]["perplexity"]
    with SparseMasks(model, rules, None):
        assert by_hand(model)["local_lambada"]["perplexity"] != pytest.approx(sparse, rel=1e-4)
    control = load_dense(run / "control" / json.loads((run / "control" / "stage.json").read_text())["figures"]["model"])
    expected = {
        "sparse": sparse,
        "dense": by_hand(tiny_model())["local_lambada"]["perplexity"],
        "control": by_hand(control)["local_lambada"]["perplexity"],
    }
    for variant, values in expected.items():
        found = result["tasks"]["local_lambada"][variant]["perplexity"]
        assert found == pytest.approx(math.exp(-statistics.fmean(values)), rel=2e-5), variant
    assert {"control", "sparse"} < set(result["agreement"])
    page = (run / "report.html").read_text()
    assert "local_lambada (5)" in page
    assert "greedy (3)" in page

    checkpoint, out = str(run / "export" / "checkpoint"), tmp_path / "folder.json"
    options = ["--data.test", settings["data"]["test"], "--evaluate", json.dumps(settings["evaluate"])]
    assert main(["evaluate", checkpoint, *options]) == 1
    assert main(["evaluate", checkpoint, *options, "--model", settings["model"], "--json", str(out)]) == 0
    again = json.loads(out.read_text())
    for variant in ("dense", "sparse"):
        assert again["tasks"]["local_lambada"][variant] == result["tasks"]["local_lambada"][variant]
        assert again["ppl"][variant] == pytest.approx(result["ppl"][variant])
    assert again["agreement"]["sparse"] == result["agreement"]["sparse"]


def test_a_changed_task_file_is_another_evaluation(files: dict[str, str], tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, save_tiny(tmp_path / "model"))
    settings["evaluate"] |= {"tasks": ["local_piqa"], "task_data": {"local_piqa": files["piqa"]}}

    def keys() -> list[str]:
        run = Run(Recipe.model_validate(settings))
        return [run.key(stage) for stage in ("evaluate", "export")]

    before = keys()
    assert keys() == before
    shutil.copy(files["piqa"], tmp_path / "kept.jsonl")
    save_rows(Path(files["piqa"]), GOALS[:4])
    changed = keys()
    assert changed[0] != before[0]
    assert changed[1] == before[1]
    shutil.copy(tmp_path / "kept.jsonl", files["piqa"])
    assert keys() == before
    settings["evaluate"] |= {"task_limit": 3}
    assert keys()[0] != before[0]
