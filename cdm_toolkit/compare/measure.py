"""Held-out text, and models on it: bits of its bytes, and the divergence from a teacher's cached log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float64

from cdm_toolkit.artifacts.manifest import Format, validated, write_json
from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.compare.types import NOTHING, Measured
from cdm_toolkit.compare.words import Ranges, digit_bits, digit_bytes, predicted_words, word_ranges
from cdm_toolkit.distill.dataset import build_dataset
from cdm_toolkit.distill.jsonl import write_rows
from cdm_toolkit.distill.sources import read_rows
from cdm_toolkit.errors import BadArtifact, BadOption, BadRow, CdmError
from cdm_toolkit.evaluation.bpb import first_scored
from cdm_toolkit.forward import logits_by_batch
from cdm_toolkit.hub.models import (
    check_positions,
    check_vocabulary,
    load_model,
    model_fingerprint,
    model_folder,
)
from cdm_toolkit.hub.tokenizers import Loaded, load_tokenizer
from cdm_toolkit.kd.aligned_rows import AlignedRow
from cdm_toolkit.kd.batch import AlignedBatch, Collator
from cdm_toolkit.kd.exact_match import ExactMatch
from cdm_toolkit.kd.loss_sums import loss_sums
from cdm_toolkit.kd.pair import TokenizerPair
from cdm_toolkit.kd.rows import Row, rows_fingerprint
from cdm_toolkit.kd.tokenized_rows import TeacherSide, TokenizerSide, tokenizer_side
from cdm_toolkit.teachers.cached import Cached, check_rows, open_cache
from cdm_toolkit.tokdiff.changes import changes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cdm_toolkit.tokdiff.spans import TokenSpans

FORMAT = Format(
    "cdm-toolkit held-out text",
    2,
    "remove the folder, and have it made again",
    code=(
        "batching.py",
        "forward.py",
        "tokdiff",
        "alignment",
        "kd",
        "distill/dataset.py",
        "evaluation/bpb.py",
        "compare/measure.py",
        "compare/words.py",
    ),
)
HEADER_FILE, ROWS_FILE, CACHE_FOLDER = "heldout.json", "rows.jsonl", "teacher-cache"
TOP_K = 100
"""Most likely ids of the teacher that the divergence compares one by one; all others are one outcome."""
UNCUT = 1 << 30
"""A longest row that none reaches: bits are of the bytes of the whole row."""

OnRow = Callable[[int, int], None]
"""Called with how many rows are done and how many there are."""


@dataclass(frozen=True, slots=True)
class _Header:
    """What lies in a folder of held-out text."""

    kinds: Mapping[str, int]
    """How many rows each kind has, in the order of the rows."""
    rows_fingerprint: str
    teacher: str
    model_fingerprint: str
    """Of the teacher's weights."""
    top_k: int | None
    """None where the divergence from the teacher is not measured."""
    scores: Mapping[str, Measured]
    """The teacher's own, by kind."""


