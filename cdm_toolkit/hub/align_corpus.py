"""Align every text of a corpus, in worker processes if it is large."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from cdm_toolkit.alignment.aligners import TextAlignment, align
from cdm_toolkit.alignment.statistics import PairStatistics, measure, total
from cdm_toolkit.hub.resolve import Resolved, resolve
from cdm_toolkit.hub.tokenizers import view_from
from cdm_toolkit.tokdiff.changes import Change, changes
from cdm_toolkit.tokdiff.view import TokenizerView

BATCH = 64
"""Texts per call of encode_batch."""
MIN_TEXTS_FOR_PROCESSES = 2000
"""Below this number of texts, worker processes cost more time than they save."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class TextReport:
    """Statistics of one text of a corpus. `row` counts from 1."""

    row: int
    statistics: PairStatistics
    changes_t: tuple[Change, ...]
    changes_s: tuple[Change, ...]

    @property
    def difference(self) -> tuple[int, float]:
        """Sort key: texts with the most inexact groups first, then those with the least agreement of boundaries."""
        return -self.statistics.inexact, self.statistics.agreement


@dataclass(frozen=True, slots=True)
class CorpusReport:
    """Statistics of a corpus: of each text and in total."""

    names: tuple[str, str]
    aligner: str
    texts: tuple[TextReport, ...]
    total: PairStatistics

    @property
    def exact_texts(self) -> int:
        """Count the texts in which all groups have the same bytes on both sides."""
        return sum(text.statistics.inexact == 0 for text in self.texts)

    def worst(self, count: int) -> list[TextReport]:
        """List the texts that the two tokenizers split most differently."""
        return sorted(self.texts, key=lambda text: text.difference)[:count]


def align_corpus(
    view_t: TokenizerView, view_s: TokenizerView, texts: Sequence[str], *, aligner: str = "anchored"
) -> Iterator[TextAlignment]:
    """Yield the alignment of each text, tokenized in batches. Raises BadText."""
    for begin in range(0, len(texts), BATCH):
        batch = texts[begin : begin + BATCH]
        for t, s in zip(view_t.encode_batch(batch), view_s.encode_batch(batch), strict=True):
            yield TextAlignment(t, s, align(t, s, aligner=aligner))


def report(
    name_t: str,
    name_s: str,
    texts: Sequence[str],
    *,
    aligner: str = "anchored",
    workers: int = 1,
    progress: Progress | None = None,
) -> CorpusReport:
    """Align and measure every text of a corpus. The result does not depend on the number of workers."""
    slices = [
        (begin, texts[begin : begin + MIN_TEXTS_FOR_PROCESSES // 8])
        for begin in range(0, len(texts), MIN_TEXTS_FOR_PROCESSES // 8)
    ]
    # found here, once: workers would ask the hub each, and say nothing of what stands in for it
    work = partial(_report_slice, resolve(name_t), resolve(name_s), aligner)
    found: list[TextReport] = []
    if workers == 1 or len(texts) < MIN_TEXTS_FOR_PROCESSES:
        done: Iterator[list[TextReport]] = map(work, slices)
        found = _collect(done, len(texts), progress)
    else:
        # spawn, because forking after tokenizers has used threads can deadlock
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            found = _collect(pool.map(work, slices), len(texts), progress)
    return CorpusReport((name_t, name_s), aligner, tuple(found), total(text.statistics for text in found))


def _collect(parts: Iterator[list[TextReport]], texts: int, progress: Progress | None) -> list[TextReport]:
    found: list[TextReport] = []
    for part in parts:
        found += part
        if progress:
            progress(len(found), texts)
    return found


def _report_slice(
    source_t: Resolved, source_s: Resolved, aligner: str, part: tuple[int, Sequence[str]]
) -> list[TextReport]:
    begin, texts = part
    view_t, view_s = _views(source_t, source_s)
    return [
        TextReport(begin + i + 1, measure(aligned), tuple(changes(aligned.t)), tuple(changes(aligned.s)))
        for i, aligned in enumerate(align_corpus(view_t, view_s, texts, aligner=aligner))
    ]


_loaded: dict[Resolved, TokenizerView] = {}


def _views(*sources: Resolved) -> list[TokenizerView]:
    """Load each view once per process."""
    for source in sources:
        if source not in _loaded:
            _loaded[source] = view_from(source)
    return [_loaded[source] for source in sources]
