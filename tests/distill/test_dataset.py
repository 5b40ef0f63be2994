"""AlignedRow of rows: labels, groups, cuts, counts, chats and the cache, with real tokenizers."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import preloaded
import pytest

import cdm_toolkit
from cdm_toolkit.distill import dataset as module
from cdm_toolkit.distill import dataset_store as store
from cdm_toolkit.distill.dataset import RowCounts, build_dataset
from cdm_toolkit.distill.dataset_store import AlignedDataset
from cdm_toolkit.distill.sources import read_rows
from cdm_toolkit.errors import BadArtifact, BadOption, UnsupportedTokenizer
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.kd import aligned_rows
from cdm_toolkit.kd.aligned_rows import AlignedRow
from cdm_toolkit.kd.chat_template import ChatTemplate
from cdm_toolkit.kd.rows import Message, Row
from cdm_toolkit.kd.tokenized_rows import TeacherSide, TokenizerSide, template_notes, tokenizer_side
from cdm_toolkit.tokdiff.view import TokenizerView

PAIRS = [("smollm2", "mistral"), ("mistral", "smollm2"), ("gpt2", "mistral"), ("smollm2", "smollm2")]

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('roles must be user and assistant') }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
)
ENDLESS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
TEMPLATES = {"smollm2": CHATML, "mistral": LLAMA2, "gpt2": PLAIN, "llama3": PLAIN, "qwen2": CHATML}


def id_of(view: TokenizerView, role: str) -> int | None:
    return min((token.id for token in view.special.values() if role in token.roles), default=None)


def side(view: TokenizerView, source: str | None = None) -> TokenizerSide:
    bos, eos = id_of(view, "bos"), id_of(view, "eos")
    special = {
        f"{role}_token": view.special[i].content for role, i in (("bos", bos), ("eos", eos)) if i is not None
    }
    chat = ChatTemplate(view.name, source, tuple(sorted(special.items()))) if source else None
    return TokenizerSide(view, eos if bos is None else bos, eos, chat)


def spelled(view: TokenizerView, ids: np.ndarray) -> bytes:
    return b"".join(view.token_bytes[i] or b"" for i in ids)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a cache of its own."""
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "features"


@pytest.fixture(params=PAIRS, ids="-".join)
def sides(request: pytest.FixtureRequest, real_view) -> tuple[TokenizerSide, TokenizerSide]:
    """Give student and teacher."""
    teacher, student = request.param
    return side(real_view(student)), side(real_view(teacher))


@pytest.fixture
def rows(gsm8k_rows: list[dict[str, str]]) -> list[Row]:
    return [Row(i, row["question"], row["answer"]) for i, row in enumerate(gsm8k_rows[:40], 1)]


def check_groups(
    row: Row, features: AlignedRow, student: TokenizerSide, teacher: TokenizerSide, nth: int = 0
) -> None:
    """See that what stands before each group, and the group itself, is the same text on both sides."""
    completion = row.text.encode()[row.completion_start :]
    before_t = before_s = b""
    teacher_ids = features.teachers[nth].ids
    for t0, t1, s0, s1 in features.teachers[nth].groups:
        assert s0 >= max(features.label_from, 1)
        assert t0 >= 1
        before_t, before_s = (
            spelled(teacher.view, teacher_ids[:t0]),
            spelled(student.view, features.student_ids[:s0]),
        )
        assert before_t.lstrip() == before_s.lstrip()
        assert spelled(teacher.view, teacher_ids[t0:t1]) == spelled(student.view, features.student_ids[s0:s1])
    assert completion.startswith(before_s.lstrip()[row.completion_start :])


def test_labels_spell_the_completion_and_groups_share_their_context(
    sides: tuple[TokenizerSide, TokenizerSide], rows: list[Row]
) -> None:
    student, teacher = sides
    features, counts = build_dataset(rows, student, [TeacherSide(teacher)], max_length=1024)
    assert counts == RowCounts(read=40, trained=40)
    for row, one in zip(rows, features, strict=True):
        assert one.row == row.number
        labels, (other,) = one.student_ids[one.label_from :], one.teachers
        assert labels[-1] == student.eos
        assert spelled(student.view, labels).decode() == row.completion
        assert spelled(teacher.view, other.ids).decode().lstrip() == row.text
        check_groups(row, one, student, teacher)
        assert (other.groups[0][2], other.groups[-1][2]) == (one.label_from, len(one.student_ids) - 1)
        assert other.groups[-1][0] == len(other.ids) - 1, "the ends of both sides are a group"


