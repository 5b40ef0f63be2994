"""`kd` inside TRL's GOLDTrainer: what is aligned of the ids that it hands over, and runs of the released package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unicodedata import normalize

import preloaded
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm_toolkit import kd
from cdm_toolkit.alignment.aligners import align
from cdm_toolkit.artifacts.cache import cache_folder
from cdm_toolkit.errors import BadOption, SourceNotFound
from cdm_toolkit.hub.cache_entries import make_entry
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.integrations.trl import GoldLoss, set_loss
from cdm_toolkit.kd.batch import AlignedBatch
from cdm_toolkit.tokdiff.view import TokenizerView

ROOT = Path(__file__).parents[2]
LLAMA2 = ROOT.parent / "shared" / "tokenizers" / "llama2"
PAIRS = [
    ("smollm2", "mistral"),
    ("mistral", "smollm2"),
    ("mistral", "mistral"),
    (str(LLAMA2), "qwen2"),
    ("mistral", str(LLAMA2)),
]
"""Teacher and student; the SentencePiece ones are mistral and llama2."""
NOT_LEARNED = -100


loaded = cache(load_tokenizer)


@cache
def loss_of(teacher: str, student: str) -> GoldLoss:
    """Take a method without tables: the alignment is the same for all."""
    for name in (teacher, student):
        if "/" in name and not Path(name).is_dir():
            pytest.skip(f"{name} is not here")
    try:
        pair = kd.TokenizerPair.from_loaded(loaded(teacher), loaded(student))
    except SourceNotFound as error:
        pytest.skip(str(error))
    return GoldLoss(kd.ULD(pair, top_k=10))


Handed = dict[str, torch.Tensor]


def handed(rows: list[tuple[list[int], list[int], list[int], list[int]]], student_pad: int = 0) -> Handed:
    """Pad rows as the trainer does: prompt and answer of the student on the left, those of the teacher on the right."""
    width_s, width_t = (max(len(row[at]) + len(row[at + 1]) for row in rows) for at in (0, 2))
    found: dict[str, list[list[int]]] = {}
    for prompt_s, answer_s, prompt_t, answer_t in rows:
        before, after = width_s - len(prompt_s + answer_s), width_t - len(prompt_t + answer_t)
        for name, ids in (
            ("student_input_ids", [student_pad] * before + prompt_s + answer_s),
            ("student_labels", [NOT_LEARNED] * (before + len(prompt_s)) + answer_s),
            ("teacher_input_ids", prompt_t + answer_t + [0] * after),
            ("teacher_labels", [NOT_LEARNED] * len(prompt_t) + answer_t + [NOT_LEARNED] * after),
        ):
            found.setdefault(name, []).append(ids)
    return {name: torch.tensor(ids) for name, ids in found.items()}


def as_trl_has_it(loss: GoldLoss, answer_s: list[int], *, text: str | None = None) -> Handed:
    """Make what the trainer makes of a student's answer: the teacher reads its text, encoded by itself, and an end."""
    teacher, student = loss.method.pair.teacher, loss.method.pair.student
    if text is None:
        text = text_of(loss, answer_s)
    answer_t = teacher.view.backend.encode(text, add_special_tokens=False).ids
    prompt_s, prompt_t = ([1, *view.encode("Who?\n").ids.tolist()] for view in (student.view, teacher.view))
    return handed([(prompt_s, answer_s, prompt_t, [*answer_t, teacher.eos])])


def text_of(loss: GoldLoss, answer: list[int], prompt: str = "Who?\n") -> str:
    (text,) = loss.texts(torch.tensor([[NOT_LEARNED, *answer]]), torch.tensor([[0, *answer]]), [prompt])
    return text


def spelled(view: TokenizerView, ids: list[int]) -> bytes:
    return b"".join(view.literals[i] for i in ids if 0 <= i < view.vocab_size)


