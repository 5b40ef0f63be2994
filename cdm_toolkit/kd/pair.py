"""A pair of tokenizers: alignment of texts, batches of rows, and the tables that methods are built on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int64

from cdm_toolkit.alignment.aligners import TextAlignment, align_text
from cdm_toolkit.alignment.segments import align_segments
from cdm_toolkit.errors import BadOption, BadRow, CdmError, NothingToTrain
from cdm_toolkit.kd.aligned_rows import AlignedRow, align_groups, truncate_aligned
from cdm_toolkit.kd.batch import AlignedBatch, Collator, PairId
from cdm_toolkit.kd.byte_lattice import END
from cdm_toolkit.kd.chat_template import Messages, Piece, no_chat_template
from cdm_toolkit.kd.rows import Learn, Row, RowFault, row_of
from cdm_toolkit.kd.tokenized_rows import (
    TemplateName,
    TokenizerSide,
    has_completion,
    tokenize_rows,
    tokenizer_side,
)
from cdm_toolkit.tokdiff.view import TokenizerView, view_of
from cdm_toolkit.vocab_map.contextual import PairTable
from cdm_toolkit.vocab_map.exact import build_exact
from cdm_toolkit.vocab_map.nesting import nesting_fault
from cdm_toolkit.vocab_map.prefix import build_prefix
from cdm_toolkit.vocab_map.projection import WIDTH, Projection, build_projection
from cdm_toolkit.vocab_map.spelling import Spellings, build_spellings
from cdm_toolkit.vocab_map.types import Neighbours, NeighbourTable, VocabMap

Table = TypeVar("Table")


@runtime_checkable
class NeighbourBuilder(Protocol):
    """Builds, or finds in a cache, the table of near tokens of two vocabularies."""

    def __call__(
        self,
        view_t: TokenizerView,
        view_s: TokenizerView,
        *,
        max_edit_distance: float,
        match_digits: bool,
        workers: int,
        progress: Callable[[int, int], None] | None,
    ) -> NeighbourTable: ...


@runtime_checkable
class LoadedTokenizer(Protocol):
    """A tokenizer of transformers beside its view."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def view(self) -> TokenizerView: ...