@pytest.mark.parametrize("max_length", [60, 120, 180])
def test_long_rows_are_cut_at_a_shared_boundary(
    sides: tuple[TokenizerSide, TokenizerSide], rows: list[Row], max_length: int
) -> None:
    student, teacher = sides
    features, counts = build_dataset(rows, student, [TeacherSide(teacher)], max_length=max_length)
    assert counts.read == 40 == counts.trained + counts.too_long
    assert counts.cut > 0
    by_number = {row.number: row for row in rows}
    for one in features:
        (other,) = one.teachers
        assert one.length == max(len(one.student_ids), len(other.ids)) <= max_length
        texts = [
            spelled(s.view, ids).lstrip() for s, ids in ((student, one.student_ids), (teacher, other.ids))
        ]
        assert texts[0] == texts[1], "both sides end at the same byte"
        assert by_number[one.row].text.encode().startswith(texts[0])
        check_groups(by_number[one.row], one, student, teacher)


@pytest.mark.parametrize("max_length", [80, 130, 1024])
def test_several_teachers_end_where_all_sides_do(real_view, rows: list[Row], max_length: int) -> None:
    student = side(real_view("mistral"))
    teachers = [side(real_view(name)) for name in ("smollm2", "gpt2", "qwen2")]
    features, counts = build_dataset(
        rows, student, [TeacherSide(one) for one in teachers], max_length=max_length
    )
    assert counts.read == counts.trained + counts.too_long
    assert (counts.cut == 0) == (max_length == 1024)
    assert counts.unaligned_with == (0, 0, 0)
    by_number = {row.number: row for row in rows}
    for one in features:
        assert one.length <= max_length
        text = spelled(student.view, one.student_ids).lstrip()
        for nth, teacher in enumerate(teachers):
            ids = one.teachers[nth].ids
            assert spelled(teacher.view, ids).lstrip() == text
            check_groups(by_number[one.row], one, student, teacher, nth)


def test_each_teacher_alone_has_the_groups_that_it_has_among_others(real_view, rows: list[Row]) -> None:
    student = side(real_view("mistral"))
    teachers = [TeacherSide(side(real_view("smollm2"))), TeacherSide(side(real_view("gpt2")), "bytes")]
    together, _ = build_dataset(rows, student, teachers, max_length=1024)
    for nth, teacher in enumerate(teachers):
        alone, _ = build_dataset(rows, student, [teacher], max_length=1024)
        for one, other in zip(alone, together, strict=True):
            assert np.array_equal(one.student_ids, other.student_ids)
            assert np.array_equal(one.teachers[0].ids, other.teachers[nth].ids)
            assert np.array_equal(one.teachers[0].groups, other.teachers[nth].groups)


