"""Models on held-out text: their bits, and how far they are from a teacher."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdm_toolkit.compare import measure
from cdm_toolkit.compare.corpora import text_rows
from cdm_toolkit.compare.measure import Heldout, score_model
from cdm_toolkit.compare.types import Measured
from cdm_toolkit.errors import BadArtifact, BadOption, BadRow, CdmError, FileProblem, SourceNotFound
from cdm_toolkit.evaluation.bpb import Passage, passage_bits
from cdm_toolkit.evaluation.evaluate import Subject
from cdm_toolkit.evaluation.generation import GenerationSettings, generate_batch
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.hub.students import new_student
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.kd.rows import Message, Row

KINDS = {
    "manual": text_rows("python:manual", rows=3, split="heldout"),
    "sums": [
        Row(1, "What is 17 + 25?", "It is 42.\n\nAnd 42 is even."),
        Row(2, "Blanks", "  \n\n  stand before the completion"),  # tokens straddle its beginning
        Row(5, "größe", "漢字 are two characters"),
        Row(6, "Hello", "Hello!", (Message("user", "Hello"), Message("assistant", "Hello!"))),
    ],
}
"""Numbers need not be those of a file."""


def _model(folder: Path, tokenizer: str, entries: int, seed: int) -> Path:
    """Make a small model that is sure of some things: fresh weights alone predict all ids alike."""
    try:
        model = new_student(tokenizer, "200k", folder, entries=entries, seed=seed)
    except SourceNotFound as error:
        pytest.skip(str(error))
    for weight in model.parameters():
        weight.data *= 3
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _model(tmp_path_factory.mktemp("models") / "teacher", "smollm2", 900, 1)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _model(tmp_path_factory.mktemp("models") / "student", "gpt2", 700, 2)


@pytest.fixture(scope="module")
def startless(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer names no special token."""
    folder = shutil.copytree(student, tmp_path_factory.mktemp("models") / "startless")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if not key.endswith("_token")}))
    return folder


