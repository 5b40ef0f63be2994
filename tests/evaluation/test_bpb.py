"""Bits per byte against what a person would compute by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cdm_toolkit.errors import BadOption, BadRow, CdmError, FileProblem, NoData, VocabularyTooSmall
from cdm_toolkit.evaluation.bpb import Passage, PassageBits, bits_per_byte, passage_bits
from cdm_toolkit.evaluation.evaluate import Ask, Subject, open_suite, start_token
from cdm_toolkit.samples import sample_path

MakeSubject = Callable[..., Subject]

TEXTS = (
    "Ada buys 3 pens at 2 dollars each.",
    "x",
    "Zażółć gęślą jaźń 你好 👩‍👩‍👧 naïve",
    "Each of the 13 rows of a circus has 22 seats.\nTickets are 6 dollars, and all but 31 are sold. " * 3,
)


def measure(subject: Subject, passages: Sequence[Passage], **how: Any) -> list[PassageBits]:
    """Measure all passages, in their order."""
    return sorted(passage_bits(subject, passages, **how), key=lambda measured: measured.passage)


def bits(subject: Subject, passages: Sequence[Passage], **how: Any) -> list[float]:
    return [measured.bits for measured in measure(subject, passages, **how)]


def value_of(subject: Subject, passages: Sequence[Passage], **how: Any) -> tuple[float, float | None]:
    scored_bytes = np.array([passage.scored_bytes for passage in passages], dtype=np.float64)
    return bits_per_byte(np.array(bits(subject, passages, **how)), scored_bytes)


def by_hand(subject: Subject, text: str, given: int = 0) -> float:
    """Sum -log2 p(token | all before) over the tokens that end after `given` bytes, in one pass."""
    tokenizer = subject.tokenizer
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = [start_token(tokenizer), *encoding.input_ids]
    with torch.no_grad():
        logits = subject.model(torch.tensor([ids])).logits[0].double()
    surprise = -torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])] / math.log(2)
    ends = [len(text[:end].encode()) for _, end in encoding.offset_mapping]
    return sum(bits for bits, end in zip(surprise.tolist(), ends, strict=True) if end > given)


def test_equals_the_computation_by_hand(subject: Subject) -> None:
    passages = [Passage(text) for text in TEXTS]
    measured = measure(subject, passages)
    expected = [by_hand(subject, text) for text in TEXTS]
    assert [each.bits for each in measured] == pytest.approx(expected, rel=1e-5)
    value, _ = value_of(subject, passages)
    assert value == pytest.approx(sum(expected) / sum(len(text.encode()) for text in TEXTS), abs=1e-4)
    assert not any(each.changed_bytes for each in measured)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
@pytest.mark.parametrize(("window", "stride"), [(1024, 512), (1024, 1), (300, 300)])
def test_does_not_depend_on_batch_size_or_stride(
    subject: Subject, batch_size: int, window: int, stride: int
) -> None:
    passages = [Passage(text) for text in TEXTS]
    measured = bits(subject, passages, window=window, stride=stride, batch_size=batch_size)
    assert measured == pytest.approx(bits(subject, passages), rel=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 8), (16, 5), (7, 1), (2, 1)])
def test_a_long_text_is_read_in_windows_that_score_each_token_once(
    subject: Subject, window: int, stride: int
) -> None:
    text = TEXTS[-1]
    ids = [start_token(subject.tokenizer), *subject.tokenizer(text, add_special_tokens=False).input_ids]
    expected, scored = 0.0, 0
    for begin in range(0, len(ids) - 1, stride):  # one window after the other, each new target once
        seen = ids[begin : begin + window]
        with torch.no_grad():
            log_p = torch.log_softmax(subject.model(torch.tensor([seen])).logits[0].double(), -1)
        for place in range(len(seen)):
            target = begin + place + 1
            if scored < target < len(ids):
                expected -= float(log_p[place, ids[target]]) / math.log(2)
                scored = target
    assert scored == len(ids) - 1
    (measured,) = measure(subject, [Passage(text)], window=window, stride=stride, batch_size=3)
    assert measured.bits == pytest.approx(expected, rel=1e-5)
    assert measured.windows > 1


def test_windows_are_no_longer_than_the_model_has_positions(make: MakeSubject) -> None:
    short = make(positions=16)
    passages = [Passage(TEXTS[-1])]
    assert bits(short, passages, stride=8) == pytest.approx(bits(short, passages, window=16, stride=8))
    with pytest.raises(BadOption, match="1 to 16"):
        measure(short, [Passage("a")], stride=17)


def test_a_given_prompt_is_context_only(subject: Subject) -> None:
    prompt, completion = "How many pens does Ada buy?\n", "Ada buys 3 * 4 = 12 pens.\n#### 12"
    given = len(prompt.encode())
    passages = [Passage(prompt + completion, given), Passage(prompt + completion)]
    measured = bits(subject, passages)
    assert measured == pytest.approx(
        [by_hand(subject, prompt + completion, given), by_hand(subject, prompt + completion)], rel=1e-5
    )
    assert [passage.scored_bytes for passage in passages] == [len(completion), given + len(completion)]
    assert measured[0] < measured[1]


def test_a_uniform_model_pays_the_same_for_each_token(make: MakeSubject) -> None:
    """Whatever stands before the first token, nothing is free: with no start token it is charged as well."""
    for bos, eos in (("<s>", "</s>"), (None, "</s>"), (None, None)):
        uniform = make(bos=bos, eos=eos)
        torch.nn.init.zeros_(uniform.model.lm_head.weight)
        tokens = [len(uniform.tokenizer(text, add_special_tokens=False).input_ids) for text in TEXTS]
        measured = bits(uniform, [Passage(text) for text in TEXTS])
        expected = [n * math.log2(uniform.view.vocab_size) for n in tokens]
        assert measured == pytest.approx(expected, rel=1e-6), (bos, eos)


def test_standard_error_is_that_of_a_ratio(subject: Subject) -> None:
    passages = [Passage(text) for text in TEXTS]
    _, stderr = value_of(subject, passages)
    left_out = [value_of(subject, passages[:i] + passages[i + 1 :])[0] for i in range(len(passages))]
    n, mean = len(left_out), sum(left_out) / len(left_out)
    jackknife = math.sqrt((n - 1) / n * sum((value - mean) ** 2 for value in left_out))
    assert stderr == pytest.approx(jackknife, rel=0.7)  # two estimates of one thing, from four texts
    assert value_of(subject, passages[:1])[1] is None


def test_some_passages_are_given_to_the_last_bit_as_among_all(subject: Subject) -> None:
    """A run that goes on makes the batches of an unbroken one, so that no rounding tells them apart."""
    passages = [Passage(text) for text in TEXTS * 2]
    whole = measure(subject, passages, batch_size=3, window=40, stride=20)
    for only in ({1}, {0, 6}, {3, 7}, set()):
        some = measure(subject, passages, batch_size=3, window=40, stride=20, only=only)
        assert some == [whole[number] for number in sorted(only)]


def test_a_model_that_is_broken_or_too_small_is_named(make: MakeSubject) -> None:
    broken = make()
    broken.model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(CdmError, match="tiny gives text 1 a likelihood that is not a number"):
        measure(broken, [Passage("a")])
    small = make()
    small.model.resize_token_embeddings(100)
    with pytest.raises(VocabularyTooSmall, match="100 embedding rows"):
        measure(small, [Passage(TEXTS[2])])


def test_the_suite_scores_rows_with_and_without_a_prompt(subject: Subject, tmp_path: Path) -> None:
    pairs = [("q?", "a 1\n#### 1"), ("p", "c"), ("hi", "ho"), ("", "plain")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    suite = open_suite("bpb", Ask(data=path, batch_size=2))
    items = {item.key: item for item in suite.score(subject, suite.contents.keys)}
    (score,) = suite.summarize([items[key] for key in suite.contents.keys]).scores
    texts = ["q?\na 1\n#### 1", "p\nc", "hi\nho", "plain"]
    assert [items[key].reference for key in suite.contents.keys] == texts
    assert (score.n, score.higher_is_better) == (4, False)
    assert score.value == pytest.approx(
        sum(by_hand(subject, text) for text in texts) / sum(map(len, texts)), rel=1e-5
    )


def test_the_suite_scores_plain_text_and_says_when_it_needs_windows(subject: Subject, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(TEXTS[-1] * 30)
    suite = open_suite("bpb", Ask(data=path, batch_size=2))
    items = list(suite.score(subject, suite.contents.keys))
    (score,), notes = suite.summarize(items).scores, suite.summarize(items).notes
    assert (score.n, score.stderr) == (1, None)
    assert "context of at most 1024 tokens" in notes[0]
    assert items[0].details["windows"] > 1


def test_a_lossy_tokenizer_is_said(make: MakeSubject) -> None:
    from tokenizers import normalizers

    from cdm_toolkit.tokdiff.view import make_view

    plain = make()
    plain.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    lossy = Subject(
        "lossy", plain.model, plain.tokenizer, make_view("lossy", plain.tokenizer.backend_tokenizer)
    )
    # "A" and " P": the blank shares a token with the letter
    assert [each.changed_bytes for each in measure(lossy, [Passage("Ada has 3 Pens")])] == [3]


def test_the_suite_refuses_what_it_cannot_score(tmp_path: Path) -> None:
    with pytest.raises(NoData, match=r"no data for the suite 'bpb', tried `data`: not given; .* as `data`"):
        open_suite("bpb")
    with pytest.raises(FileProblem, match="no such file"):
        open_suite("bpb", Ask(data=tmp_path / "none.jsonl"))
    with pytest.raises(FileProblem, match=r"[Nn]o such file"):
        open_suite("bpb", Ask(data=tmp_path / "none.txt"))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(FileProblem, match="it is empty"):
        open_suite("bpb", Ask(data=tmp_path / "empty.txt"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"words": "b"}\n')
    with pytest.raises(BadRow, match="row 2: it has words"):
        open_suite("bpb", Ask(data=tmp_path / "bad.jsonl"))
    (tmp_path / "blank.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    with pytest.raises(BadRow, match="row 2: has no text to score"):
        open_suite("bpb", Ask(data=tmp_path / "blank.jsonl"))
    for ask, said in (
        (Ask(limit=0), "`limit` is 0"),
        (Ask(batch_size=0), "`batch_size` is 0"),
        (Ask(tasks=("a",)), "no `tasks`: the suite 'quickstart' has no use for it"),
        (Ask(chat_template=True), "no `chat_template`"),
    ):
        with pytest.raises(BadOption, match=said):
            open_suite("quickstart", ask)


@pytest.mark.slow
def test_smollm2_equals_the_computation_by_hand() -> None:
    from cdm_toolkit.evaluation.evaluate import load_subject

    try:
        smollm2 = load_subject("smollm2")
    except CdmError as error:
        pytest.skip(f"no SmolLM2 here: {error}")
    rows = [json.loads(line) for line in sample_path("heldout").read_text(encoding="utf-8").splitlines()[:3]]
    texts = [f"{row['question']}\n{row['answer']}" for row in rows]
    value = sum(by_hand(smollm2, text) for text in texts) / sum(len(text.encode()) for text in texts)
    for batch_size, stride in ((1, 512), (2, 1), (6, 1024)):
        measured, _ = value_of(
            smollm2, [Passage(text) for text in texts], batch_size=batch_size, stride=stride
        )
        assert measured == pytest.approx(value, abs=1e-4)