def test_a_teacher_that_does_not_align_neither_cuts_nor_counts_as_all(
    real_view, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cdm_toolkit.errors import DoesNotSpell
    from cdm_toolkit.kd import aligned_rows

    align = aligned_rows.align

    def refuse_bytes(*sides: object, aligner: str, **settings: object) -> object:
        if aligner == "bytes":
            raise DoesNotSpell("teacher", 0, "a", b"b")
        return align(*sides, aligner=aligner, **settings)

    monkeypatch.setattr(aligned_rows, "align", refuse_bytes)
    student, teacher = side(real_view("mistral")), side(real_view("gpt2"))
    both = [TeacherSide(teacher), TeacherSide(teacher, "bytes")]
    features, counts = build_dataset(rows, student, both, max_length=180)
    assert (counts.unaligned, counts.unaligned_with) == (0, (0, counts.trained))
    assert "(unaligned with each teacher: 0, " in str(counts)
    assert all(len(one.teachers[1].groups) == 0 and len(one.teachers[1].ids) == 1 for one in features)
    only, counts = build_dataset(rows, student, both[1:], max_length=180)
    assert counts.unaligned == counts.trained == len(only)
    free, _ = build_dataset(rows, student, max_length=180)
    assert [one.student_ids.tolist() for one in only] == [one.student_ids.tolist() for one in free]


def test_a_text_is_learned_from_its_first_token(sides: tuple[TokenizerSide, TokenizerSide]) -> None:
    student, teacher = sides
    (one,), _ = build_dataset([Row(1, "", "Two cats sit.")], student, [TeacherSide(teacher)])
    assert one.label_from == 1
    assert one.teachers[0].groups[0].tolist()[::2] == [1, 1]


def test_a_token_that_straddles_the_boundary_is_no_label(real_view) -> None:
    student, teacher = side(real_view("gpt2")), side(real_view("smollm2"))
    row = Row(1, "x", "\n\n\n  deep")  # the prompt's line feed and the completion's become one token
    (one,), counts = build_dataset([row], student, [TeacherSide(teacher)])
    assert row.text.encode().endswith(spelled(student.view, one.student_ids[one.label_from :]))
    start = len(row.text.encode()) - len(spelled(student.view, one.student_ids[one.label_from :]))
    assert start > row.completion_start
    assert all(spelled(student.view, one.student_ids[: g[2]]) for g in one.teachers[0].groups)
    assert counts.trained == 1


def test_empty_and_too_long_rows_are_counted(sides: tuple[TokenizerSide, TokenizerSide]) -> None:
    student, teacher = sides
    rows = [Row(1, "question", ""), Row(2, "word " * 50, "answer"), Row(3, "q", "fine")]
    for others in ([TeacherSide(teacher)], []):
        features, counts = build_dataset(rows, student, others, max_length=20)
        assert [one.row for one in features] == [3]
        assert counts == RowCounts(read=3, trained=1, empty=1, too_long=1)
    nothing, counts = build_dataset(rows[:2], student, max_length=20)
    assert (len(nothing), list(nothing), len(nothing.lengths)) == (0, [], 0)
    assert counts == RowCounts(read=2, empty=1, too_long=1)
    with pytest.raises(BadOption, match="number of rows"):
        build_dataset([], student)


def test_without_a_teacher_there_are_no_groups(
    sides: tuple[TokenizerSide, TokenizerSide], rows: list[Row]
) -> None:
    student, teacher = sides
    alone, counts = build_dataset(rows, student)
    together, _ = build_dataset(rows, student, [TeacherSide(teacher)])
    assert counts.unaligned == 0
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one.student_ids, other.student_ids)
        assert one.label_from == other.label_from
        assert one.teachers == ()


@pytest.mark.parametrize("aligner", ["anchored", "bytes", "dtw", "entropy-dtw"])
def test_every_aligner(real_view, rows: list[Row], aligner: str) -> None:
    student, teacher = side(real_view("mistral")), side(real_view("smollm2"))
    features, _ = build_dataset(rows[:8], student, [TeacherSide(teacher, aligner)])
    for one in features:
        groups = one.teachers[0].groups
        assert len(groups) > 10
        assert (groups[:, 0] < groups[:, 1]).all()
        assert (groups[:, 2] >= one.label_from).all()


def test_counts_read_as_a_line() -> None:
    assert str(RowCounts(5, 3, 1, 0, 1, 1)) == "5 read, 3 trained, 1 cut, 0 unaligned, 1 empty, 1 too long"


