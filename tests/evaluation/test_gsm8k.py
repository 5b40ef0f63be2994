"""GSM8K through lm-eval: right answers score 1, wrong ones 0, and nothing bad reaches a model."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cdm_toolkit.errors import (
    BadOption,
    BadRow,
    FileProblem,
    MissingExtra,
    NoData,
    SourceNotFound,
    UnsupportedTokenizer,
)
from cdm_toolkit.evaluation.evaluate import Ask, Subject, open_suite
from cdm_toolkit.evaluation.scores import Summary
from cdm_toolkit.samples import sample_path

lm_eval_model = pytest.importorskip("lm_eval.api.model", reason="lm-eval is not installed")
GSM8K = Path(os.environ.get("CDM_GSM8K", "../shared/data/gsm8k_test.jsonl"))
MakeSubject = Callable[..., Subject]


class StandIn(lm_eval_model.LM):  # type: ignore[misc]
    """Answer each question as told, and keep the prompts."""

    tok_encode, max_length = list, 1 << 20

    def __init__(self, answer: Callable[[str], str]) -> None:
        super().__init__()
        self.answer = answer
        self.prompts: list[str] = []

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        prompts = [request.args[0] for request in requests]
        self.prompts += prompts
        return [
            self.answer(prompt.rpartition("Question: ")[2].removesuffix("\nAnswer:")) for prompt in prompts
        ]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        raise NotImplementedError


def known_answers(path: Path) -> dict[str, str]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["question"]: row["answer"] for row in rows}


def wrong(answer: str) -> str:
    solution, _, number = answer.rpartition("#### ")
    return f"{solution}#### {int(number.replace(',', '')) + 1}"


def scored(suite: Any, lm: Any) -> Summary:
    """Score a stand-in on all items."""
    keys = suite.contents.keys
    items = {item.key: item for item in suite.answer(lm, keys)}
    return suite.summarize([items[key] for key in keys])


def values(summary: Summary) -> dict[str, float]:
    return {score.metric: score.value for score in summary.scores}


def both(strict: float, flexible: float) -> dict[str, float]:
    return {"exact_match, strict-match": strict, "exact_match, flexible-extract": flexible}


@pytest.mark.parametrize("path", [sample_path("heldout"), GSM8K], ids=["sample", "gsm8k"])
def test_right_answers_score_one_and_wrong_ones_zero(path: Path) -> None:
    if not path.is_file():
        pytest.skip(f"no GSM8K at {path}: set CDM_GSM8K to its test split as JSONL")
    answers = known_answers(path)
    suite: Any = open_suite("math", Ask(data=path, limit=60))
    gold = scored(suite, StandIn(answers.__getitem__))
    assert values(gold) == both(1.0, 1.0)
    assert [score.n for score in gold.scores] == [60, 60]
    assert [score.stderr for score in gold.scores] == [0.0, 0.0]
    assert values(scored(suite, StandIn(lambda asked: wrong(answers[asked])))) == both(0.0, 0.0)


def test_strict_asks_for_the_form_and_flexible_for_the_number() -> None:
    path = sample_path("heldout")
    answers = known_answers(path)
    suite: Any = open_suite("math", Ask(data=path, limit=4))
    loose = StandIn(lambda asked: f"So it must be {answers[asked].rpartition('#### ')[2]}")
    assert values(scored(suite, loose)) == both(0.0, 1.0)
    odd = list(answers)[:4:2]
    half = scored(suite, StandIn(lambda asked: answers[asked] if asked in odd else "no idea"))
    assert values(half) == both(0.5, 0.5)
    assert half.scores[0].stderr == pytest.approx((0.25 / 3) ** 0.5)


def test_examples_come_from_where_the_result_says(tmp_path: Path) -> None:
    heldout = sample_path("heldout")
    shots = tmp_path / "shots.jsonl"
    shots.write_text(
        "".join(json.dumps({"question": f"{n}+1?", "answer": f"#### {n + 1}"}) + "\n" for n in range(9))
    )
    for ask, source, pool in (
        (Ask(data=heldout, limit=3), "word_problems_train.jsonl (cdm_toolkit.samples)", sample_path("train")),
        (Ask(data=heldout, limit=3, fewshot_data=shots), str(shots), shots),
    ):
        suite: Any = open_suite("math", ask)
        lm = StandIn(lambda _: "")
        scored(suite, lm)
        assert (suite.contents.data, suite.contents.setting) == (str(heldout), f"gsm8k 5-shot from {source}")
        questions = {f"{question}\nAnswer:" for question in list(known_answers(heldout))[:3]}
        for prompt in lm.prompts:
            *examples, asked = prompt.removeprefix("Question: ").split("\n\nQuestion: ")
            questions.remove(asked)
            assert len(examples) == 5
            assert {example.partition("\nAnswer:")[0] for example in examples} <= known_answers(pool).keys()


def test_a_question_is_no_example_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(sample_path("heldout").read_text(encoding="utf-8").splitlines()[:9]))
    suite: Any = open_suite("math", Ask(data=path, fewshot_data=path, limit=4))
    lm = StandIn(lambda _: "")
    scored(suite, lm)
    assert len(lm.prompts) == 4
    for question in list(known_answers(path))[:4]:
        assert sum(prompt.count(f"{question}\n") for prompt in lm.prompts) == 1
    with pytest.raises(FileProblem, match="0 rows besides the scored ones"):
        open_suite("math", Ask(data=path, fewshot_data=path))


def short_suite(folder: Path, **settings: object) -> str:
    """Write a suite of GSM8K on the project's problems with short answers."""
    path = folder / "short.yaml"
    asked = json.dumps({"fewshot": 2, "max_new_tokens": 8} | settings)
    path.write_text(f"adapter: lm-eval\ndata: {{sample: heldout}}\nsettings: {asked}\n")
    return str(path)


