"""Rouge-L of answers: rouge-score's own, the best reference, the mean over seeds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from cdm_toolkit.errors import BadOption, BadRow, FileProblem, NoData, UnknownName
from cdm_toolkit.evaluation.evaluate import Ask, Subject, open_suite
from cdm_toolkit.evaluation.instruct import rouge_l
from cdm_toolkit.evaluation.scores import Item

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
MakeSubject = Callable[..., Subject]
WORDS = [
    "the",
    "cats",
    "sat",
    "running",
    "on",
    "Mats,",
    "and",
    "nobody's",
    "12",
    "dogs",
    "cared",
    "about",
    "it",
    ".",
    "你好",
    "Running",
]
ROWS = (
    {"instruction": "Name a colour.", "input": "", "output": "Red is a colour."},
    {"instruction": "Add the numbers.", "input": "1 and 2", "output": ["It is 3.", "The sum is 3."]},
    {"instruction": "Say {input}.", "output": "hi"},
)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def answered(suite: Any, write: Callable[[list[str]], list[str]]) -> list[Item]:
    """Score what a stub writes."""
    prompts = {key: suite._rows[key.rpartition("/")[0]].prompt for key in suite.contents.keys}
    return [suite.item(key, prompt, write([prompt])[0]) for key, prompt in prompts.items()]


def scored(suite: Any, write: Callable[[list[str]], list[str]]) -> dict[str, tuple[float, float | None, int]]:
    items = answered(suite, write)
    return {score.metric: (score.value, score.stderr, score.n) for score in suite.summarize(items).scores}


def test_rouge_l_is_that_of_rouge_score_and_the_best_of_several() -> None:
    source = random.Random(5)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    texts = [" ".join(source.choices(WORDS, k=source.randint(0, 12))) for _ in range(200)]
    singles = []
    for answer, reference in zip(texts[::2], texts[1::2], strict=True):
        singles.append(100 * scorer.score(target=reference, prediction=answer)["rougeL"].fmeasure)
        assert rouge_l(answer, [reference]) == singles[-1]
    assert 0 < fmean(singles) < 100
    for answer in texts[:20]:
        references = texts[20:25]
        assert rouge_l(answer, references) == max(rouge_l(answer, [each]) for each in references)
    assert rouge_l("cats running", ["cat runs"]) == 100  # the stemmer makes them one
    assert rouge_l("no such word", ["something else"]) == 0


def test_the_prompt_is_alpacas(rows: Path) -> None:
    suite: Any = open_suite("instruct", Ask(data=rows))
    prompts: list[str] = []

    def write(asked: list[str]) -> list[str]:
        prompts.extend(asked)
        return [""] * len(asked)

    assert scored(suite, write) == {"Rouge-L, mine": (0.0, 0.0, 3)}
    assert prompts[:3] == [
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nName a colour.\n\n### Response:\n",
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n1 and 2\n\n### Response:\n",
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nSay {input}.\n\n### Response:\n",
    ]
    assert prompts == prompts[:3] * 5


def test_the_reference_scores_100_and_its_like_less(rows: Path) -> None:
    suite: Any = open_suite("instruct", Ask(data=rows))
    last = {row["instruction"]: row["output"] for row in ROWS}

    def of(asked: list[str]) -> list[str]:
        (output,) = (output for instruction, output in last.items() if f"\n{instruction}\n" in asked[0])
        return [f"  {output if isinstance(output, str) else output[-1]}\n"]

    assert scored(suite, of) == {"Rouge-L, mine": (100.0, 0.0, 3)}
    assert 0 < scored(suite, lambda asked: ["a colour 3 hi"])["Rouge-L, mine"][0] < 100


def test_seeds_are_averaged_and_their_standard_deviation_given(rows: Path) -> None:
    suite: Any = open_suite("instruct", Ask(data=rows))
    right = iter([1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0])  # by seed: 3, 1, 2, 0, 1 of 3 rows
    texts = {row["instruction"]: row["output"] for row in ROWS}

    def write(asked: list[str]) -> list[str]:
        (output,) = (output for instruction, output in texts.items() if f"\n{instruction}\n" in asked[0])
        return [(output if isinstance(output, str) else output[0]) if next(right) else ""]

    ((value, std, n),) = scored(suite, write).values()
    means = [100 * count / 3 for count in (3, 1, 2, 0, 1)]
    assert (value, std, n) == (pytest.approx(fmean(means)), pytest.approx(stdev(means)), 3)


def test_a_folder_has_the_sets_as_dskd_does(tmp_path: Path, rows: Path) -> None:
    for name in ("dolly", "sinst/11_"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "valid.jsonl").write_bytes(rows.read_bytes())
    suite: Any = open_suite("instruct", Ask(data=tmp_path, limit=2))
    items = answered(suite, lambda asked: ["hi"])
    assert len(items) == 2 * 2 * 5
    summary = suite.summarize(items)
    assert [score.metric for score in summary.scores] == [
        "Rouge-L, dolly",
        "Rouge-L, s-ni",
        "Rouge-L, average",
    ]
    assert sum("there is no such file" in note for note in summary.notes) == 3
    only: Any = open_suite("instruct", Ask(data=tmp_path, tasks=("s-ni",)))
    assert {key.partition("/")[0] for key in only.contents.keys} == {"s-ni"}
    for ask, error, said in (
        (Ask(data=tmp_path, tasks=("dolly", "unni")), NoData, "unni .*no such file"),
        (Ask(data=tmp_path, tasks=("dollies",)), UnknownName, "did you mean dolly"),
        (Ask(data=rows, tasks=("dolly",)), BadOption, "no `tasks` where `data` is one file"),
        (Ask(data=rows, fewshot_data=rows), BadOption, "no `fewshot_data`"),
    ):
        with pytest.raises(error, match=said):
            open_suite("instruct", ask)


def test_without_data_all_places_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        NoData, match=r"`data`: not given; dolly \(MiniLLM/dolly on the hub: .*; unni \(.*as `data`"
    ):
        open_suite("instruct")


def test_bad_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for row, said in (
        (
            {"prompt": "p", "output": "o"},
            "row 2: it has prompt, output; give each row instruction and output",
        ),
        ({"instruction": "i", "output": 3}, "row 2: output is no text"),
        ({"instruction": "i", "output": []}, "row 2: output is no text"),
        ({"instruction": 1, "output": "o"}, "row 2: instruction is no text"),
        ([1], "row 2: it has list"),
    ):
        path.write_text(f"{json.dumps(ROWS[0])}\n{json.dumps(row)}\n")
        with pytest.raises(BadRow, match=said):
            open_suite("instruct", Ask(data=path))
    path.write_text(f"{json.dumps(ROWS[0])}\n\n{{\n")
    with pytest.raises(BadRow, match="row 3: it is not JSON"):
        open_suite("instruct", Ask(data=path))
    path.write_text("\n")
    with pytest.raises(FileProblem, match="it has no rows; give a JSONL file whose rows have instruction"):
        open_suite("instruct", Ask(data=path))


def test_a_model_is_scored_alike_in_any_batch(make: MakeSubject, rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("adapter: instruct\nsettings: {seeds: [10, 20], max_new_tokens: 12}\n")
    tiny, found = make(), []
    for batch_size in (None, 1, 2):
        suite = open_suite(str(path), Ask(data=rows, batch_size=batch_size))
        found.append({item.key: item for item in suite.score(tiny, suite.contents.keys)})
        some = list(suite.score(tiny, ["mine/2/20"]))
        assert some == [found[-1]["mine/2/20"]]
    assert found[0] == found[1] == found[2]
    assert found[0]["mine/1/10"].generation != found[0]["mine/1/20"].generation
    path.write_text("adapter: instruct\nsettings: {temperature: 0, max_new_tokens: 4}\n")
    greedy = open_suite(str(path), Ask(data=rows))
    assert greedy.contents.keys == ("mine/1/10", "mine/2/10", "mine/3/10")  # more seeds would say the same
    (score,) = greedy.summarize(list(greedy.score(tiny, greedy.contents.keys))).scores
    assert score.n == 3