# The cache


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the rows that are read by a tokenizer."""
    found: list[int] = []
    tokenize_rows = module.tokenize_rows

    def counted(side: TokenizerSide, rows: Sequence[Row], template: str) -> object:
        found.append(len(rows))
        return tokenize_rows(side, rows, template)

    monkeypatch.setattr(module, "tokenize_rows", counted)
    return found


def as_lists(features: Sequence[AlignedRow]) -> list[object]:
    return [
        (
            one.row,
            one.student_ids.tolist(),
            one.label_from,
            [(teacher.ids.tolist(), teacher.groups.tolist()) for teacher in one.teachers],
        )
        for one in features
    ]


def test_a_second_run_reads_the_cache(real_view, rows: list[Row], tokenized: list[int], cache: Path) -> None:
    student, teacher = side(real_view("mistral")), TeacherSide(side(real_view("smollm2")))
    done: list[int] = []
    first, counts = build_dataset(rows, student, [teacher], on_row=done.append)
    assert sum(tokenized) == 80
    assert done[-1] == 40
    again, same = build_dataset(list(rows), replace(student), (teacher,), on_row=done.append)
    assert sum(tokenized) == 80
    assert (as_lists(again), same) == (as_lists(first), counts)
    assert len(list(cache.iterdir())) == 1


def test_whatever_goes_in_names_the_cache(real_view, rows: list[Row], cache: Path) -> None:
    student, teacher = side(real_view("mistral"), LLAMA2), side(real_view("smollm2"), CHATML)
    few = rows[:3]
    variants: list[tuple[list[Row], TokenizerSide, list[TeacherSide], dict[str, object]]] = [
        (few, student, [TeacherSide(teacher)], {}),
        (rows[:2], student, [TeacherSide(teacher)], {}),
        ([replace(few[0], number=9), *few[1:]], student, [TeacherSide(teacher)], {}),
        ([replace(few[0], completion="x"), *few[1:]], student, [TeacherSide(teacher)], {}),
        (few, replace(student, start=None), [TeacherSide(teacher)], {}),
        (few, replace(student, eos=None), [TeacherSide(teacher)], {}),
        (few, teacher, [TeacherSide(teacher)], {}),
        (few, student, [], {}),
        (few, student, [TeacherSide(teacher), TeacherSide(teacher)], {}),
        (few, student, [TeacherSide(teacher, "bytes")], {}),
        (few, student, [TeacherSide(teacher)], {"max_length": 511}),
        (few, student, [TeacherSide(teacher)], {"template": "chat"}),
        (few, student, [TeacherSide(side(teacher.view, PLAIN))], {"template": "chat"}),
        (few, student, [TeacherSide(teacher)], {"entropies": Made("a")}),
        (few, student, [TeacherSide(teacher)], {"entropies": Made("b")}),
    ]
    for count, (some, one, others, settings) in enumerate(variants, 1):
        build_dataset(some, one, others, **settings)  # type: ignore[arg-type]
        assert len(list(cache.iterdir())) == count
    # what changes nothing has no other name: a template that is not used, entropies that are not looked at
    build_dataset(few, side(student.view), [TeacherSide(side(teacher.view))])
    build_dataset(few, student, [TeacherSide(teacher, "bytes")], entropies=Made("a"))
    assert len(list(cache.iterdir())) == len(variants)


@pytest.mark.parametrize("damage", ["cut", "emptied", "no header", "bad header", "removed"])
def test_damaged_files_are_made_anew(
    real_view, rows: list[Row], cache: Path, tokenized: list[int], damage: str
) -> None:
    student = side(real_view("gpt2"))
    before = as_lists(build_dataset(rows, student)[0])
    (folder,) = cache.iterdir()
    arrow, header = folder / "part-00000.arrow", folder / "header.json"
    match damage:
        case "cut":
            arrow.write_bytes(arrow.read_bytes()[:-1000])
        case "emptied":
            arrow.write_bytes(b"")
        case "removed":
            arrow.unlink()
        case "no header":
            header.unlink()
        case _:
            header.write_text("{")
    with pytest.raises(BadArtifact, match="remove the folder"):
        AlignedDataset(folder)
    features, _ = build_dataset(rows, student)
    assert as_lists(features) == before
    assert sum(tokenized) == 80


def test_a_file_that_says_what_was_written_but_is_not_is_damaged(
    real_view, rows: list[Row], cache: Path
) -> None:
    build_dataset(rows, side(real_view("gpt2")))
    (folder,) = cache.iterdir()
    arrow, header = folder / "part-00000.arrow", folder / "header.json"
    arrow.write_bytes(b"x" * arrow.stat().st_size)
    with pytest.raises(BadArtifact, match="cannot be read"):
        AlignedDataset(folder)
    build_dataset(rows, side(real_view("gpt2")))
    header.write_text(json.dumps(json.loads(header.read_text()) | {"rows": 41}))
    with pytest.raises(BadArtifact, match="does not have the rows"):
        AlignedDataset(folder)


def test_an_interrupted_run_leaves_nothing(real_view, rows: list[Row], cache: Path) -> None:
    def stop(_done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_dataset(rows, side(real_view("gpt2")), on_row=stop)
    assert list(cache.iterdir()) == []


def test_a_stopped_step_goes_on(
    real_view, rows: list[Row], cache: Path, monkeypatch: pytest.MonkeyPatch, tokenized: list[int]
) -> None:
    """Parts that are whole are kept, and each row is made once; a part that is damaged is made anew."""
    student, teacher = side(real_view("mistral")), TeacherSide(side(real_view("smollm2")))
    whole = as_lists(build_dataset(rows, student, [teacher])[0])
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(store, "PART", 8)
    monkeypatch.setattr(module, "_fingerprint", lambda *_: "stopped")

    def stop(done: int) -> None:
        if done == 28:
            raise KeyboardInterrupt

    def again(on_row: Callable[[int], None] = lambda _: None) -> AlignedDataset:
        tokenized.clear()
        return build_dataset(rows, student, [teacher], on_row=on_row)[0]

    with pytest.raises(KeyboardInterrupt):
        again(stop)
    making = cache / ".making-stopped"
    parts = [f"part-{nth:05}.arrow" for nth in range(3)]
    assert sorted(file.name for file in making.glob("*.arrow")) == parts
    (making / parts[2]).write_bytes(b"damaged")
    with pytest.raises(KeyboardInterrupt):
        again(stop)
    assert sum(tokenized) == 2 * 12, "the rows after the second part"
    done: list[int] = []
    features = again(done.append)
    assert sum(tokenized) == 2 * 16, "the rows after the third part"
    assert done[0] == 28
    assert as_lists(features) == whole
    assert [one.row for one in features] == [row.number for row in rows]
    assert not making.exists()


def test_rows_come_by_number_slice_and_length_and_go_to_other_processes(real_view, rows: list[Row]) -> None:
    features, _ = build_dataset(rows, side(real_view("gpt2")), [TeacherSide(side(real_view("smollm2")))])
    assert features.lengths.tolist() == [one.length for one in features]
    assert as_lists(features[3:9:2]) == [as_lists(features)[i] for i in (3, 5, 7)]
    assert as_lists([features[-1]]) == as_lists(features)[-1:]
    with pytest.raises(IndexError):
        features[40]
    assert as_lists(pickle.loads(pickle.dumps(features))) == as_lists(features)
    assert not features[0].student_ids.flags.writeable


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_several_processes_make_the_same(
    real_view, rows: list[Row], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], start: str
) -> None:
    import multiprocessing

    if sys.platform == "win32":
        pytest.skip("Windows cannot fork")
    many = [replace(row, number=nth) for nth, row in enumerate(rows * 8, 1)]
    student, teacher = side(real_view("gpt2"), PLAIN), TeacherSide(side(real_view("smollm2"), CHATML))
    alone = as_lists(build_dataset(many, student, [teacher], template="chat")[0])
    monkeypatch.setattr(module, "ROWS_FOR_A_PROCESS", 100)
    context: Any = preloaded.serve() if start == "forkserver" else multiprocessing.get_context(start)
    first = context.Process(target=int)  # what is loaded for it may write on the screen
    first.start(), first.join(), capfd.readouterr()
    monkeypatch.setattr(module, "ProcessPoolExecutor", partial(ProcessPoolExecutor, mp_context=context))
    monkeypatch.setattr(module, "_fingerprint", lambda *_: "another")
    done: list[int] = []
    several, counts = build_dataset(many, student, [teacher], template="chat", workers=2, on_row=done.append)
    assert as_lists(several) == alone
    assert counts.trained == len(many)
    assert done == sorted(done)
    assert done[-1] == len(many)
    assert capfd.readouterr() == ("", ""), "nothing on the screen"
    if start == "forkserver":
        return  # errors come back the same way

    monkeypatch.setattr(module, "_fingerprint", lambda *_: "a third")
    many[250] = Row(251, "", "no conversation")
    with pytest.raises(BadOption, match="row 251 is a text"):
        build_dataset(many, student, [teacher], template="chat", workers=2)


# Chats


@pytest.fixture
def chats(rows: list[Row]) -> list[Row]:
    """Give rows of messages and rows of a question and an answer."""
    turns = ("user", "assistant", "user", "assistant")
    long = []
    for row, other in zip(rows[:6], rows[6:12], strict=True):
        said = (row.prompt, row.completion, other.prompt, other.completion)
        messages = tuple(Message(role, text) for role, text in zip(turns, said, strict=True))
        long.append(Row(row.number + 100, "not looked at", other.completion, messages))
    return [*rows[:10], *long]


CHAT_PAIRS = [
    ("smollm2", "mistral"),
    ("mistral", "smollm2"),
    ("gpt2", "mistral"),
    ("mistral", "gpt2"),
    ("llama3", "qwen2"),
    ("qwen2", "gpt2"),
]


@pytest.mark.parametrize("names", CHAT_PAIRS, ids="-".join)
def test_each_side_reads_its_own_rendering(real_view, chats: list[Row], names: tuple[str, str]) -> None:
    teacher, student = (side(real_view(name), TEMPLATES[name]) for name in names)
    features, counts = build_dataset(chats, student, [TeacherSide(teacher)], template="chat", max_length=2048)
    assert counts == RowCounts(read=16, trained=16)
    for row, one in zip(chats, features, strict=True):
        (other,) = one.teachers
        for reader, ids in ((student, one.student_ids), (teacher, other.ids)):
            assert reader.chat is not None
            text = reader.chat.render(row.chat).text
            rest = reader.view.encode(text).ids
            assert ids.tolist() == rest[: len(ids)].tolist(), "as the model itself would read it"
            assert {"eos", "turn_end"} & reader.view.special[int(ids[-1])].roles
        labels = one.student_ids[one.label_from :]
        assert spelled(student.view, labels[:-1]).decode().strip() == row.completion
        spell = {
            name: b"".join(spelled(reader.view, ids[a:b]) for a, b in groups)
            for name, reader, ids, groups in (
                ("t", teacher, other.ids, other.groups[:-1, :2]),
                ("s", student, one.student_ids, other.groups[:-1, 2:]),
            )
        }
        assert spell["t"].strip() == spell["s"].strip() == row.completion.encode()
        for t0, t1, s0, s1 in other.groups:
            assert t0 >= 1
            assert s0 >= one.label_from >= 1
            piece_t, piece_s = (
                spelled(teacher.view, other.ids[t0:t1]),
                spelled(student.view, one.student_ids[s0:s1]),
            )
            assert piece_t.strip() == piece_s.strip()
        ends = [len(other.ids) - 1, len(other.ids), len(one.student_ids) - 1, len(one.student_ids)]
        assert other.groups[-1].tolist() == ends, "the ends of both turns are a group"


def test_prompts_may_differ_and_have_no_groups(real_view, rows: list[Row]) -> None:
    """ChatML's template brings a system prompt that the other has not."""
    student, teacher = side(real_view("gpt2"), PLAIN), side(real_view("smollm2"), CHATML)
    (one,), _ = build_dataset(rows[:1], student, [TeacherSide(teacher)], template="chat")
    assert b"helpful assistant" in spelled(teacher.view, one.teachers[0].ids)
    assert b"helpful assistant" not in spelled(student.view, one.student_ids)
    prompt = spelled(student.view, one.student_ids[: one.label_from]).decode()
    assert prompt == f"user: {rows[0].prompt}\nassistant:", "the blank goes with the answer's first word"


