"""Teacher behind a server: token ids are sent, log-probabilities of the prompt come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cdm_toolkit.artifacts.teacher_cache import CachedRow
from cdm_toolkit.errors import BadOption, ServerProblem
from cdm_toolkit.kd.types import SignalRequest, TeacherSignal
from cdm_toolkit.teachers.cached import Cached
from cdm_toolkit.teachers.engines import ENGINES, Refusal, Scored
from cdm_toolkit.teachers.scoring_client import Probe, ScoringClient, ServerSettings, refused, wait

if TYPE_CHECKING:
    from jaxtyping import Int64

    from cdm_toolkit.artifacts.read_through_cache import ReadThroughCache
    from cdm_toolkit.kd.batch import AlignedBatch
    from cdm_toolkit.kd.tokenized_rows import TokenizerSide

PROBE_TEXT = (
    "A river carries sand to the sea: in 1998 the Nile brought 124 million tonnes of it. "
    "Why do its banks, then, not wash away? Because grass and trees (reeds above all) hold them together."
)
"""Text that servers score to show which model and which tokenizer they have."""
LOW_IDS, PROVING = (10, 60), 5
"""Ids that are sent to prove a tokenizer, and the candidates after each: all of them come with their texts."""
MAY_DIFFER = 0.05
"""Share of ids whose text may be another at the server, which decodes each by itself or after its neighbours."""


class Stopped(Exception):
    """The run was told to stop while it waited for a server."""


@dataclass(frozen=True, slots=True)
class Connection:
    """A client whose servers have shown their model and tokenizer.

    `k` is how many candidates they give, `probe` the scores by which the model is known again, and `notes` say what
    is to be told of the servers.
    """

    client: ScoringClient
    k: int
    probe: tuple[float, ...]
    bits_per_byte: float
    """Of the probe's text."""
    longest: int | None
    """Tokens that a row may have; None where no server tells."""
    notes: tuple[str, ...]

    def check_length(self, longest: int) -> None:
        """See that a server can read the longest row. BadOption."""
        if self.longest is not None and longest > self.longest:
            url, model = self.client.settings.urls[0], self.client.settings.model
            allowed = f"at most {self.longest}: {url} reads no more tokens of {model}"
            raise BadOption("max_length", longest, allowed)


def connect(
    settings: ServerSettings, side: TokenizerSide, *, k: int, at_most: bool = False, option: str = "top_k"
) -> Connection:
    """Ask each server for its first scores: whether it answers, gives `k` candidates, and has this tokenizer.

    Where `at_most` is set, servers may give fewer than `k`, which is the setting `option`. Raises BadOption for a `k`
    that they do not give, a key that is not there; ServerProblem where none answers, or one has another tokenizer or
    model.
    """
    client = ScoringClient(settings, vocab=side.view.vocab_size)
    try:
        return _connected(client, side, k, None if at_most else option)
    except BaseException:
        client.close()
        raise


def _connected(client: ScoringClient, side: TokenizerSide, k: int, option: str | None) -> Connection:
    ids = tuple(side.framed(side.view.encode(PROBE_TEXT).ids, ended=False).tolist())
    vocab = side.view.vocab_size
    if k >= vocab:
        raise BadOption(option or "top_k", k, f"less than {vocab}, the whole vocabulary")
    more: list[str] = []
    url = client.settings.urls[0]
    # ids that every vocabulary has, as others may break an engine, show candidates from all over it
    _check_tokenizer(client.texts(range(*LOW_IDS), PROVING), side, url)
    try:
        scores, notes = client.connect(Probe(ids, k))
    except Refusal as refusal:
        if refusal.cap is None:
            raise refused(refusal) from None
        start = ENGINES[client.settings.engine].start.format(k=k)
        if option is not None:
            allowed = f"at most {refusal.cap}: {refusal.url} gives no more candidates unless it is started with {start}"
            raise BadOption(option, k, allowed) from None
        more.append(f"{refusal.url} gives {refusal.cap} candidates; started with {start} it would give {k}")
        k = refusal.cap
        try:
            scores, notes = client.connect(Probe(ids, k))
        except Refusal as again:
            raise refused(again) from None
    nats = -float(scores.token_logprobs.astype(np.float64).sum())
    return Connection(
        client,
        k,
        tuple(scores.token_logprobs.tolist()),
        nats / np.log(2) / len(PROBE_TEXT.encode()),
        client.longest(),
        (*more, *(f"{note}; the others go on without it" for note in notes)),
    )


