"""On-policy: the student samples completions of prompts, which its teachers then judge (GKD, arXiv 2306.13649)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cdm_toolkit.artifacts.atomic import write_whole
from cdm_toolkit.distill.generate import Prompt, room_after, sample_ids, seed_of
from cdm_toolkit.distill.heldout import BATCH
from cdm_toolkit.distill.logs import SampleLog
from cdm_toolkit.distill.output_folder import SAMPLES
from cdm_toolkit.errors import BadArtifact, DoesNotSpell, UnsupportedTokenizer
from cdm_toolkit.kd.aligned_rows import (
    AlignedRow,
    AlignedTeacherRow,
    Groups,
    align_groups,
    truncate_aligned,
)
from cdm_toolkit.kd.given_ids import row_of_sample, special_texts
from cdm_toolkit.kd.rows import Row
from cdm_toolkit.kd.tokenized_rows import (
    TeacherSide,
    TemplateName,
    TokenizedRow,
    TokenizerSide,
    tokenize_prompts,
    tokenize_rows,
)

if TYPE_CHECKING:
    from cdm_toolkit.distill.settings import OnPolicyConfig
    from cdm_toolkit.distill.vllm_server import VLLMServer
    from cdm_toolkit.kd.batch import AlignedBatch
    from cdm_toolkit.kd.types import TeacherSignal

PENDING = "samples-{process}.json"
"""Samples of coming steps, in a checkpoint: an earlier student has drawn them."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What the student has written after a prompt: its ids as they were sampled, the one that ends them among them."""

    prompt: Prompt
    ids: tuple[int, ...]
    row: Row
    """The text that they spell, for the other sides."""
    aligned: AlignedRow

    @property
    def number(self) -> int:
        """The number of the prompt's row in the data."""
        return self.prompt.row.number

    @property
    def text(self) -> str:
        return self.row.completion


@dataclass(frozen=True, slots=True, eq=False)
class OnPolicy:
    """Makes rows of what the student samples after the prompts of the data's rows."""

    settings: OnPolicyConfig
    prompts: Mapping[int, Prompt]
    """By the number of the row: those that leave room for a sample."""
    student: TokenizerSide
    teachers: tuple[TeacherSide, ...]
    template: TemplateName
    max_length: int
    seed: int
    server: VLLMServer | None = None
    """What samples in place of `generate`."""
    markers: re.Pattern[str] | None = field(init=False)
    """Special tokens of the teachers."""
    fingerprint: str = field(init=False)
    """Of the prompts: a hash of their numbers and ids."""

    def __post_init__(self) -> None:
        views = [teacher.side.view for teacher in self.teachers]
        digest = hashlib.sha256()
        for number, prompt in sorted(self.prompts.items()):
            digest.update(number.to_bytes(8, "big") + prompt.ids.tobytes())
        object.__setattr__(self, "markers", special_texts(views))
        object.__setattr__(self, "fingerprint", digest.hexdigest())

    def room(self, prompt: Prompt) -> int:
        """Give the most tokens that a sample after a prompt has."""
        return room_after(prompt, self.settings, self.max_length)

    def chosen(self, numbers: Sequence[int], step: int, batch: int) -> list[bool]:
        """Choose the rows of a batch that are sampled: `share` of those that have a prompt.

        The `batch` is counted among those that are drawn together at a `step`, over all processes.
        """
        rng = np.random.default_rng((self.seed, step, batch))
        there = [nth for nth, number in enumerate(numbers) if number in self.prompts]
        count = int(np.floor(self.settings.share * len(there) + rng.random()))
        taken = set(rng.permutation(there)[:count].tolist())
        return [nth in taken for nth in range(len(numbers))]

    def draw(
        self, model: Any, batches: Sequence[Sequence[int]], step: int, process: int, processes: int
    ) -> list[Drawn]:
        """Sample for batches of rows, whose numbers are given, in one of several processes.

        NotFiniteLogits; of a server, whose weights have to be written before, also ServerProblem and Stopped.
        """
        chosen = [
            self.chosen(numbers, step, nth * processes + process) for nth, numbers in enumerate(batches)
        ]
        wanted = [self._wanted(*each) for each in zip(batches, chosen, strict=True)]
        prompts = [self.prompts[number] for numbers in wanted for number in numbers]
        seed = seed_of(self.seed, step, process)
        if self.server is None:
            found = sample_ids(model, prompts, self.settings, self.student, self.max_length, seed)
        else:
            found = self.server.sample(model, prompts, self.student, self.max_length, step, seed)
        ids = iter(found)
        return [
            Drawn(tuple(numbers), tuple(which), tuple((number, tuple(next(ids))) for number in own))
            for numbers, which, own in zip(batches, chosen, wanted, strict=True)
        ]

    def _wanted(self, numbers: Sequence[int], chosen: Sequence[bool]) -> list[int]:
        """Tell whose prompts the samples have that stand for the chosen rows: `samples_per_prompt` have one prompt."""
        own = [number for number, is_chosen in zip(numbers, chosen, strict=True) if is_chosen]
        return [own[nth - nth % self.settings.samples_per_prompt] for nth in range(len(own))]

    def samples(self, drawn: Sequence[Drawn]) -> list[list[Sample]]:
        """Tokenize what was drawn for the teachers, and align it, batch by batch.

        The rows are numbered −1, −2, … through all batches: what was sampled has no number in the data.
        """
        made = iter(
            self._aligned([(self.prompts[number], ids) for one in drawn for number, ids in one.samples])
        )
        return [[next(made) for _ in one.samples] for one in drawn]

    def _aligned(self, sampled: Sequence[tuple[Prompt, Sequence[int]]]) -> list[Sample]:
        if not sampled:
            return []
        rows = [
            row_of_sample(prompt.row, self.student.view, prompt.ids, np.array(ids, np.int32), self.markers)
            for prompt, ids in sampled
        ]
        sides = [self.student, *(teacher.side for teacher in self.teachers)]
        tokenized = [_tokenized(side, rows, self.template) for side in sides]
        made = []
        for nth, (row, (prompt, ids), student, *teachers) in enumerate(
            zip(rows, sampled, *tokenized, strict=True), 1
        ):
            grouped = [
                (of, _groups(of, student, teacher.aligner))
                for of, teacher in zip(teachers, self.teachers, strict=True)
            ]
            aligned, _ = truncate_aligned(-nth, student, grouped, self.max_length)
            if not aligned.labels:  # half a character is all that there is: nobody has anything to say of it
                first = len(prompt.ids)
                whole = np.append(prompt.ids, np.int32(ids[0]))
                none = tuple(AlignedTeacherRow(of.ids[:1], np.empty((0, 4), np.int32)) for of in teachers)
                aligned = AlignedRow(-nth, whole, np.array([[first, first + 1]], np.int32), none)
            made.append(Sample(prompt, tuple(ids), row, aligned))
        return made


