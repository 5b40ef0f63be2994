"""Which rows are held out of training, and what their labels spell."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from cdm_toolkit.distill.dataset_store import LazyRows
from cdm_toolkit.errors import BadRow
from cdm_toolkit.kd.tokenized_rows import TemplateName, TokenizedRow, TokenizerSide, tokenize_rows

if TYPE_CHECKING:
    from cdm_toolkit.distill.dataset_store import AlignedDataset
    from cdm_toolkit.kd.aligned_rows import AlignedRow
    from cdm_toolkit.kd.rows import Row

BATCH = 128
"""Rows that are encoded in one call."""


@dataclass(frozen=True, slots=True, eq=False)
class TextKeys:
    """The numbers of rows, ascending, and a hash of the text of each: rows of one text, but for blanks, share it."""

    numbers: Int64[np.ndarray, " row"]
    keys: UInt64[np.ndarray, " row"]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> TextKeys:
        kind = np.dtype([("number", np.int64), ("key", np.uint64)])
        found = np.fromiter(((row.number, _key(row.text)) for row in rows), kind)
        return cls(found["number"], found["key"])

    def at(self, numbers: Int64[np.ndarray, " some"]) -> UInt64[np.ndarray, " some"]:
        """Give the keys of the rows of these numbers."""
        keys: UInt64[np.ndarray, " some"] = self.keys[np.searchsorted(self.numbers, numbers)]
        return keys

    def refuse_in(self, trained: TextKeys, names: tuple[str, str]) -> None:
        """See that no row is one of `trained`, whose data has the second of the `names`. BadRow for the first one."""
        same = np.flatnonzero(np.isin(self.keys, trained.keys))
        if not len(same):
            return
        there = trained.numbers[np.flatnonzero(trained.keys == self.keys[same[0]])[0]]
        more = f", and so are {len(same) - 1} more" if len(same) > 1 else ""
        raise BadRow(
            names[0],
            int(self.numbers[same[0]]),
            f"it is trained on, as row {there} of {names[1]}{more}",
            "take them out of one of the two, or hold out a share of the data",
        )


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest(), "big")


def chosen_share(
    keys: UInt64[np.ndarray, " row"], share: float, limit: int | None
) -> Bool[np.ndarray, " row"]:
    """Choose rows by their keys: about `share` of them, and at most `limit`; equal keys are chosen together.

    A row is chosen whatever the others are, unless `limit` is reached.

    >>> chosen_share(np.array([5, 1 << 63, 7, 5], np.uint64), 0.4, None).tolist()
    [True, False, True, True]
    >>> chosen_share(np.array([5, 1 << 63, 7, 5], np.uint64), 0.4, 2).tolist()
    [True, False, False, True]
    """
    end = np.uint64(int(share * 2.0**64))
    within = np.sort(keys[keys < end])
    if limit is not None and len(within) > limit:
        end = within[limit]
    chosen: Bool[np.ndarray, " row"] = keys < end
    return chosen


class SomeRows(LazyRows):
    """Some of the rows of a data set, with what is known of them."""

    def __init__(self, dataset: AlignedDataset, index: Int64[np.ndarray, " row"]) -> None:
        self.dataset, self._at = dataset, index
        self.numbers, self.lengths = dataset.numbers[index], dataset.lengths[index]
        self.student_lengths, self.label_counts = dataset.student_lengths[index], dataset.label_counts[index]

    def __len__(self) -> int:
        return len(self._at)

    def row(self, nth: int) -> AlignedRow:
        return self.dataset.row(int(self._at[nth]))


@dataclass(frozen=True, slots=True, eq=False)
class Spelled:
    """What the labels of rows spell: for the rows by number, which labels spell the text; and the bytes of them all."""

    labels: dict[int, Bool[np.ndarray, " label"]]
    bytes: int

    @classmethod
    def of(
        cls, side: TokenizerSide, rows: Iterable[Row], features: Sequence[AlignedRow], template: TemplateName
    ) -> Spelled:
        """Tokenize the rows of `features` again, up to the length that they are cut to."""
        lengths = {row.row: len(row.student_ids) for row in features}
        wanted, labels, spelled = (row for row in rows if row.number in lengths), {}, 0
        while batch := list(islice(wanted, BATCH)):
            for row, tokenized in zip(batch, tokenize_rows(side, batch, template), strict=True):
                labels[row.number], count = _spelled(tokenized, lengths[row.number])
                spelled += count
        return cls(labels, spelled)

    def at(self, numbers: Sequence[int]) -> Bool[np.ndarray, " label"]:
        """Mark the labels of a batch of rows."""
        return np.concatenate([self.labels[number] for number in numbers])


def _spelled(row: TokenizedRow, length: int) -> tuple[Bool[np.ndarray, " label"], int]:
    """Mark the labels among a row's first `length` tokens that spell its text, and count the bytes that these spell."""
    spells, sizes = np.zeros(len(row.ids), bool), np.zeros(len(row.ids), np.int64)
    for body in row.bodies:
        spans, inside = body.spans, slice(body.start, body.start + len(body.spans))
        before = np.maximum.accumulate(np.concatenate(([0], spans.end)))[:-1]
        spells[inside] = ~spans.special
        sizes[inside] = np.maximum(spans.end - np.maximum(spans.start, before), 0)
    labels = np.concatenate([np.arange(first, min(end, length)) for first, end in row.turns])
    return spells[labels], int(sizes[labels][spells[labels]].sum())