class TokenizerPair:
    """A teacher's and a student's tokenizer.

    Tables are built when a method first asks for them, and kept: methods of one pair share them.
    """

    def __init__(
        self,
        teacher_tokenizer: Any,
        student_tokenizer: Any,
        *,
        names: tuple[str, str] | None = None,
    ) -> None:
        """Take two fast tokenizers of transformers; the objects themselves are left as they are.

        `names` stand in errors, in place of the tokenizers' `name_or_path`. UnsupportedTokenizer for a slow
        tokenizer or one whose token bytes cannot be known, CdmError where a special token begins a text for one
        tokenizer and ends it for the other.
        """
        name_t, name_s = names or (_name(teacher_tokenizer, "teacher"), _name(student_tokenizer, "student"))
        self._init(
            tokenizer_side(teacher_tokenizer, view_of(teacher_tokenizer, name_t)),
            tokenizer_side(student_tokenizer, view_of(student_tokenizer, name_s)),
        )
        _check_special_tokens(teacher_tokenizer, student_tokenizer, (name_t, name_s))

    @classmethod
    def from_names(cls, teacher: str, student: str) -> TokenizerPair:
        """Load two tokenizers by alias, folder or hub id. Raises the errors of `hub.load_tokenizer`."""
        from cdm_toolkit.hub.tokenizers import load_tokenizer

        return cls.from_loaded(load_tokenizer(teacher), load_tokenizer(student))

    @classmethod
    def from_loaded(cls, teacher: LoadedTokenizer, student: LoadedTokenizer) -> TokenizerPair:
        """Make a pair of tokenizers whose views are there already, such as `hub.load_tokenizer` gives."""
        made = cls.__new__(cls)
        made._init(
            tokenizer_side(teacher.tokenizer, teacher.view), tokenizer_side(student.tokenizer, student.view)
        )
        _check_special_tokens(teacher.tokenizer, student.tokenizer, (teacher.view.name, student.view.name))
        return made

    def _init(self, teacher: TokenizerSide, student: TokenizerSide) -> None:
        self.teacher, self.student = teacher, student
        self.neighbour_builder: NeighbourBuilder = _build_neighbours
        self.workers = 1
        """Processes that build tables."""
        self.progress: Callable[[int, int], None] | None = None
        """Called with how much of a table is done, and how much there is."""
        self._tables: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return f"TokenizerPair({self.name_t!r} → {self.name_s!r})"

    # What the pair is

    @property
    def name_t(self) -> str:
        return self.teacher.view.name

    @property
    def name_s(self) -> str:
        return self.student.view.name

    @property
    def vocab_t(self) -> int:
        """Count the ids of the teacher's tokenizer."""
        return self.teacher.view.vocab_size

    @property
    def vocab_s(self) -> int:
        """Count the ids of the student's tokenizer."""
        return self.student.view.vocab_size

    @property
    def fingerprints(self) -> PairId:
        """Hashes of all that decides ids, bytes and splitting of the teacher's and the student's tokenizer."""
        return self.teacher.view.fingerprint, self.student.view.fingerprint

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.fingerprints)

    @property
    def same_tokenizer(self) -> bool:
        return self.fingerprints[0] == self.fingerprints[1]

    def nesting_fault(self) -> str:
        """Say in a clause why the student's tokens are not parts of the teacher's; nothing where they are."""
        return self._once("nesting", lambda: nesting_fault(self.teacher.view, self.student.view))

    # Texts and rows

    def align(self, text: str, *, aligner: str = "anchored") -> TextAlignment:
        """Align the tokens of a text; `.t` and `.s` have ids and byte spans, `.alignment` the groups."""
        return align_text(self.teacher.view, self.student.view, text, aligner=aligner)

    def align_chat(self, messages: Messages) -> TextAlignment:
        """Align one chat as two models read it: message contents by bytes, markers by role, the rest by DTW.

        UnsupportedTokenizer where a tokenizer has no chat template, or one that refuses the messages.
        """
        rendered = []
        for side in (self.teacher, self.student):
            if side.chat is None:
                raise no_chat_template(side.view.name)
            rendered.append(side.chat.render(messages))
        pieces_t: list[Piece] = []
        pieces_s: list[Piece] = []
        for piece_t, piece_s in zip(rendered[0].contents, rendered[1].contents, strict=True):
            if piece_t and piece_s and _follows(piece_t, pieces_t) and _follows(piece_s, pieces_s):
                pieces_t.append(piece_t)
                pieces_s.append(piece_s)
        t, s = self.teacher.view.encode(rendered[0].text), self.student.view.encode(rendered[1].text)
        return TextAlignment(t, s, align_segments(t, pieces_t, s, pieces_s))

    def collate(
        self,
        rows: Iterable[Any],
        *,
        max_length: int = 512,
        template: TemplateName = "none",
        learn: Learn = "all",
        aligner: str = "anchored",
        pack: bool = False,
    ) -> AlignedBatch:
        """Tokenize, align and pad rows: `kd.collate` for one pair."""
        return collate(
            [self],
            rows,
            max_length=max_length,
            template=template,
            learn=learn,
            aligner=aligner,
            pack=pack,
        )

    # Tables

    def exact_map(self) -> VocabMap:
        """Map teacher ids to the student ids with the same bytes or role."""
        return self._once("exact", lambda: build_exact(self.teacher.view, self.student.view))

    def exact(self) -> Int64[np.ndarray, " vocab_t"]:
        """Give the student id with the same bytes or role for each teacher id, −1 without one."""
        return self.exact_map().dense()

    def prefix_map(self) -> VocabMap:
        """Map each teacher id to the longest student token that begins its bytes."""
        return self._once("prefix", lambda: build_prefix(self.teacher.view, self.student.view))

    def min_ed_map(self, *, match_digits: bool = True) -> VocabMap:
        """Map each teacher id to the student id of least edit distance."""

        def build() -> VocabMap:
            from cdm_toolkit.vocab_map.min_ed import build_min_ed  # brings numba

            return build_min_ed(
                self.teacher.view,
                self.student.view,
                match_digits=match_digits,
                workers=self.workers,
                progress=self.progress,
            )

        return self._once(("min-ed", match_digits), build)

    def spellings(self) -> Spellings:
        """Spell the ids of each vocabulary in tokens of the other."""
        return self._once("spellings", lambda: build_spellings(self.teacher.view, self.student.view))

    def first_bytes(self) -> tuple[Int64[np.ndarray, " vocab_t"], Int64[np.ndarray, " vocab_s"]]:
        """Give the first byte of each id of both vocabularies, `byte_lattice.END` for an id without bytes."""
        views = self.teacher.view, self.student.view
        of_t, of_s = (
            np.array([piece[0] if piece else END for piece in view.token_bytes], np.int64) for view in views
        )
        return of_t, of_s

    def projection(self, width: int = WIDTH) -> Projection:
        """Let each student id stand for up to `width` teacher ids, with weights."""
        return self._once(
            ("projection", width), lambda: build_projection(self.teacher.view, self.student.view, width)
        )

    def neighbours(self, *, max_edit_distance: float = 0.3, match_digits: bool = True) -> NeighbourTable:
        """Find the near tokens of all ids, in both directions."""

        def build() -> NeighbourTable:
            return self.neighbour_builder(
                self.teacher.view,
                self.student.view,
                max_edit_distance=max_edit_distance,
                match_digits=match_digits,
                workers=self.workers,
                progress=self.progress,
            )

        return self._once(("neighbours", max_edit_distance, match_digits), build)

    def near_ids(
        self, *, max_edit_distance: float = 0.3, match_digits: bool = True, both_directions: bool = True
    ) -> PairTable:
        """Lay out the exact and near ids of each teacher id for selection."""
        near = self.neighbours(max_edit_distance=max_edit_distance, match_digits=match_digits)
        return PairTable.from_tables(self.exact_map(), near if both_directions else _one_direction(near))

    def _once(self, key: Any, build: Callable[[], Table]) -> Table:
        if key not in self._tables:
            self._tables[key] = build()
        found: Table = self._tables[key]
        return found