@dataclass(frozen=True, slots=True, eq=False)
class Heldout:
    """Text to measure on, with the teacher's log-probabilities. It is made once, and opened for each model."""

    folder: Path
    rows: Mapping[str, tuple[Row, ...]]
    """By kind; numbered from 1 through all kinds."""
    teacher: Mapping[str, Measured]
    """The teacher itself on each kind; its divergence is 0, over no boundaries."""
    teacher_name: str
    top_k: int | None

    @staticmethod
    def make(
        folder: str | Path,
        kinds: Mapping[str, Sequence[Row]],
        teacher: str,
        *,
        divergence: bool = True,
        device: str = "cpu",
        on_row: OnRow = lambda _done, _total: None,
    ) -> Heldout:
        """Measure the teacher on rows of several kinds, cache its log-probabilities, and write all to a folder.

        Without `divergence` nothing is kept but its bits. What is there already, made of the same rows and weights, is
        taken as it is; half of it is gone on with. Raises BadRow for a row without a completion, BadArtifact for a
        folder with other text, and as `score_model`.
        """
        folder, rows = Path(folder), _numbered(kinds)
        every = [row for of_kind in rows.values() for row in of_kind]
        vocab = load_tokenizer(teacher).view.vocab_size
        header = _Header(
            kinds={kind: len(of_kind) for kind, of_kind in rows.items()},
            rows_fingerprint=rows_fingerprint(every),
            teacher=teacher,
            model_fingerprint=model_fingerprint(model_folder(teacher)),
            top_k=min(TOP_K, vocab) if divergence else None,
            scores={},
        )
        if (folder / HEADER_FILE).is_file():
            if replace(_read_header(folder), teacher=teacher, scores={}) != header:
                fix = "give another folder, or remove this one"
                raise BadArtifact(folder, "it has other held-out text, or was made by another teacher", fix)
            return Heldout.open(folder)
        write_rows(folder / ROWS_FILE, every)
        bits_only = Heldout(folder, rows, {}, teacher, None)
        scores = score_model(teacher, bits_only, device=device, on_row=on_row)
        if header.top_k is not None:
            _cache_teacher(folder, teacher, header.top_k, device)
        made_by = provenance(fingerprints={"model": header.model_fingerprint}, device=device)
        write_json(folder / HEADER_FILE, FORMAT.header(made_by, **asdict(replace(header, scores=scores))))
        return Heldout.open(folder)

    @staticmethod
    def open(folder: str | Path) -> Heldout:
        """Open what `make` has written. Raises FileProblem, BadArtifact."""
        folder = Path(folder)
        header = _read_header(folder)
        every = read_rows(folder / ROWS_FILE)
        whole = sum(header.kinds.values()) == len(every) and header.scores.keys() == header.kinds.keys()
        if not whole or rows_fingerprint(every) != header.rows_fingerprint:
            raise BadArtifact(folder / ROWS_FILE, "these are not the rows that were written", FORMAT.again)
        left = iter(every)
        rows = {kind: tuple(next(left) for _ in range(count)) for kind, count in header.kinds.items()}
        return Heldout(folder, rows, header.scores, header.teacher, header.top_k)


def _numbered(kinds: Mapping[str, Sequence[Row]]) -> dict[str, tuple[Row, ...]]:
    """Number rows through all kinds, as the file will have them; a chat is read as a text."""
    if not kinds or not all(kinds.values()):
        raise BadOption(
            "held-out text", {kind: len(rows) for kind, rows in kinds.items()}, "rows of each kind"
        )
    numbers = iter(range(1, 1 + sum(map(len, kinds.values()))))
    for kind, rows in kinds.items():
        for row in rows:
            if not row.completion:
                raise BadRow(
                    f"held-out text {kind}", row.number, "it has no completion to measure", "remove it"
                )
    return {
        kind: tuple(Row(next(numbers), row.prompt, row.completion) for row in rows)
        for kind, rows in kinds.items()
    }


def _read_header(folder: Path) -> _Header:
    file = folder / HEADER_FILE
    return validated(_Header, file, FORMAT.read(file), FORMAT.again)


def _cache_teacher(folder: Path, teacher: str, top_k: int, device: str) -> None:
    """Keep the teacher's top k at each token of the completions, in full precision."""
    from cdm_toolkit.distill.write_teacher_cache import CacheSettings, write_cache

    settings = CacheSettings(
        model=teacher,
        data=str(folder / ROWS_FILE),
        output=str(folder / CACHE_FOLDER),
        k=top_k,
        dtype="float32",
        max_length=UNCUT,
        device=device,
    )
    write_cache(settings)


# Models