@pytest.mark.parametrize("max_length", [110, 160, 220])
def test_long_chats_are_cut(real_view, chats: list[Row], max_length: int) -> None:
    student = side(real_view("mistral"), LLAMA2)
    teachers = [side(real_view("smollm2"), CHATML), side(real_view("gpt2"), PLAIN)]
    features, counts = build_dataset(
        chats, student, [TeacherSide(one) for one in teachers], template="chat", max_length=max_length
    )
    assert counts.read == 16 == counts.trained + counts.too_long
    assert counts.cut > 0
    assert counts.too_long > 0
    by_number = {row.number: row for row in chats}
    for one in features:
        assert one.length <= max_length
        learned = spelled(student.view, one.student_ids[one.label_from :])
        assert by_number[one.row].completion.startswith(learned.decode().strip())
        for teacher, reader in zip(one.teachers, teachers, strict=True):
            if len(teacher.groups):
                assert teacher.groups[-1, 1] == len(teacher.ids)
                assert teacher.groups[-1, 3] == len(one.student_ids)
                of_teacher = spelled(reader.view, teacher.ids[teacher.groups[0, 0] :])
                assert of_teacher.strip() == learned.strip()


def test_blanks_that_a_template_keeps_are_learned(real_view) -> None:
    row = Row(1, "indent", "    return 1\n")
    bare = "{% for m in messages %}{{ eos_token }}{{ m['content'] }}{% endfor %}{{ eos_token }}"
    keeps, strips = side(real_view("gpt2"), bare), side(real_view("mistral"), LLAMA2)
    (one,), _ = build_dataset([row], keeps, [TeacherSide(strips)], template="chat")
    assert spelled(keeps.view, one.student_ids[one.label_from :]) == b"    return 1\n"
    assert spelled(keeps.view, one.student_ids[one.teachers[0].groups[0, 2] :]) == b" return 1\n"
    (one,), _ = build_dataset([row], strips, [TeacherSide(keeps)], template="chat")
    assert spelled(strips.view, one.student_ids[one.label_from :]).strip() == b"return 1"
    # ChatML's line feed and the first blanks are one token here, which no prompt ends before
    chatml = side(real_view("smollm2"), CHATML)
    (one,), _ = build_dataset([row], chatml, template="chat")
    assert spelled(chatml.view, one.student_ids[one.label_from :]) == b" return 1\n"