def groups_of(batch: AlignedBatch) -> list[tuple[list[int], list[int]]]:
    """Give the groups of a batch of one row as tokens of both sides, by their flat positions."""
    (side,) = batch.teachers
    found: list[tuple[list[int], list[int]]] = [([], []) for _ in range(side.groups)]
    for group, at in zip(side.token_group.tolist(), side.token_positions.tolist(), strict=True):
        found[group][0].append(at + 1)
    at_s = batch.label_positions[side.student_token_rows] + 1
    for group, at in zip(side.student_token_group.tolist(), at_s.tolist(), strict=True):
        found[group][1].append(at)
    return found


def aligned(loss: GoldLoss, given: Handed) -> list[tuple[bytes, bytes]]:
    """Give the groups of a row as what their tokens spell, after checking where they stand."""
    batch = loss.collate(**given)
    view_t, view_s = loss.method.pair.teacher.view, loss.method.pair.student.view
    ids_t, ids_s = given["teacher_input_ids"][0].tolist(), given["student_input_ids"][0].tolist()
    first_t, first_s = (
        int((given[name][0] != NOT_LEARNED).nonzero()[0]) for name in ("teacher_labels", "student_labels")
    )
    asked = dict(
        zip(batch.teachers[0].token_positions.tolist(), batch.teachers[0].next_ids.tolist(), strict=True)
    )
    found, done = [], (0, 0)
    for tokens_t, tokens_s in groups_of(batch):
        assert tokens_t == [*range(tokens_t[0], tokens_t[-1] + 1)]
        assert tokens_s == [*range(tokens_s[0], tokens_s[-1] + 1)]
        assert done[0] <= tokens_t[0]
        assert done[1] <= tokens_s[0]
        done = tokens_t[-1] + 1, tokens_s[-1] + 1
        before_t, before_s = (
            spelled(view, ids[first:at])
            for view, ids, first, at in (
                (view_t, ids_t, first_t, tokens_t[0]),
                (view_s, ids_s, first_s, tokens_s[0]),
            )
        )
        assert read(before_t) == read(before_s), "what stands before a group is one text"
        found.append(
            (
                spelled(view_t, [asked[at - 1] for at in tokens_t]),
                spelled(view_s, ids_s[tokens_s[0] : done[1]]),
            )
        )
    return found


def read(text: bytes) -> str:
    """Leave out what encoding and decoding may change: blanks, control and half characters, composed ones."""
    whole = normalize("NFC", text.decode(errors="replace"))
    return re.sub("\ufffd+", "\ufffd", re.sub("[\0-\x08\x0b-\x20\x7f-\x9f]", "", whole))


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_what_both_encode_is_aligned_as_elsewhere(
    teacher: str, student: str, multilingual: list[str]
) -> None:
    loss = loss_of(teacher, student)
    pair, whole = loss.method.pair, 0
    for text in multilingual[:40]:
        given = as_trl_has_it(
            loss, [*pair.student.view.encode(text).ids.tolist(), pair.student.eos], text=text
        )
        found = aligned(loss, given)
        t, s = pair.teacher.view.encode(text), pair.student.view.encode(text)
        if not (t.exact.all() and s.exact.all()) or t.special.any() or s.special.any():
            continue
        if text.startswith(" "):
            continue
        whole += 1
        expected = [
            (spelled(t.view, t.ids[t0:t1].tolist()), spelled(s.view, s.ids[s0:s1].tolist()))
            for t0, t1, s0, s1 in align(t, s).groups.tolist()
        ]
        ends = (
            spelled(pair.teacher.view, [pair.teacher.eos]),
            spelled(pair.student.view, [pair.student.eos]),
        )
        blank = expected[0][0] != expected[0][1]  # only one of the two puts a blank before a text
        assert found == [*expected[blank:], ends]
    assert whole > 12


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
@given(draw=st.data())
@settings(max_examples=80)
def test_whatever_a_student_samples_no_group_is_wrong(teacher: str, student: str, draw: Any) -> None:
    """Half characters, special tokens, blanks: what is aligned has the same bytes after the same text."""
    loss = loss_of(teacher, student)
    pair = loss.method.pair
    view = pair.student.view
    of_texts = view.encode(" the café is naïve,\n\n  ́한국 🙂 é 漢字").ids.tolist()
    tokens = st.one_of(
        st.sampled_from(of_texts), st.integers(0, view.vocab_size - 1), st.sampled_from(sorted(view.special))
    )
    answer = draw.draw(st.lists(tokens, min_size=1, max_size=14))
    raw = view.backend.decode(answer, skip_special_tokens=False)  # as the trainer itself has it
    raw = (
        None if "\ufffd" in raw else raw
    )  # SentencePiece decodes bytes beside a half character as if all were halves
    ends = (
        spelled(pair.teacher.view, [pair.teacher.eos]),
        {each.content.encode() for each in view.special.values()},
    )
    for text in (None, raw):
        for bytes_t, bytes_s in aligned(loss, as_trl_has_it(loss, answer, text=text)):
            assert bytes_t == bytes_s or (bytes_t == ends[0] and bytes_s in ends[1])