def score_model(
    model: str | Path,
    heldout: Heldout,
    *,
    batch_size: int | None = None,
    device: str = "cpu",
    on_row: OnRow = lambda _done, _total: None,
) -> dict[str, Measured]:
    """Measure a model with its tokenizer on each kind of held-out text, with one forward pass a batch.

    Bits are those of `passage_bits`: all tokens that spell a byte of the completion, after the same start token, and no
    end of text. Words and digits are those of `words`: a first token without context is never the argmax. The
    divergence is KL(teacher ‖ model) in nats at each boundary that both tokenizers share in the completion, its
    beginning and its end (where both end a text with a token) among them: over the ids of the teacher's top k that have
    the same bytes or role on both sides, with all other probability as one more outcome, at temperature 1. Rows are
    read whole; those of like length run together, and `batch_size` changes nothing but the rounding. Raises BadRow for
    a row that a tokenizer changes or that has no shared boundary, BadOption for one longer than the model's positions,
    VocabularyTooSmall, CdmError where a likelihood is not finite, and the errors of models and tokenizers.
    """
    name = str(model)
    tokenizer = load_tokenizer(name)
    pair = None
    if heldout.top_k is not None:
        pair = TokenizerPair.from_loaded(load_tokenizer(heldout.teacher_name), tokenizer)
    texts = _texts(heldout, tokenizer, pair)
    loaded = load_model(name, device=device)
    check_vocabulary(loaded, name, tokenizer.view.vocab_size)
    longest = max(len(text.row.student_ids) for text in texts)
    check_positions(loaded, name, longest, option="the tokens of the longest held-out row")
    scorer = _Scorer(loaded, None if pair is None else _divergence(heldout, pair, texts, device))
    left, done, measured = iter(texts), 0, {}
    for kind, rows in heldout.rows.items():
        of_kind, found = [next(left) for _ in rows], []
        ids = [text.row.student_ids for text in of_kind]
        labels = [range(text.row.label_from - 1, len(text.row.student_ids) - 1) for text in of_kind]
        for batch in logits_by_batch(loaded, ids, labels, size=batch_size):
            found.append(scorer.measure([of_kind[row] for row in batch.rows], batch.values))
            done += len(batch.rows)
            on_row(done, len(texts))
        measured[kind] = Measured.sum(found)
    if not all(math.isfinite(each.bits + each.divergence) for each in measured.values()):
        raise CdmError(
            f"{name} gives held-out text a likelihood that is not a number",
            fix="its weights hold NaN or infinity: take an earlier checkpoint, or a lower learning rate",
        )
    return measured


@dataclass(frozen=True, slots=True, eq=False)
class _Text:
    """A row in the model's tokens; labels begin at the token that first spells a byte of the completion."""

    row: AlignedRow
    ended: bool
    """Its last token is the end of text, which spells no byte."""
    text: bytes
    start: int
    """Byte at which the completion begins."""
    tokens: Ranges
    """Of those that spell it, the first one without context included."""
    free_bits: float
    """What a first token without context costs."""

    @property
    def scored_bytes(self) -> int:
        return len(self.text) - self.start

    def of_words(
        self, bits: Float64[np.ndarray, " label"], is_argmax: Bool[np.ndarray, " label"]
    ) -> Measured:
        """Measure words and digits alone, given what each label costs and whether it is predicted."""
        labels = len(bits) - self.ended
        free = len(self.tokens) - labels
        bits = np.concatenate((np.full(free, self.free_bits), bits[:labels]))
        is_argmax = np.concatenate((np.zeros(free, bool), is_argmax[:labels]))
        words = word_ranges(self.text, self.start)
        return replace(
            NOTHING,
            words=len(words),
            predicted_words=predicted_words(words, self.tokens, is_argmax),
            digit_bytes=digit_bytes(self.text, self.start),
            digit_bits=digit_bits(self.text, self.tokens, bits, self.start),
        )


def _texts(heldout: Heldout, tokenizer: Loaded, pair: TokenizerPair | None) -> list[_Text]:
    rows = [row for of_kind in heldout.rows.values() for row in of_kind]
    side = tokenizer_side(tokenizer.tokenizer, tokenizer.view)
    sides = [] if pair is None else [TeacherSide(pair.teacher, "bytes")]
    aligned, _ = build_dataset(rows, side, sides, max_length=UNCUT)
    by_row = {of_row.row: of_row for of_row in aligned}
    spans = side.view.encode_batch([row.text for row in rows])
    file = heldout.folder / ROWS_FILE
    return [
        _text(file, row, by_row.get(row.number), of_row, side)
        for row, of_row in zip(rows, spans, strict=True)
    ]