def test_a_template_that_ends_no_turn(real_view, rows: list[Row]) -> None:
    student, teacher = side(real_view("gpt2"), ENDLESS), side(real_view("smollm2"), CHATML)
    (one,), _ = build_dataset(rows[:1], student, [TeacherSide(teacher)], template="chat")
    learned = spelled(student.view, one.student_ids[one.label_from :]).decode()
    assert learned == f" {rows[0].completion}\n\n"
    assert one.teachers[0].groups[-1, 1] < len(one.teachers[0].ids), "the teacher's end has no partner"


def test_rows_that_are_no_chat_are_refused_by_number(real_view) -> None:
    student = side(real_view("mistral"), LLAMA2)
    good = Row(1, "q", "a")
    with pytest.raises(BadOption, match="row 7 is a text without a prompt"):
        build_dataset([good, Row(7, "", "just text")], student, template="chat")
    system = tuple(Message(role, role) for role in ("system", "user", "assistant"))
    with pytest.raises(UnsupportedTokenizer, match="refuses the messages of row 8: roles must be"):
        build_dataset([good, Row(8, "", "assistant", system)], student, template="chat")
    with pytest.raises(UnsupportedTokenizer, match="no chat template"):
        build_dataset([good], side(student.view), template="chat")
    rewrites = side(student.view, "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    with pytest.raises(
        UnsupportedTokenizer, match="rewrites the content of message 2 of the messages of row 1"
    ):
        build_dataset([good], rewrites, template="chat")
    drops = side(student.view, "{{ messages[0]['content'] }}")
    with pytest.raises(UnsupportedTokenizer, match="leaves out message 2 of the messages of row 1"):
        build_dataset([good], drops, template="chat")
    _, counts = build_dataset([good, Row(2, "q", " \n")], student, template="chat")
    assert counts == RowCounts(read=2, trained=1, empty=1)