ENDED = [*PAIRS[:3], ("smollm2", "qwen2")]


@pytest.mark.parametrize(("teacher", "student"), ENDED)
def test_the_end_of_an_answer_is_learned(teacher: str, student: str) -> None:
    """Also where the teacher reads the student's end as text; not of an answer that was cut, nor one in mid-text."""
    loss = loss_of(teacher, student)
    view, eos = loss.method.pair.student.view, loss.method.pair.student.eos
    ends = spelled(loss.method.pair.teacher.view, [loss.method.pair.teacher.eos]), spelled(view, [eos])
    ids, more = (view.encode(text).ids.tolist() for text in ("It is seven.", " So it is."))
    whole = aligned(loss, as_trl_has_it(loss, [*ids, eos]))
    assert whole[-1] == ends
    cut = aligned(loss, as_trl_has_it(loss, ids))
    assert cut == whole[:-1]
    assert aligned(loss, as_trl_has_it(loss, [eos])) == [ends]
    after = view.encode("\n").ids.tolist()[-1:]  # a template's, behind the end
    assert aligned(loss, as_trl_has_it(loss, [*ids, eos, *after])) == whole
    within = aligned(loss, as_trl_has_it(loss, [*ids, eos, *more, eos]))
    assert within[:2] == cut[:2]
    assert within[-1] == ends
    assert within.count(ends) == 1


def test_a_blank_that_only_one_side_has_costs_one_group() -> None:
    loss = loss_of("smollm2", "mistral")
    view = loss.method.pair.student.view
    ids = view.encode("It is seven.").ids.tolist()  # of ` It is seven.`: the student has sampled a blank
    assert text_of(loss, ids) == " It is seven."
    assert (
        text_of(loss, ids, "Answer: ") == "It is seven."
    )  # the blank is the prompt's, in one token with the word
    words = [(each, each) for each in (b" It", b" is", b" seven", b".")]
    assert aligned(loss, as_trl_has_it(loss, ids)) == words
    assert aligned(loss, as_trl_has_it(loss, ids, text=view.backend.decode(ids))) == words[1:]
    loss = loss_of("mistral", "smollm2")
    with_blank, without = (
        loss.method.pair.student.view.encode(text).ids.tolist() for text in (" It is seven.", "It is seven.")
    )
    assert text_of(loss, with_blank) == text_of(loss, without) == "It is seven."
    assert aligned(loss, as_trl_has_it(loss, with_blank)) == words
    assert aligned(loss, as_trl_has_it(loss, without)) == words[1:]


def test_half_a_character_costs_what_is_beside_it() -> None:
    loss = loss_of("smollm2", "mistral")
    view = loss.method.pair.student.view
    parts = [view.encode(text).ids.tolist() for text in ("Well, that", "is it seven?")]
    half = view.token_bytes.index(b"\xe2")
    words = [b" Well", b",", b" that", b" it", b" seven", b"?"]
    found = aligned(loss, as_trl_has_it(loss, [*parts[0], half, *parts[1]]))
    assert [one for one, _ in found] == words
    found = aligned(loss, as_trl_has_it(loss, [*parts[0], *parts[1], half]))
    assert [one for one, _ in found] == [*words[:3], b" is", *words[3:]]