def test_a_loaded_model_is_scored(
    make: MakeSubject, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny = make(positions=128)
    found = []
    for batch_size in (2, None):
        suite = open_suite(short_suite(tmp_path), Ask(limit=5, batch_size=batch_size))
        items = sorted(suite.score(tiny, suite.contents.keys), key=lambda item: item.key)
        assert [item.key for item in items] == list(suite.contents.keys)
        found.append([item.generation for item in items])
        assert suite.summarize(items).notes == ("5 of 5 prompts were cut to their last 120 tokens",)
    assert found[0] == found[1]
    assert all(found[0])
    assert capfd.readouterr() == ("", "")


def test_some_items_are_scored_as_among_all(make: MakeSubject, tmp_path: Path) -> None:
    suite = open_suite(short_suite(tmp_path), Ask(limit=7, batch_size=3))
    tiny = make()
    whole = {item.key: item for item in suite.score(tiny, suite.contents.keys)}
    some = list(suite.score(tiny, ["gsm8k/5", "gsm8k/1"]))
    assert {item.key: item for item in some} == {key: whole[key] for key in ("gsm8k/1", "gsm8k/5")}


def test_a_model_without_room_for_the_answer_is_refused(make: MakeSubject) -> None:
    suite = open_suite("math", Ask(data=sample_path("heldout")))
    with pytest.raises(
        BadOption, match="max_new_tokens of the suite 'math' is 256; give less than the 64 positions"
    ):
        next(iter(suite.score(make(positions=64), suite.contents.keys)))


def test_chains_of_thought_are_scored_beside(tmp_path: Path) -> None:
    path = sample_path("heldout")
    answers = {question: answer.rpartition("#### ")[2] for question, answer in known_answers(path).items()}

    def think(asked: str) -> str:
        if asked in answers:
            return f"#### {answers[asked]}"
        return f"The answer is {answers[asked.rpartition('Q: ')[2].removesuffix('A:').strip()]}."

    suite: Any = open_suite("math", Ask(data=path, limit=4, tasks=("gsm8k", "gsm8k_cot")))
    assert suite.contents.keys[3:5] == ("gsm8k/3", "gsm8k_cot/0")
    assert suite.contents.setting.endswith("; gsm8k_cot 8-shot")
    lm = StandIn(think)
    assert values(scored(suite, lm)) == {
        f"{task}: {metric}": 1.0 for task in ("gsm8k", "gsm8k_cot") for metric in both(1.0, 1.0)
    }
    assert any("There are 15 trees in the grove" in prompt for prompt in lm.prompts)


def test_a_chat_template_holds_the_prompt(make: MakeSubject, tmp_path: Path) -> None:
    chatty = make()
    suite = open_suite(short_suite(tmp_path), Ask(limit=1, chat_template=True))
    with pytest.raises(UnsupportedTokenizer, match="no chat template; score it without `chat_template`"):
        next(iter(suite.score(chatty, suite.contents.keys)))
    chatty.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    )
    (item,) = suite.score(chatty, suite.contents.keys)
    assert item.prompt.startswith("[user]Question: ")
    assert item.prompt.endswith("\nAnswer:[assistant]")