def test_what_a_person_is_told_of_templates(real_view) -> None:
    with_one, without = side(real_view("smollm2"), CHATML), side(real_view("gpt2"))
    assert template_notes(without, [TeacherSide(without)], "none") == []
    assert template_notes(without, [TeacherSide(with_one)], "none") == [
        "the teacher smollm2 has a chat template, which template none does not use"
    ]
    assert template_notes(with_one, [TeacherSide(with_one)], "chat") == []
    assert template_notes(without, [TeacherSide(with_one)], "chat") == [
        "the student gpt2 has no chat template, which template chat needs"
    ]
    (note,) = template_notes(side(without.view, ENDLESS), [TeacherSide(with_one)], "chat")
    assert "ends no turn" in note


# Entropies


@dataclass(frozen=True, slots=True)
class Made:
    """Entropies that grow along a text, and what they were asked for."""

    fingerprint: str
    asked: Callable[[int, Sequence[np.ndarray]], None] = lambda _side, _sequences: None

    def along(self, side: int, sequences: Sequence[np.ndarray], *, vocab: int) -> list[np.ndarray]:
        self.asked(side, sequences)
        return [np.arange(len(ids), dtype=np.float64) for ids in sequences]


def test_entropies_are_of_what_the_models_read(
    real_view, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[np.ndarray, np.ndarray]] = []
    align = aligned_rows.align

    def seen(t: object, s: object, *, entropy_t: np.ndarray, entropy_s: np.ndarray, **more: str) -> object:
        given.append((entropy_t, entropy_s))
        return align(t, s, entropy_t=entropy_t, entropy_s=entropy_s, **more)

    monkeypatch.setattr(aligned_rows, "align", seen)
    asked: dict[int, list[list[int]]] = {0: [], 1: [], 2: []}
    student, teacher = side(real_view("mistral")), side(real_view("smollm2"))
    teachers = [TeacherSide(teacher, "entropy-dtw"), TeacherSide(teacher, "bytes")]
    entropies = Made("made", lambda side, some: asked[side].extend(ids.tolist() for ids in some))
    build_dataset(rows[:3], student, teachers, max_length=100, entropies=entropies)
    assert asked[2] == [], "bytes looks at none"
    for nth, row in enumerate(rows[:3]):
        for nth_side, reader in ((0, student), (1, teacher)):
            ids = [reader.start, *reader.view.encode(row.text).ids.tolist(), reader.eos]
            assert asked[nth_side][nth] == ids[:100]
            weights = given[2 * nth][1 - nth_side]
            inside = min(len(ids), 100) - 1
            count = len(ids) - 2
            assert weights[:inside].tolist() == list(range(1, inside + 1))[:count], "start is left out"
            assert (weights[inside:] == weights[:inside].mean()).all()
        assert given[2 * nth + 1][0] is None