NOT_READ = TokenizedRow(np.zeros(1, np.int32), np.ones((1, 2), np.int32), ())
"""Stands for a row that a tokenizer or its template cannot write."""


def _tokenized(side: TokenizerSide, rows: Sequence[Row], template: TemplateName) -> list[TokenizedRow]:
    """Tokenize what was sampled: of a text that a template refuses or rewrites nobody learns anything."""
    try:
        return tokenize_rows(side, rows, template)
    except (UnsupportedTokenizer, DoesNotSpell):
        if len(rows) == 1:
            return [NOT_READ]
        return [_tokenized(side, [row], template)[0] for row in rows]


def _groups(t: TokenizedRow, s: TokenizedRow, aligner: str) -> Groups:
    if NOT_READ in (t, s):
        return np.empty((0, 4), np.int32)
    return align_groups(t, s, aligner)


def prompts_of(
    rows: Iterable[Row],
    numbers: Int64[np.ndarray, " row"],
    side: TokenizerSide,
    template: TemplateName,
    room: int,
) -> dict[int, Prompt]:
    """Tokenize the prompts of the rows of these numbers, but for those that are longer than `room` tokens.

    A text without a prompt has none.
    """
    trained = set(numbers.tolist())
    wanted = (row for row in rows if row.number in trained)
    found: dict[int, Prompt] = {}
    some: list[Row] = []

    def tokenize() -> None:
        for row, ids in zip(some, tokenize_prompts(side, some, template), strict=True):
            if 0 < len(ids) <= room:
                found[row.number] = Prompt(_without_completion(row), ids)
        some.clear()

    for row in wanted:
        if template == "none" and row.messages:  # read as a text
            row = replace(row, messages=(), earlier=(), tools=())
        if not row.messages and not row.prompt:
            continue
        some.append(row)
        if len(some) == BATCH:
            tokenize()
    if some:
        tokenize()
    return found


def _without_completion(row: Row) -> Row:
    messages = (*row.messages[:-1], row.messages[-1]._replace(content="")) if row.messages else ()
    return replace(row, completion="", messages=messages)


# What is told of samples