def collate(
    pairs: Sequence[TokenizerPair],
    rows: Iterable[Any],
    *,
    max_length: int = 512,
    template: TemplateName = "none",
    learn: Learn = "all",
    aligner: str = "anchored",
    pack: bool = False,
) -> AlignedBatch:
    """Tokenize rows for the student and all teachers, align, cut and pad them.

    `rows` are mappings of the shapes that `kd.rows.FIELDS` names, such as prompt and completion; all of the completion
    is learned, and of a chat all answers of the assistant, or the last. `max_length` is in tokens of any side; a longer
    row is cut at a boundary that all sides share. With `pack` rows lie end to end in place of padding, and positions
    restart at each: models whose attention restarts with them (`forward.keeps_rows_apart`) give the same losses.
    A row without a completion, or with none of it within `max_length`, is left out: `batch.rows` has the numbers
    of those that are in. All pairs have one student. Raises BadRow for a row without these fields,
    NothingToTrain where none is left.
    """
    student = _one_student(pairs)
    if isinstance(rows, Mapping):
        raise BadOption(
            "rows", "a mapping of columns", "a list of rows: of a `datasets.Dataset` one by `select`"
        )
    read = [row if isinstance(row, Row) else _row(number, row, learn) for number, row in enumerate(rows, 1)]
    full = [row for row in read if has_completion(row, template)]
    sides = [student, *(pair.teacher for pair in pairs)]
    tokenized = [tokenize_rows(side, full, template) if full else [] for side in sides]
    made: list[AlignedRow] = []
    for row, of_student, *of_teachers in zip(full, *tokenized, strict=True):
        grouped = [(of_teacher, align_groups(of_teacher, of_student, aligner)) for of_teacher in of_teachers]
        aligned, _ = truncate_aligned(row.number, of_student, grouped, max_length)
        made += [aligned] if aligned.labels > 0 else []
    if not made:
        raise NothingToTrain("the batch", _left_out(len(read), len(full), max_length))
    return Collator(
        tuple(pair.fingerprints for pair in pairs),
        tuple((pair.name_t, pair.name_s) for pair in pairs),
        packing="rows" if pack else None,
    )(made)


def _left_out(rows: int, with_completion: int, max_length: int) -> str:
    if not rows:
        return "it has no rows"
    return (
        f"{rows - with_completion} of {rows} rows have no completion, {with_completion} have none of it within the "
        f"first {max_length} tokens"
    )


def _one_student(pairs: Sequence[TokenizerPair]) -> TokenizerSide:
    if not pairs:
        raise BadOption("pairs", [], "one pair for each teacher")
    students = {pair.student.view.fingerprint: pair.student for pair in pairs}
    if len(students) != 1:
        names = ", ".join(side.view.name for side in students.values())
        raise BadOption("the students of the pairs", names, "pairs with one student")
    return next(iter(students.values()))


def _row(number: int, fields: Any, learn: Learn) -> Row:
    try:
        return row_of(number, dict(fields) if isinstance(fields, Mapping) else fields, learn=learn)
    except RowFault as error:
        raise BadRow("the batch", number, *error.args) from None


def fingerprint_of(pair: PairId) -> str:
    """Hash a pair's two fingerprints into one."""
    return hashlib.sha256(" ".join(pair).encode()).hexdigest()


def _name(tokenizer: Any, otherwise: str) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or otherwise)


def _follows(piece: Piece, pieces: Sequence[Piece]) -> bool:
    return not pieces or pieces[-1][1] <= piece[0]


def _build_neighbours(
    view_t: TokenizerView,
    view_s: TokenizerView,
    *,
    max_edit_distance: float,
    match_digits: bool,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> NeighbourTable:
    from cdm_toolkit.vocab_map.neighbours import build_neighbours  # brings numba

    return build_neighbours(
        view_t,
        view_s,
        max_edit_distance=max_edit_distance,
        match_digits=match_digits,
        workers=workers,
        progress=progress,
    )


def _one_direction(near: NeighbourTable) -> NeighbourTable:
    """Leave out the neighbours of the student's ids."""
    none = np.zeros(0, np.int32)
    empty = Neighbours(np.zeros(near.size_s + 1, np.int64), none, none.astype(np.float32), none)
    return replace(near, s_to_t=empty)


def _check_special_tokens(teacher: Any, student: Any, names: tuple[str, str]) -> None:
    """Refuse a special token that begins a text on one side and ends it on the other."""
    t, s = (
        {role: str(token) for role, token in each.special_tokens_map.items()} for each in (teacher, student)
    )
    for first, last in (("bos_token", "eos_token"), ("eos_token", "bos_token")):
        content = t.get(first)
        clash = content and content == s.get(last) and content not in (t.get(last), s.get(first))
        if clash:
            raise CdmError(
                f"the special tokens of {names[0]} and {names[1]} clash",
                got=f"{content} is the {first} of the teacher and the {last} of the student",
                fix=f"set the student's {first} and {last} to what its model was trained with",
            )