@pytest.fixture(scope="module")
def heldout(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Heldout:
    return Heldout.make(tmp_path_factory.mktemp("heldout") / "text", KINDS, str(teacher))


@pytest.fixture(params=["teacher", "student", "startless"])
def model(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def _close(left: Measured, right: Measured, *, relative: float) -> None:
    assert (left.scored_bytes, left.boundaries) == (right.scored_bytes, right.boundaries)
    assert left.bits == pytest.approx(right.bits, rel=relative)
    assert left.divergence == pytest.approx(right.divergence, rel=relative, abs=1e-6)


def test_bits_are_those_of_bits_per_byte(heldout: Heldout, model: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    subject = Subject("model", load_model(str(model)), tokenizer.tokenizer, tokenizer.view)
    measured = score_model(model, heldout)
    for kind, rows in heldout.rows.items():
        passages = [Passage(row.text, row.completion_start) for row in rows]
        bits = sum(of_row.bits for of_row in passage_bits(subject, passages))
        assert measured[kind].scored_bytes == sum(passage.scored_bytes for passage in passages)
        assert measured[kind].bits == pytest.approx(bits, rel=1e-6)


def test_the_teacher_is_measured_when_it_is_asked(heldout: Heldout, teacher: Path) -> None:
    again = score_model(teacher, heldout)
    for kind, measured in heldout.teacher.items():
        assert (measured.divergence, measured.boundaries) == (0.0, 0)
        assert measured.bits == pytest.approx(again[kind].bits, rel=1e-6)


def test_no_model_diverges_from_itself(heldout: Heldout, teacher: Path) -> None:
    for measured in score_model(teacher, heldout).values():
        assert measured.boundaries > 10
        assert abs(measured.divergence) < 1e-6


def test_the_batch_size_does_not_matter(heldout: Heldout, model: Path) -> None:
    measured = score_model(model, heldout)
    for size in (1, 2, 3):
        for kind, of_kind in score_model(str(model), heldout, batch_size=size).items():
            _close(of_kind, measured[kind], relative=2e-6)


# Words and digits, by hand


def _words_by_hand(row: Row, folder: Path) -> tuple[int, int, float]:
    """Read the completion token by token: its predicted words, its digits, the bits of tokens with a digit."""
    tokenizer = load_tokenizer(str(folder))
    view, fast = tokenizer.view, tokenizer.tokenizer
    start = fast.eos_token_id if fast.bos_token_id is None else fast.bos_token_id
    text, begin = row.text.encode(), row.completion_start
    ids = ([] if start is None else [start]) + view.encode(row.text).ids.tolist()
    predicted = _probabilities(load_model(str(folder)), ids)
    wrong: set[int] = set()
    bits, at = 0.0, 0
    for i in range(start is not None, len(ids)):
        span = range(at, at + len(view.token_bytes[ids[i]]))
        at = span.stop
        p = predicted[i - 1][ids[i]] if i else 1 / view.vocab_size
        wrong |= set() if i and predicted[i - 1].argmax() == ids[i] else set(span)
        digits = any(text[byte : byte + 1].isdigit() for byte in span if byte >= begin)
        bits -= math.log2(p) if digits else 0.0
    words = [match.span() for match in re.finditer(rb"\s*\S+", text[begin:])]
    right = sum(wrong.isdisjoint(range(begin + a, begin + b)) for a, b in words)
    return right, sum(byte in b"0123456789" for byte in text[begin:]), bits


def test_words_and_digits_are_what_the_definition_says(heldout: Heldout, model: Path) -> None:
    for kind, measured in score_model(model, heldout).items():
        by_hand = [_words_by_hand(row, model) for row in heldout.rows[kind]]
        words, digits, bits = map(sum, zip(*by_hand, strict=True))
        assert (measured.predicted_words, measured.digit_bytes) == (words, digits)
        assert measured.digit_bits == pytest.approx(bits, rel=1e-5)
        assert measured.words == sum(len(row.completion.split()) for row in heldout.rows[kind])


def test_what_a_model_says_itself_is_predicted(model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    subject = Subject("model", load_model(str(model)), tokenizer.tokenizer, tokenizer.view)
    prompts = [f"{word}:" for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")]
    said = generate_batch(
        subject, [f"{prompt}\n" for prompt in prompts], GenerationSettings(max_new_tokens=2)
    )
    rows = [
        Row(i, prompt, f"{text} 17 no") for i, (prompt, text) in enumerate(zip(prompts, said, strict=True), 1)
    ]
    heldout = Heldout(tmp_path, {"one": tuple(rows)}, {}, str(model), None)
    measured = score_model(model, heldout)["one"]
    assert 0 < measured.predicted_words == sum(_words_by_hand(row, model)[0] for row in rows) < measured.words
    assert measured.ratio("predicted_words", "words") == measured.predicted_words / measured.words


# Divergence, by hand


def _positions_read(view: Any, text: str, start: int | None) -> dict[int, int]:
    """Say, for each byte of a text at which a token ends, how many tokens a model has read there."""
    positions, at, read = {}, 0, int(start is not None)
    if read:
        positions[0] = read
    for token_id in view.encode(text).ids.tolist():
        at, read = at + len(view.token_bytes[token_id]), read + 1
        positions[at] = read
    return positions


def _probabilities(model: Any, ids: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(1, keepdims=True))


def _partners(teacher: Any, student: Any) -> dict[int, int]:
    """Pair the ids with the same bytes, and special tokens that have a role in common."""
    of_bytes = {token: i for i, token in enumerate(student.token_bytes) if token is not None}
    pairs = {i: of_bytes[token] for i, token in enumerate(teacher.token_bytes) if token in of_bytes}
    for token in teacher.special.values():
        for other in student.special.values():
            if token.roles & other.roles:
                pairs[token.id] = other.id
    return pairs


def _divergence_by_hand(row: Row, teacher: Path, student: Path, top_k: int) -> tuple[float, int]:
    """Follow the definition: at each shared boundary of the completion, KL over the ids of the student."""
    sides = []
    for folder in (teacher, student):
        tokenizer = load_tokenizer(str(folder))
        view, fast = tokenizer.view, tokenizer.tokenizer
        start = fast.eos_token_id if fast.bos_token_id is None else fast.bos_token_id
        ids = ([] if start is None else [start]) + view.encode(row.text).ids.tolist()
        predicted = _probabilities(load_model(str(folder)), ids)
        sides.append((view, _positions_read(view, row.text, start), predicted, fast.eos_token_id is not None))
    (view_t, places_t, t, ends_t), (view_s, places_s, s, ends_s) = sides
    whole = len(row.text.encode())
    shared = [
        at
        for at in sorted(places_t.keys() & places_s.keys())
        if row.completion_start <= at < whole or (at == whole and ends_t and ends_s)
    ]
    partners = _partners(view_t, view_s)
    total = 0.0
    for at in shared:
        p, q = t[places_t[at] - 1], s[places_s[at] - 1]
        mass: dict[int, float] = {}
        for i in np.argsort(-p)[:top_k].tolist():
            if i in partners:
                mass[partners[i]] = mass.get(partners[i], 0.0) + p[i]
        kept_p, kept_q = np.array(list(mass.values())), q[list(mass)]
        outcomes_p, outcomes_q = np.append(kept_p, 1 - kept_p.sum()), np.append(kept_q, 1 - kept_q.sum())
        total += float((outcomes_p * np.log(outcomes_p / outcomes_q)).sum())
    return total, len(shared)


@pytest.mark.parametrize("name", ["student", "startless"])
def test_divergence_is_what_the_definition_says(
    heldout: Heldout, teacher: Path, name: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(name)
    for kind, measured in score_model(folder, heldout).items():
        by_hand = [_divergence_by_hand(row, teacher, folder, measure.TOP_K) for row in heldout.rows[kind]]
        divergence, boundaries = map(sum, zip(*by_hand, strict=True))
        assert measured.boundaries == boundaries
        assert measured.divergence == pytest.approx(divergence, rel=1e-5)
        assert measured.ratio("divergence", "boundaries") > 0.01


def test_a_study_without_the_divergence(
    heldout: Heldout, teacher: Path, student: Path, tmp_path: Path
) -> None:
    bits_only = Heldout.make(tmp_path, KINDS, str(teacher), divergence=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heldout.json", "rows.jsonl"]
    assert bits_only.teacher == heldout.teacher
    for kind, measured in score_model(student, bits_only).items():
        assert (measured.divergence, measured.boundaries) == (0.0, 0)
        assert measured.bits == pytest.approx(score_model(student, heldout)[kind].bits, rel=1e-6)


# On disk


def test_what_is_opened_is_what_was_made(heldout: Heldout, teacher: Path) -> None:
    again = Heldout.open(heldout.folder)
    assert again.rows == heldout.rows
    assert [row.number for rows in again.rows.values() for row in rows] == list(range(1, 8))
    assert {kind: [row.text for row in rows] for kind, rows in again.rows.items()} == {
        kind: [row.text for row in rows] for kind, rows in KINDS.items()
    }
    assert (again.teacher, again.teacher_name, again.top_k) == (heldout.teacher, str(teacher), measure.TOP_K)
    made_by = json.loads((heldout.folder / "heldout.json").read_text())["provenance"]
    assert made_by["versions"]["torch"]


def test_what_is_there_is_not_made_again(
    heldout: Heldout, teacher: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(measure, "load_model", loaded)
    assert Heldout.make(heldout.folder, KINDS, str(teacher)).teacher == heldout.teacher
    others: tuple[tuple[dict[str, list[Row]], Path, bool], ...] = (
        (KINDS | {"manual": KINDS["manual"][:2]}, teacher, True),
        ({"sums": KINDS["sums"], "manual": KINDS["manual"]}, teacher, True),
        (KINDS, student, True),
        (KINDS, teacher, False),
    )
    for kinds, other, divergence in others:
        with pytest.raises(BadArtifact, match="other held-out text"):
            Heldout.make(heldout.folder, kinds, str(other), divergence=divergence)


def test_making_goes_on_where_it_was_cut_off(
    heldout: Heldout, teacher: Path, student: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(heldout.folder, tmp_path / "text")
    (folder / "heldout.json").unlink()
    again = Heldout.make(folder, KINDS, str(teacher))
    assert again.teacher == heldout.teacher
    assert score_model(student, again) == score_model(student, heldout)


def test_damaged_folders(heldout: Heldout, tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match=r"heldout\.json"):
        Heldout.open(tmp_path)
    folder = shutil.copytree(heldout.folder, tmp_path / "text")
    rows = (folder / "rows.jsonl").read_text(encoding="utf-8")
    (folder / "rows.jsonl").write_text(rows.replace("42", "43"), encoding="utf-8")
    with pytest.raises(BadArtifact, match="not the rows that were written"):
        Heldout.open(folder)
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    header = json.loads((folder / "heldout.json").read_text())
    for broken in (
        "{",
        "[]",
        json.dumps(header | {"version": 3}),
        json.dumps(header | {"kinds": {"sums": 4}}),
    ):
        (folder / "heldout.json").write_text(broken)
        with pytest.raises(BadArtifact):
            Heldout.open(folder)


# Rows that cannot be measured


def _measure(row: Row, teacher: Path, folder: Path) -> dict[str, Measured]:
    return score_model(teacher, Heldout(folder, {"one": (row,)}, {}, str(teacher), None))


def test_rows_are_whole_or_refused(teacher: Path, tmp_path: Path) -> None:
    long = "one two three " * 1000
    with pytest.raises(BadOption, match=r"longest held-out row is \d+; give at most 2048"):
        _measure(Row(1, "", long), teacher, tmp_path)
    fits = "a b c d " * 250
    assert _measure(Row(1, "", fits), teacher, tmp_path)["one"].scored_bytes == 2000


def test_bytes_that_a_tokenizer_drops_are_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRow, match=r"row 7: .* reads b'' where it has b'\\x06'"):
        _measure(Row(7, "", "a mark \x06 that SmolLM2 has no byte for"), teacher, tmp_path)


@pytest.mark.parametrize("kinds", [{}, {"sums": []}])
def test_no_rows(kinds: dict[str, list[Row]], teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="rows of each kind"):
        Heldout.make(tmp_path, kinds, str(teacher))


def test_a_row_without_a_completion(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRow, match="held-out text sums, row 3: it has no completion"):
        Heldout.make(tmp_path, {"sums": [Row(3, "prompt", "")]}, str(teacher))


def test_a_row_without_a_shared_boundary(teacher: Path, startless: Path, tmp_path: Path) -> None:
    """One token of the teacher, behind a start that the student does not have, and several of the student."""
    view_t, view_s = (load_tokenizer(str(folder)).view for folder in (teacher, startless))
    words = [token.decode() for token in view_t.token_bytes if token and token.isalpha()]
    word = next(word for word in words if len(view_s.encode(word)) > 1)
    text = Heldout.make(tmp_path, {"one": [Row(1, "", word)]}, str(teacher))
    with pytest.raises(BadRow, match=r"row 1: .* has no boundary in it that the teacher shares"):
        score_model(startless, text)


def test_a_row_of_one_token_without_a_start(startless: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRow, match=r"row 1: .* has no token in its completion that follows another"):
        _measure(Row(1, "", "a"), startless, tmp_path)


def test_weights_that_are_no_numbers(heldout: Heldout, student: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(student, tmp_path / "broken")
    model = load_model(str(broken))
    model.get_input_embeddings().weight.data.fill_(math.nan)
    model.save_pretrained(broken)
    with pytest.raises(CdmError, match="a likelihood that is not a number"):
        score_model(broken, heldout)