def logits(given: Handed, whose: str, columns: int, seed: int) -> torch.Tensor:
    shape = (*given[f"{whose}_input_ids"].shape, columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def test_ids_without_a_token_and_rows_without_labels_have_no_groups() -> None:
    loss = loss_of("mistral", "smollm2")
    pair = loss.method.pair
    ids, columns = pair.student.view.encode("It is seven.").ids.tolist(), pair.vocab_s + 64
    spare = aligned(loss, as_trl_has_it(loss, [*ids[:2], columns - 1, *ids[2:]]))
    assert [one for one, _ in spare] == [b" is", b"."]  # the blank before it is the teacher's alone
    given = as_trl_has_it(loss, ids)
    nothing = given | {"student_labels": torch.full_like(given["student_labels"], NOT_LEARNED)}
    assert loss.collate(**nothing).teachers[0].groups == 0
    student, teacher = logits(given, "student", columns, 1), logits(given, "teacher", pair.vocab_t, 2)
    value = loss(student, teacher, **nothing)
    value.backward()
    assert value == 0
    assert not student.grad.any()


def test_a_batch_is_its_rows() -> None:
    """Padding on either side changes nothing; the loss is the mean over labels and groups, with gradients at both."""
    loss = loss_of("mistral", "smollm2")
    pair = loss.method.pair
    texts = (" It is seven.", " Nineteen, they say; is it?", "No")
    rows = [
        as_trl_has_it(loss, [*pair.student.view.encode(text).ids.tolist(), pair.student.eos])
        for text in texts
    ]
    parts = [
        tuple(
            row[f"{whose}_input_ids"][0][(row[f"{whose}_labels"][0] != NOT_LEARNED) == learned].tolist()
            for whose in ("student", "teacher")
            for learned in (False, True)
        )
        for row in rows
    ]
    both = handed(parts)  # type: ignore[arg-type]
    student, teacher = logits(both, "student", pair.vocab_s, 1), logits(both, "teacher", pair.vocab_t, 2)
    noted: dict[str, float] = {}
    whole = GoldLoss(loss.method, alpha=0.3, note=noted.__setitem__)
    value = whole(student, teacher, **both)
    value.backward()
    sums, labels, groups = torch.zeros(2), 0, 0
    for nth, row in enumerate(rows):
        size_s, size_t = row["student_input_ids"].shape[1], row["teacher_input_ids"].shape[1]
        batch = loss.collate(**row)
        of_row = teacher[nth : nth + 1, :size_t], student[nth : nth + 1, -size_s:]
        for alpha in (1, 0):
            one = GoldLoss(loss.method, alpha=alpha)(of_row[1], of_row[0], **row)
            sums[1 - alpha] += one.detach() * (len(batch.labels) if alpha else batch.teachers[0].groups)
        labels, groups = labels + len(batch.labels), groups + batch.teachers[0].groups
    ce, apart = (sums / torch.tensor([labels, groups])).tolist()
    assert value.item() == pytest.approx(0.3 * ce + 0.7 * apart, abs=1e-5)
    assert noted == pytest.approx(
        {"ce": ce, "kd": apart, "matched_mass": noted["matched_mass"], "aligned": 1 - 1 / labels}, abs=1e-5
    )
    reached = student.grad.abs().sum(-1) > 0
    assert reached.sum() == labels
    assert torch.equal(reached[:, :-1], both["student_labels"][:, 1:] != NOT_LEARNED)
    assert teacher.grad is None


def test_what_it_cannot_do_is_told() -> None:
    loss = loss_of("mistral", "smollm2")
    with pytest.raises(BadOption, match="`alpha` is 2; give a number from 0 to 1"):
        GoldLoss(loss.method, alpha=2)
    with pytest.raises(BadOption, match="`use_uld_loss` is False; give true: the trainer"):
        set_loss(SimpleNamespace(teacher_tokenizer=None), kd.Spelling)


# The released package, in an environment of its own


@pytest.fixture(scope="module")
def trl_environment() -> Path:
    """Install TRL alone into a folder of the cache; what it needs is here already."""
    wanted = re.search(
        "^trl==.*$", (ROOT / "tools" / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert wanted
    folder = cache_folder() / "test-environments" / wanted[0]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", wanted[0], "--target"]
    tried = ["--disable-pip-version-check", "--timeout", "15", "--retries", "1"]

    def install(making: Path) -> None:
        done = subprocess.run([*command, making, *tried], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"pip does not give {wanted[0]}: {done.stderr.strip().splitlines()[-1]}")

    return folder if folder.is_dir() else make_entry(folder, install)


@pytest.fixture(scope="module")
def found(trl_environment: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    for name in ("mistral", "smollm2"):
        try:
            load_tokenizer(name)
        except SourceNotFound as error:
            pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("trl")
    searched = map(str, (ROOT, trl_environment, Path(__file__).parent))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(searched), "CUDA_VISIBLE_DEVICES": ""}
    command = ["gold_in_trl", ROOT / "docs" / "how-to" / "train-in-trl.md", folder]
    done = preloaded.start(command, folder / "out.json", folder / "err.txt", environment)
    out, err = done.communicate()
    assert done.returncode == 0, err
    results: dict[str, Any] = json.loads(out)
    return results


@pytest.mark.slow
def test_the_page_trains_a_sentencepiece_student_on_its_own_samples(found: dict[str, Any]) -> None:
    page = found["page"]
    assert len(page["loss"]) == 2
    assert page["loss"] == pytest.approx(page["kd"])
    assert all(0 < loss < 10 for loss in page["loss"])
    assert min(page["aligned"]) > 0.9
    assert all(page["on_policy_loss"])


@pytest.mark.slow
def test_a_loss_in_the_trainer_is_that_of_ones_own_loop(found: dict[str, Any]) -> None:
    """On the same ids, sampled ones too, for a SentencePiece student; each side runs the models itself."""
    assert [(each["method"], each["lmbda"]) for each in found["same rows"]] == [
        (method, lmbda) for lmbda in (0.0, 1.0) for method in ("spelling", "alm", "gold")
    ]
    for each in found["same rows"]:
        assert each["rows"] >= (3 if each["lmbda"] else 4)
        assert each["groups"] > 30
        assert each["theirs"] == pytest.approx(each["ours"], abs=1e-5)


@pytest.mark.slow
def test_what_both_define_is_the_same(found: dict[str, Any]) -> None:
    assert [name for name, _, _ in found["one tokenizer"]] == ["kl", "reverse-kl", "jsd", "uld", "gold"]
    for _, theirs, ours in found["one tokenizer"]:
        assert ours == pytest.approx(theirs, abs=1e-5)
        assert ours > 0.1


@pytest.mark.slow
def test_accumulated_gradients_are_of_the_mean(found: dict[str, Any]) -> None:
    """By a SentencePiece teacher, which costs a group of each row: the blank before its answer."""
    for sampled, lines in enumerate(found["accumulated"]):
        assert len(lines) == 2
        for line in lines:
            ce = 0 if sampled else line["ce"]  # of samples there is none to learn
            assert line["loss"] == pytest.approx(0.25 * ce + 0.75 * line["kd"])
            assert line["grad_norm"] > 0
            assert (0.2 if sampled else 0.9) < line["aligned"] < 1  # samples are full of half characters


@pytest.mark.slow
def test_chats_are_aligned_and_end(found: dict[str, Any]) -> None:
    chats = found["chats"]
    assert chats["ends"] == 4
    assert chats["learned"] == chats["labels"]
    assert chats["loss"] > 0