def _text(file: Path, row: Row, aligned: AlignedRow | None, spans: TokenSpans, side: TokenizerSide) -> _Text:
    name = side.view.name
    if changed := changes(spans):
        problem = (
            f"{name} reads {changed[0].spelled!r} where it has {changed[0].text!r}: its bits would be too few"
        )
        raise BadRow(file, row.number, problem, _LEAVE_OUT)
    if aligned is None:
        raise BadRow(
            file, row.number, f"{name} has no token in its completion that follows another", _LEAVE_OUT
        )
    if not all(len(teacher.groups) for teacher in aligned.teachers):
        problem = f"{name} has no boundary in it that the teacher shares"
        raise BadRow(file, row.number, problem, f"{_LEAVE_OUT}, or measure no divergence")
    first = first_scored(spans, row.completion_start)
    return _Text(
        row=replace(
            aligned, turns=np.array([[max(side.shift + first, 1), len(aligned.student_ids)]], np.int32)
        ),
        ended=side.eos is not None,
        text=spans.text_bytes,
        start=row.completion_start,
        tokens=np.stack((spans.start[first:], spans.end[first:]), 1),
        free_bits=0.0 if side.shift + first else math.log2(side.view.vocab_size),
    )


_LEAVE_OUT = "leave this row out"


def _divergence(
    heldout: Heldout, pair: TokenizerPair, texts: Sequence[_Text], device: str
) -> tuple[Cached, ExactMatch]:
    """Open the teacher's cached log-probabilities, and what compares a model with them over ids with the same bytes."""
    rows = [row for of_kind in heldout.rows.values() for row in of_kind]
    cache = open_cache(heldout.folder / CACHE_FOLDER, pair.teacher, rows, "none")
    check_rows(cache, [text.row for text in texts], 0)
    method = ExactMatch(pair).to(device)
    method.top_k = cache.k  # all that is there, also where the student's vocabulary is smaller
    return Cached(cache), method


class _Scorer:
    """Measure a model batch by batch; without `divergence` that is 0 over no boundaries."""

    def __init__(self, model: PreTrainedModel, divergence: tuple[Cached, ExactMatch] | None) -> None:
        self.model, self.divergence = model, divergence
        self.collator = Collator(() if divergence is None else (divergence[1].pair.fingerprints,))

    @torch.inference_mode()
    def measure(self, texts: Sequence[_Text], logits: torch.Tensor) -> Measured:
        """Measure the texts of a batch together, given the logits at their labels."""
        batch = self.collator([text.row for text in texts]).to(self.model.device)
        is_argmax = (logits.argmax(-1) == batch.labels).cpu().numpy()
        nats, divergence, groups = self._sums(logits, batch)
        bits = float(nats[_scored(texts)].sum()) / math.log(2) + sum(text.free_bits for text in texts)
        together = Measured(bits, sum(text.scored_bytes for text in texts), divergence, groups)
        ends = np.cumsum([text.row.labels for text in texts])[:-1]
        parts = zip(texts, np.split(nats / math.log(2), ends), np.split(is_argmax, ends), strict=True)
        return Measured.sum((together, *(text.of_words(*of_text) for text, *of_text in parts)))

    def _sums(
        self, logits: torch.Tensor, batch: AlignedBatch
    ) -> tuple[Float64[np.ndarray, " label"], float, int]:
        """Give −log p of each label, and the divergence over the groups with their number."""
        if self.divergence is None:
            sums = loss_sums(logits, batch.labels)
            return -sums.label_logprobs.cpu().double().numpy(), 0.0, 0
        teacher, method = self.divergence
        out = method(logits, method.signal(teacher, batch), batch)
        return -out.sums.label_logprobs.cpu().double().numpy(), float(out.sums.kd[0].kd), out.groups


def _scored(texts: Sequence[_Text]) -> Bool[np.ndarray, " label"]:
    """Mark the labels of a batch that spell bytes."""
    labels = np.array([text.row.labels for text in texts])
    scored = np.ones(labels.sum(), bool)
    scored[labels.cumsum()[[text.ended for text in texts]] - 1] = False
    return scored