@pytest.mark.slow
def test_real_entropies_weigh_the_papers_alignment(
    real_view, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cdm_toolkit.alignment import aligners
    from cdm_toolkit.distill.model_entropies import ModelEntropies
    from cdm_toolkit.hub.models import load_model

    weighed: list[list[int]] = []
    align_by_dtw = "cdm_toolkit.alignment.dtw.align_by_dtw"
    from cdm_toolkit.alignment.dtw import align_by_dtw as warp

    def seen(t: object, s: object, weight_t: np.ndarray, weight_s: np.ndarray, *, aligner: str) -> object:
        weighed.extend((weight_t.tolist(), weight_s.tolist()))
        return warp(t, s, weight_t, weight_s, aligner=aligner)

    monkeypatch.setattr(align_by_dtw, seen)
    assert aligners.uniform_weights(2).tolist() == [3, 3]
    model, view = load_model("smollm2"), real_view("smollm2")
    short = [Row(1, "What is 2 + 3?", "It is 5."), Row(2, "", "Zoe has 12 cards."), Row(3, "Hi", "Hello!")]
    both = side(view), [TeacherSide(side(view), "entropy-dtw")]
    build_dataset(short, *both)
    assert {weight for weights in weighed for weight in weights} == {3}
    weighed.clear()
    build_dataset(short, *both, entropies=ModelEntropies({0: lambda: model, 1: lambda: model}, "smollm2"))
    assert all(len(set(weights)) > 1 for weights in weighed)
    assert len(weighed) == 6


# The code

STEP = """
import sys
from cdm_toolkit.distill.dataset import build_dataset
from cdm_toolkit.distill.sources import read_rows
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.kd.tokenized_rows import TeacherSide, tokenizer_side

student, teacher, rows = sys.argv[1:]
sides = [tokenizer_side(each.tokenizer, each.view) for each in map(load_tokenizer, (student, teacher))]
build_dataset(read_rows(rows), sides[0], [TeacherSide(sides[1])])
print(sys.modules["cdm_toolkit"].__file__)
"""


def test_a_changed_aligner_makes_new_features(tiny, cache: Path, tmp_path: Path) -> None:
    """The package and copies of it with one cache: an edited copy makes its own features, an equal one finds them."""
    student, teacher = (
        tokenizer_side(each.tokenizer, each.view)
        for each in map(load_tokenizer, (tiny.student, tiny.teacher))
    )
    build_dataset(read_rows(tiny.data), student, [TeacherSide(teacher)])
    package, folders = Path(cdm_toolkit.__file__).parent, [sorted(path.name for path in cache.iterdir())]
    for copy in ("equal", "edited"):
        place = tmp_path / copy
        shutil.copytree(package, place / "cdm_toolkit")  # with the bytecode of what is not edited
        if copy == "edited":
            with (place / "cdm_toolkit" / "alignment" / "anchored.py").open("a") as file:
                file.write("# a change\n")
        done = subprocess.run(
            [sys.executable, "-c", STEP, tiny.student, tiny.teacher, tiny.data],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": str(place), "CDM_CACHE": str(cache.parent)},
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(place / "cdm_toolkit" / "__init__.py")
        folders.append(sorted(path.name for path in cache.iterdir()))
    first, equal, edited = folders
    assert first == equal
    assert (len(first), len(edited)) == (1, 2)