@pytest.mark.slow
def test_equals_the_command_line_of_lm_eval_item_by_item(start_module, tmp_path: Path) -> None:
    """The same task file, rows and model: every answer and every score."""
    from cdm_toolkit.evaluation.evaluate import load_subject
    from cdm_toolkit.evaluation.gsm8k import find_problems, write_task
    from cdm_toolkit.evaluation.suites import load_suite
    from cdm_toolkit.hub.students import new_student

    student, folder, out = tmp_path / "student", tmp_path / "task", tmp_path / "out"
    try:
        new_student("mistral", "2.6m", student)
    except SourceNotFound as error:
        pytest.skip(f"no Mistral tokenizer here: {error}")
    settings = {"fewshot": 3, "max_new_tokens": 24}
    path, ask = short_suite(tmp_path, **settings), Ask(limit=8)
    folder.mkdir()
    name = write_task(folder, "gsm8k", find_problems(load_suite(path), ask), **settings).stem
    command = (
        f"lm_eval --model hf --model_args pretrained={student},dtype=float32 --device cpu --tasks {name} "
        f"--include_path {folder} --batch_size 1 --log_samples --output_path {out}"
    )
    process = start_module(*command.split())
    assert process.wait() == 0, process.communicate()
    (samples,) = out.rglob("samples_*.jsonl")
    theirs = {}
    for line in samples.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        metric = f"exact_match,{sample['filter']}"
        theirs[sample["doc_id"], metric] = (sample["resps"][0][0], sample["exact_match"])
    suite = open_suite(path, ask)
    items = list(suite.score(load_subject(str(student)), suite.contents.keys))
    ours = {
        (int(item.key.rpartition("/")[2]), metric): (item.generation, score)
        for item in items
        for metric, score in item.scores.items()
    }
    assert len(ours) == 16
    assert all(text for text, _ in ours.values())
    assert ours == theirs
    (results,) = out.rglob("results_*.json")
    summed = json.loads(results.read_text())["results"][name]
    for score in suite.summarize(sorted(items, key=lambda item: item.key)).scores:
        metric, chosen = score.metric.split(", ")
        assert score.value == summed[f"{metric},{chosen}"]
        assert score.stderr == summed[f"{metric}_stderr,{chosen}"]


def test_bad_data_is_named_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = {"question": "1+1?", "answer": "1 + 1 = 2\n#### 2"}
    for row, said in (
        ({"question": "q"}, "row 2: it has question"),
        ({"question": "q", "answer": "it is 3"}, "row 2: its answer does not end with #### and a number"),
        ({"text": "#### 3"}, "row 2: it has text, and the rows before it question and answer"),
        ({"question": 3, "answer": "#### 3"}, "row 2: question is int, not a string"),
    ):
        path.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
        with pytest.raises(BadRow, match=said):
            open_suite("math", Ask(data=path))
    path.write_text(json.dumps(good))
    with pytest.raises(FileProblem, match="it has 1 rows besides the scored ones, the suite needs 5"):
        open_suite("math", Ask(data=sample_path("heldout"), fewshot_data=path))
    with pytest.raises(FileProblem, match="no such file"):
        open_suite("math", Ask(data=tmp_path / "none.jsonl"))


def test_without_data_the_error_says_what_to_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("CDM_CACHE", str(tmp_path))
    with pytest.raises(
        NoData, match=r"tried `data`: not given; openai/gsm8k on the hub: .*question and answer as `data`"
    ):
        open_suite("math")


def test_what_the_hub_gave_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cdm_toolkit.evaluation import suite_data as data

    asked: list[str] = []

    def download(source: data.DataSource) -> list[dict[str, str]]:
        asked.append(source.split)
        return [{"question": f"{source.split} {n}?", "answer": f"#### {n}"} for n in range(7)]

    monkeypatch.setattr(data, "_download", download)
    monkeypatch.setenv("CDM_CACHE", str(tmp_path))
    for _ in range(2):
        suite: Any = open_suite("math")
        lm = StandIn(lambda asked: f"#### {asked[-2]}")
        result = scored(suite, lm)
        assert values(result) == both(1.0, 1.0)
        assert suite.contents.data == "openai/gsm8k test (hub)"
        assert suite.contents.setting == "gsm8k 5-shot from openai/gsm8k train (hub)"
        assert "Question: train" in lm.prompts[0]
    assert asked == ["test", "train"]


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "cdm_toolkit.evaluation.lm_eval_suite.find_spec",
        lambda name: None if name == "lm_eval" else find(name),
    )
    with pytest.raises(MissingExtra, match=r"the suite 'math' needs lm-eval.*cdm-toolkit\[eval\]"):
        open_suite("math")
