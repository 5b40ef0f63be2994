"""GSM8K through lm-eval: right answers score 1, wrong ones 0, and nothing bad reaches a model."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cdm_toolkit.errors import BadOption, BadRow, FileProblem, MissingExtra, NoData
from cdm_toolkit.evaluation.results import SuiteResult
from cdm_toolkit.evaluation.run import Ask, Subject, open_suite
from cdm_toolkit.samples import sample_path

lm_eval_model = pytest.importorskip("lm_eval.api.model", reason="lm-eval is not installed")
GSM8K = Path(os.environ.get("CDM_GSM8K", "../shared/data/gsm8k_test.jsonl"))
MakeSubject = Callable[..., Subject]


class StandIn(lm_eval_model.LM):  # type: ignore[misc]
    """Answer each question as told, and keep the prompts."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        super().__init__()
        self.answer = answer
        self.prompts: list[str] = []

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        self.prompts = [request.args[0] for request in requests]
        return [
            self.answer(prompt.rpartition("Question: ")[2].removesuffix("\nAnswer:"))
            for prompt in self.prompts
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


def values(result: SuiteResult) -> dict[str, float]:
    return {score.metric: score.value for score in result.scores}


@pytest.mark.parametrize("path", [sample_path("heldout"), GSM8K], ids=["sample", "gsm8k"])
def test_right_answers_score_one_and_wrong_ones_zero(path: Path) -> None:
    if not path.is_file():
        pytest.skip(f"no GSM8K at {path}: set CDM_GSM8K to its test split as JSONL")
    answers = known_answers(path)
    suite: Any = open_suite("math", Ask(data=path, limit=60))
    gold = suite.score_lm(StandIn(answers.__getitem__), "gold")
    assert values(gold) == {"exact match, strict": 1.0, "exact match, flexible": 1.0}
    assert [score.n for score in gold.scores] == [60, 60]
    assert [score.stderr for score in gold.scores] == [0.0, 0.0]
    assert values(suite.score_lm(StandIn(lambda asked: wrong(answers[asked])), "wrong")) == {
        "exact match, strict": 0.0,
        "exact match, flexible": 0.0,
    }


def test_strict_asks_for_the_form_and_flexible_for_the_number() -> None:
    path = sample_path("heldout")
    answers = known_answers(path)
    suite: Any = open_suite("math", Ask(data=path, limit=4))
    loose = StandIn(lambda asked: f"So it must be {answers[asked].rpartition('#### ')[2]}")
    assert values(suite.score_lm(loose, "loose")) == {
        "exact match, strict": 0.0,
        "exact match, flexible": 1.0,
    }
    odd = list(answers)[:4:2]
    half = suite.score_lm(StandIn(lambda asked: answers[asked] if asked in odd else "no idea"), "half")
    assert values(half) == {"exact match, strict": 0.5, "exact match, flexible": 0.5}
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
        result = suite.score_lm(lm, "silent")
        assert (result.data, result.setting) == (str(heldout), f"5-shot from {source}")
        for prompt, question in zip(lm.prompts, known_answers(heldout), strict=False):
            *examples, asked = prompt.removeprefix("Question: ").split("\n\nQuestion: ")
            assert asked == f"{question}\nAnswer:"
            assert len(examples) == 5
            assert {example.partition("\nAnswer:")[0] for example in examples} <= known_answers(pool).keys()


def test_a_question_is_no_example_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(sample_path("heldout").read_text(encoding="utf-8").splitlines()[:9]))
    questions = known_answers(path)
    suite: Any = open_suite("math", Ask(data=path, fewshot_data=path, limit=4))
    lm = StandIn(lambda _: "")
    suite.score_lm(lm, "silent")
    assert len(lm.prompts) == 4
    assert all(
        prompt.count(f"{question}\n") == 1 for prompt, question in zip(lm.prompts, questions, strict=False)
    )
    with pytest.raises(FileProblem, match="0 rows besides the scored ones"):
        open_suite("math", Ask(data=path, fewshot_data=path))


def test_a_loaded_model_is_scored(
    make: MakeSubject, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    suite_file = tmp_path / "short.yaml"
    suite_file.write_text(
        "adapter: gsm8k\ndata: {sample: heldout}\nsettings: {fewshot: 2, max_new_tokens: 8}\n"
    )
    tiny = make(positions=128)
    seen: list[tuple[int, int]] = []
    results = [
        open_suite(str(suite_file), Ask(limit=5)).score(
            tiny, batch_size=batch_size, progress=lambda done, total: seen.append((done, total))
        )
        for batch_size in (2, 2)
    ]
    assert values(results[0]) == values(results[1])
    assert seen[:5] == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert results[0].model == "tiny"
    assert results[0].notes == ("5 of 5 prompts were cut to their last 120 tokens",)
    assert capfd.readouterr() == ("", "")


def test_a_model_without_room_for_the_answer_is_refused(make: MakeSubject) -> None:
    suite = open_suite("math", Ask(data=sample_path("heldout")))
    with pytest.raises(
        BadOption, match="max_new_tokens of the suite 'math' is 256; give less than the 64 positions"
    ):
        suite.score(make(positions=64), batch_size=1, progress=None)


def test_bad_data_is_named_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = {"question": "1+1?", "answer": "1 + 1 = 2\n#### 2"}
    for row, said in (
        ({"question": "q"}, "row 2: it has question"),
        ({"question": "q", "answer": "it is 3"}, "row 2: its answer does not end with #### and a number"),
        ({"text": "#### 3"}, "row 2: it has no question"),
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
        NoData, match=r"tried --data: not given; openai/gsm8k on the hub: .*question and answer: --data"
    ):
        open_suite("math")


def test_what_the_hub_gave_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cdm_toolkit.evaluation import data

    asked: list[str] = []

    def download(source: object, split: str) -> list[dict[str, str]]:
        asked.append(split)
        return [{"question": f"{split} {n}?", "answer": f"#### {n}"} for n in range(7)]

    monkeypatch.setattr(data, "_download", download)
    monkeypatch.setenv("CDM_CACHE", str(tmp_path))
    for _ in range(2):
        suite: Any = open_suite("math")
        lm = StandIn(lambda asked: f"#### {asked[-2]}")
        result = suite.score_lm(lm, "gold")
        assert values(result)["exact match, strict"] == 1.0
        assert result.data == "openai/gsm8k test (hub)"
        assert result.setting == "5-shot from openai/gsm8k train (hub)"
        assert "Question: train" in lm.prompts[0]
    assert asked == ["test", "train"]


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "cdm_toolkit.evaluation.gsm8k.find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    with pytest.raises(MissingExtra, match=r"the suite 'math' needs lm-eval.*cdm-toolkit\[eval\]"):
        open_suite("math")