@dataclass(frozen=True, slots=True, eq=False)
class SampleLogprobs:
    """Samples of one batch, with the log-probabilities that the student and each teacher give to each.

    A teacher that was not asked has None.
    """

    step: int
    samples: Sequence[Sample]
    student: Float[Tensor, " sample"]
    teachers: tuple[Float[Tensor, " sample"] | None, ...]

    @classmethod
    def of(
        cls,
        step: int,
        samples: Sequence[Sample],
        batch: AlignedBatch,
        label_logprobs: Float[Tensor, " label"],
        signals: Sequence[TeacherSignal | None],
    ) -> SampleLogprobs:
        """Sum up the log-probabilities of a batch row by row: of what the first teacher has groups for."""
        nothing = label_logprobs.new_zeros(len(samples))
        grouped = batch.teachers[0].student_token_rows
        of_student = nothing.index_add(
            0, batch.label_row.index_select(0, grouped), label_logprobs.index_select(0, grouped)
        )
        teachers = []
        for side, signal in zip(batch.teachers, signals, strict=True):
            logprobs = None if signal is None else signal.token_logprobs
            if logprobs is not None:
                rows = torch.arange(len(samples), device=logprobs.device)
                counts = torch.tensor(side.tokens_per_row, device=logprobs.device)
                of_row = rows.repeat_interleave(counts, output_size=len(logprobs))
                logprobs = nothing.index_add(0, of_row, logprobs.to(nothing.dtype))
            teachers.append(logprobs)
        return cls(step, samples, of_student, tuple(teachers))

    def sums(self) -> Tensor:
        """Count samples, tokens, samples that ended, bytes, the student's nats, and bytes and nats of each teacher."""
        sizes = self._sizes()
        tokens = sum(len(sample.ids) for sample in self.samples)
        ended = sum(sample.row.ended for sample in self.samples)
        found = [len(self.samples), tokens, ended, sum(sizes), float(self.student.sum())]
        for nats, groups in self._of_teachers():
            judged = [size for size, count in zip(sizes, groups, strict=True) if count]
            found += [sum(judged), 0.0 if nats is None else float(nats.sum())]
        return torch.tensor(found, dtype=torch.float64)

    def _sizes(self) -> list[int]:
        return [len(sample.text.encode()) for sample in self.samples]

    def _of_teachers(self) -> Iterator[tuple[Tensor | None, list[int]]]:
        for nth, nats in enumerate(self.teachers):
            yield nats, [len(sample.aligned.teachers[nth].groups) for sample in self.samples]

    def records(self) -> Iterator[dict[str, Any]]:
        """Give the samples as they are written to the file of them; log-probabilities are in nats a byte."""
        student, sizes = self.student.tolist(), self._sizes()
        teachers = [
            [value if count else None for value, count in zip(nats.tolist(), groups, strict=True)]
            if nats is not None
            else [None] * len(sizes)
            for nats, groups in self._of_teachers()
        ]
        for nth, (sample, size) in enumerate(zip(self.samples, sizes, strict=True)):
            of_teachers = [of[nth] for of in teachers]
            yield {
                "step": self.step,
                "row": sample.number,
                "prompt": sample.row.prompt,
                "completion": sample.text,
                "tokens": len(sample.ids),
                "ended": sample.row.ended,
                "student_logprob": round(student[nth] / max(size, 1), 4),
                "teacher_logprobs": [
                    None if nats is None else round(nats / max(size, 1), 4) for nats in of_teachers
                ],
            }


def sample_log(sums: Float[Tensor, " sum"], rows: float, tokens_per_second: float | None) -> SampleLog | None:
    """Make means of the sums of `SampleLogprobs`, over so many rows in all; None where there was no sample."""
    samples, tokens, ended, size, student, *teachers = sums.tolist()
    if not samples:
        return None
    return SampleLog(
        share=samples / rows,
        tokens=tokens / samples,
        ended=ended / samples,
        student_logprob=student / max(size, 1),
        teacher_logprobs=tuple(
            nats / max(size, 1) for size, nats in zip(teachers[::2], teachers[1::2], strict=True)
        ),
        tokens_per_second=tokens_per_second,
    )


# What lies between steps


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was drawn for one batch: the numbers of its rows, which of them are sampled, and the samples' ids with the
    number of the row that each has the prompt of."""

    rows: tuple[int, ...]
    chosen: tuple[bool, ...]
    samples: tuple[tuple[int, tuple[int, ...]], ...]


def write_pending(pending: Iterable[Drawn], checkpoint: Path, process: int, prompts: str) -> None:
    """Keep the samples of coming steps with a checkpoint, and the fingerprint of the prompts."""
    content = {"prompts": prompts, "drawn": [asdict(drawn) for drawn in pending]}
    file = checkpoint / PENDING.format(process=process)
    file.write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_pending(checkpoint: Path, process: int, prompts: str) -> list[Drawn]:
    """Take the samples of coming steps out of a checkpoint. BadArtifact where it has none for these prompts."""
    file = checkpoint / PENDING.format(process=process)
    if not file.is_file():
        had = "fewer processes" if process else "no `on_policy`"
        fix = "go on as the run was begun, or start it without `resume`"
        raise BadArtifact(checkpoint, f"its run had {had}", fix)
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["drawn"] and content["prompts"] != prompts:
        fix = "go on with the data and settings that it had, or start the run without `resume`"
        raise BadArtifact(checkpoint, "its samples are of other prompts", fix)
    return [
        Drawn(
            tuple(drawn["rows"]),
            tuple(drawn["chosen"]),
            tuple((number, tuple(ids)) for number, ids in drawn["samples"]),
        )
        for drawn in content["drawn"]
    ]


def keep_samples_until(output: Path, step: int) -> None:
    """Take out of the file of samples what was written after a checkpoint, which the run then writes again."""
    file = output / SAMPLES
    if file.is_file():
        *lines, _broken_off = file.read_text(encoding="utf-8").split("\n")
        kept = [f"{line}\n" for line in lines if json.loads(line)["step"] <= step]
        write_whole(file, "".join(kept).encode())


def add_samples(output: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add samples to the file of them, a line each."""
    with (output / SAMPLES).open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