def _check_tokenizer(texts: Mapping[int, str], side: TokenizerSide, url: str) -> None:
    """Compare the texts of ids at a server with those here. ServerProblem."""
    view, differ = side.view, []
    compared = 0
    for token, there in sorted(texts.items()):
        here = view.literals[token].decode(errors="replace") if token < view.vocab_size else None
        if here is not None and "\ufffd" in here + there:
            continue
        compared += 1
        if here is None or here.strip() != there.strip():
            differ.append(f"id {token} is {there!r} there" + ("" if here is None else f" and {here!r} here"))
    if not compared:
        raise ServerProblem(
            url, "does not tell the texts of ids, which show its tokenizer", "start it with its tokenizer"
        )
    if len(differ) > MAY_DIFFER * compared:
        raise ServerProblem(
            url,
            f"has another tokenizer than {view.name}: {differ[0]}",
            "give the one of its model as `tokenizer`",
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Wanted:
    """A row of a batch in the teacher's ids, and the positions that are asked for: from `first` to `end`."""

    number: int
    ids: Int64[np.ndarray, " time_t"]
    first: int
    end: int

    def is_in(self, row: CachedRow) -> bool:
        """Whether a row that is there is this one, and has all that is asked for."""
        ids, both = row.token_ids, min(len(row.token_ids), len(self.ids))
        there = row.first <= self.first and self.end < len(ids)
        return there and np.array_equal(ids[:both], self.ids[:both])


@dataclass(frozen=True, slots=True, eq=False)
class _Answers:
    """Rows of one batch, as `Cached` reads them."""

    rows: dict[int, CachedRow]
    k: int
    folder: Path
    is_whole: bool = False

    def row(self, number: int) -> CachedRow:
        return self.rows[number]


class Served:
    """A model behind a server, asked row by row; what it answers is kept in a cache, where there is one."""

    def __init__(
        self,
        client: ScoringClient,
        *,
        k: int,
        cache: ReadThroughCache | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Ask for `k` candidates at each position. Waiting for an answer ends when `stopping` is True."""
        self.client, self.k, self.cache, self.stopping = client, k, cache, stopping
        self._asked: dict[int, tuple[_Wanted, Future[Scored]]] = {}

    def check(self, request: SignalRequest) -> None:
        """Refuse a request that the servers cannot answer. BadOption."""
        if request.mean_logits:
            raise BadOption("positions", "mean", "boundary: a server gives no whole logits to average")
        if request.top_k > self.k:
            raise BadOption("top_k", request.top_k, f"at most {self.k}, which the server was asked for")

    def prefetch(self, batch: AlignedBatch) -> None:
        """Ask for what a later batch will need."""
        for wanted in self._wanted(batch):
            if self._kept(wanted) is None:
                self._ask(wanted)

    def await_answers(self, batch: AlignedBatch) -> None:
        """Wait until all that a batch needs is answered. ServerProblem; Stopped when the run is told to stop before."""
        wanted = [each for each in self._wanted(batch) if self._kept(each) is None]
        if wait([self._ask(each) for each in wanted], self.stopping) is None:
            raise Stopped

    def signal(self, batch: AlignedBatch, request: SignalRequest) -> TeacherSignal:
        """Give the signal of a batch: what was not asked for before is asked for now, all rows at once.

        ServerProblem, BadOption; Stopped when the run is told to stop before the answers are there.
        """
        self.check(request)
        rows = {wanted.number: (wanted, self._kept(wanted)) for wanted in self._wanted(batch)}
        asked = {number: self._ask(wanted) for number, (wanted, kept) in rows.items() if kept is None}
        answers = wait(list(asked.values()), self.stopping)
        if answers is None:
            raise Stopped
        found = {number: kept for number, (_, kept) in rows.items() if kept is not None}
        for number, scored in zip(asked, answers, strict=True):
            wanted, _ = self._asked.pop(number)
            found[number] = CachedRow(
                number,
                wanted.ids.astype(np.int32),
                scored.first,
                scored.ids,
                scored.logprobs,
                scored.token_logprobs,
            )
            if self.cache is not None:
                self.cache.put(found[number])
        folder = self.cache.folder if self.cache else Path(self.client.settings.urls[0])
        return Cached(_Answers(found, self.k, folder)).signal(batch, request)

    def _kept(self, wanted: _Wanted) -> CachedRow | None:
        row = None if self.cache is None else self.cache.row(wanted.number)
        return row if row is not None and wanted.is_in(row) else None

    def _ask(self, wanted: _Wanted) -> Future[Scored]:
        """Ask for a row, unless it is asked for already."""
        if (asked := self._asked.get(wanted.number)) is not None:
            there, future = asked
            if there.first == wanted.first and np.array_equal(there.ids, wanted.ids):
                return future
            future.cancel()
        future = self.client.submit(wanted.ids.tolist(), wanted.first, self.k)
        self._asked[wanted.number] = wanted, future
        return future

    @staticmethod
    def _wanted(batch: AlignedBatch) -> Iterator[_Wanted]:
        """Tell what is needed of each row that has a group."""
        (side,) = batch.teachers
        flat = side.inputs["input_ids"].reshape(-1).cpu().numpy()
        positions, rows = side.token_positions.cpu().numpy(), side.row_positions.cpu().numpy()
        end = 0
        for number, length, count in zip(batch.rows, side.lengths, side.tokens_per_row, strict=True):
            begin, end = end, end + count
            if count:
                start = int(positions[begin] - rows[begin])
                first, last = int(rows[begin:end].min()), int(rows[begin:end].max())
                yield _Wanted(number, flat[start : start + length], first, last + 1)
