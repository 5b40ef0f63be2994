"""A distillation method: its settings, the tables it builds from a pair, and its two phases."""

from __future__ import annotations

import inspect
import re
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cdm_toolkit.errors import BadOption, CdmError, TokenizerMismatch, UnknownName
from cdm_toolkit.kd.batch import AlignedBatch, AlignedTeacherBatch
from cdm_toolkit.kd.loss_sums import LossInputs, compare, loss_sums
from cdm_toolkit.kd.pair import TokenizerPair, fingerprint_of
from cdm_toolkit.kd.plugins import load_plugins
from cdm_toolkit.kd.settings import DEFAULT_TOP_K, MethodSettings, fields_of
from cdm_toolkit.kd.teacher_signal import teacher_signal
from cdm_toolkit.kd.types import (
    Comparison,
    KDSums,
    LogprobRequest,
    LossOutput,
    LossSums,
    SignalRequest,
    State,
    StudentLogits,
    TeacherSignal,
    TopK,
)

SettingsT = TypeVar("SettingsT", bound=MethodSettings)


@runtime_checkable
class Teacher(Protocol):
    """Where a signal comes from, other than a model in memory: see `cdm_toolkit.teachers`."""

    def signal(self, batch: AlignedBatch, request: SignalRequest) -> TeacherSignal:
        """Give the signal for a batch of one teacher."""


_METHODS: dict[str, type[Method[Any, Any]]] = {}


class Method(nn.Module, Generic[SettingsT, State]):
    """Base of the methods. A subclass with a `name` is registered: commands, run files and studies know it.

    `select` says which student log-probabilities the method wants, `loss` turns them into a divergence: all
    methods of a step and the labels then share one pass over the logits. Calling the method does both for one
    teacher. Tables of a pair are buffers, so that `.to(device)` moves them.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """What is compared, in one line."""
    source: ClassVar[str]
    """Paper or code that defines it."""
    aliases: ClassVar[tuple[str, ...]] = ()
    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    __signature__: ClassVar[inspect.Signature]
    """Of the constructor, with the settings by name: what `help` and editors show."""
    color: ClassVar[str | None] = None
    """In figures, as #rrggbb; any free colour without it."""
    marker: ClassVar[str | None] = None
    """In figures, as matplotlib names it."""

    same_tokenizer: ClassVar[bool] = False
    """Teacher and student must have one tokenizer."""
    nested_tokenizers: ClassVar[bool] = False
    """The student's tokens must be parts of the teacher's: `TokenizerPair.nesting_fault`."""
    samples_alone: ClassVar[bool] = False
    """It has a meaning on texts alone that the student has sampled."""
    needs_match: ClassVar[bool] = False
    """It compares ids that have a match in the other vocabulary: without any it teaches nothing."""
    reads_teacher_tokens: ClassVar[bool] = False
    """It reads the log-probabilities of the teacher's tokens in a group."""
    reads_student_tokens: ClassVar[bool] = False
    """It reads logits at every student token of a group, not only at its first."""

    settings: SettingsT
    pair: TokenizerPair
    top_k: int
    """Candidates at a group; 1 for a method that reads none."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" not in cls.__dict__:
            return
        _check_definition(cls)
        parameters = [inspect.Parameter("pair", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        parameters += [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default)
            for field in fields_of(cls.Settings)
        ]
        cls.__signature__ = inspect.Signature(parameters)
        _METHODS[cls.name] = cls

    def __init__(self, pair: TokenizerPair, **settings: Any) -> None:
        """Build the method's tables for a pair. `settings` are those of its `Settings`.

        BadSettings lists all faults of the settings; BadOption for a `top_k` that the smaller vocabulary cannot
        fill, and for two tokenizers that the method is not for.
        """
        super().__init__()
        self.pair = pair
        self.settings = self.Settings.make(settings, source=self.name)  # type: ignore[assignment]
        if self.same_tokenizer and not pair.same_tokenizer:
            raise BadOption(
                "method",
                self.name,
                f"one for different tokenizers, such as spelling: {pair.name_t} is not {pair.name_s}",
            )
        if self.nested_tokenizers and (fault := pair.nesting_fault()):
            others = "one for any two tokenizers, such as spelling"
            raise BadOption(
                "method",
                self.name,
                f"{others}: the student's tokens are not parts of the teacher's, {fault}",
            )
        self.top_k = self.check_top_k(pair, getattr(self.settings, "top_k", None))
        self.build_tables(pair)

    @classmethod
    def check_top_k(cls, pair: TokenizerPair, wanted: int | None) -> int:
        """Give the candidates at a group. BadOption for more than the smaller vocabulary has ids."""
        if not cls.reads_top_k():
            return 1
        smaller = min(pair.vocab_t, pair.vocab_s)
        if wanted is not None and wanted > smaller:
            raise BadOption("top_k", wanted, f"at most {smaller}: the smaller vocabulary has no more ids")
        return min(wanted or DEFAULT_TOP_K, smaller)

    @classmethod
    def reads_top_k(cls) -> bool:
        """Say whether the method has a `top_k`."""
        return any(field.name == "top_k" for field in fields_of(cls.Settings))

    @property
    def mean_logits(self) -> bool:
        """Whether the mean of a group's logits stands for it."""
        return getattr(self.settings, "positions", "boundary") == "mean"

    @property
    def signal_request(self) -> SignalRequest:
        """What the method needs of a teacher."""
        return SignalRequest(self.top_k, self.reads_teacher_tokens, self.mean_logits)

    def build_tables(self, pair: TokenizerPair) -> None:
        """Register tables of the pair as buffers; a method without any leaves this out."""

    def select(self, student: StudentLogits, signal: TeacherSignal) -> LogprobRequest[State]:
        """Choose the student log-probabilities that the loss compares. Nothing here carries a gradient."""
        raise NotImplementedError

    def loss(
        self, logprobs: Float[Tensor, " pick"], request: LogprobRequest[State], signal: TeacherSignal
    ) -> KDSums:
        """Sum the divergence over groups; `logprobs` are the requested ones, differentiable."""
        raise NotImplementedError

    def compare(
        self, logprobs: Float[Tensor, " pick"], request: LogprobRequest[State], signal: TeacherSignal
    ) -> Comparison:
        """Give what `loss` compares, position by position. BadOption for a method without outcomes over student ids.

        Arguments are those of `loss`.
        """
        raise _no_outcomes(self.name)

    @classmethod
    def check_outcomes(cls) -> None:
        """Refuse a method that `compare` has no answer for. BadOption."""
        if cls.compare is Method.compare:
            raise _no_outcomes(cls.name)

    def signal(self, teacher: Teacher | nn.Module, batch: AlignedBatch) -> TeacherSignal:
        """Ask a teacher about a batch: a causal model of transformers, or an object of `cdm_toolkit.teachers`.

        A model is run without gradients, in evaluation mode, on the device where it lies.
        """
        side = self._side(batch)
        if side.empty:
            return self._nothing(side)
        if isinstance(teacher, Teacher):
            return teacher.signal(batch, self.signal_request)
        if isinstance(teacher, nn.Module):
            return teacher_signal(teacher, side, self.signal_request, vocab=self.pair.vocab_t)
        raise BadOption("teacher", teacher, "a causal model, or an object with `signal(batch, request)`")

    def _nothing(self, side: AlignedTeacherBatch) -> TeacherSignal:
        """Make the signal for a batch without a group."""
        ids = side.token_positions.new_zeros(0, self.top_k)
        top = TopK(ids, ids.float())
        none, wanted = ids[:, 0], self.signal_request
        logprobs, token_ids = (none.float(), none) if wanted.token_logprobs else (None, None)
        return TeacherSignal(top, logprobs, token_ids, token_ids, top if wanted.token_top else None)

    def forward(
        self,
        logits: Float[Tensor, "batch time_s vocab"] | Float[Tensor, "label vocab"],
        signal: TeacherSignal,
        batch: AlignedBatch,
    ) -> LossOutput:
        """Compute cross-entropy and KD of a batch of one teacher.

        `logits` are the student's, whole ([batch, time, vocab], as `student(**batch.student).logits`) or at the
        labels alone (`batch.student_logits_at(student)`). Raises TokenizerMismatch for a batch of another pair,
        BadOption for logits or a signal that do not fit.
        """
        side = self.check(batch, signal)
        at_labels = batch.at_labels(logits, vocab=self.pair.vocab_s)
        inputs = None if side.empty else LossInputs.of(self, signal, batch, side)
        sums = loss_sums(at_labels, batch.labels, [inputs])
        return output_of(sums, labels=len(batch.labels), groups=side.groups)

    def explain(
        self,
        logits: Float[Tensor, "batch time_s vocab"] | Float[Tensor, "label vocab"],
        signal: TeacherSignal,
        batch: AlignedBatch,
    ) -> Comparison:
        """Give what the method compares at each position of a batch; its divergences add up to the loss.

        Arguments and errors are those of a call; BadOption also for a method without outcomes over student ids.
        """
        side = self.check(batch, signal)
        at_labels = batch.at_labels(logits, vocab=self.pair.vocab_s)
        return compare(at_labels, LossInputs.of(self, signal, batch, side))

    def check(self, batch: AlignedBatch, signal: TeacherSignal | None) -> AlignedTeacherBatch:
        """Give the teacher's side of a batch that fits, as its signal does. TokenizerMismatch, BadOption."""
        side = self._side(batch)
        if signal is not None:
            self._check_signal(signal, side)
        elif not side.empty:
            raise BadOption("signal", None, "the teacher's: the batch has groups for it")
        return side

    def _side(self, batch: AlignedBatch) -> AlignedTeacherBatch:
        if len(batch.teachers) != 1:
            raise BadOption(
                "the number of teachers in the batch",
                len(batch.teachers),
                "a batch of one pair, or take `kd.Objective`, which is for several",
            )
        (side,) = batch.teachers
        if side.pair != self.pair.fingerprints:
            built_for = (f"{self.pair.name_t} and {self.pair.name_s}", self.pair.fingerprint)
            given = (f"{side.names[0]} and {side.names[1]}", fingerprint_of(side.pair))
            raise TokenizerMismatch(
                f"the method {self.name}",
                "pair",
                built_for,
                given,
                "collate the batch with the method's own pair",
            )
        return side

    def _check_signal(self, signal: TeacherSignal, side: AlignedTeacherBatch) -> None:
        k = signal.top.ids.shape[-1]
        if k != self.top_k:
            raise BadOption(
                "the signal's top_k",
                k,
                f"{self.top_k}, which {self.name} was built with, or build it with top_k={k}",
            )
        request = self.signal_request
        needed = ("token_logprobs", "token_group", "token_ids") if request.token_logprobs else ()
        for name in (*needed, *(("token_top",) if request.token_top else ())):
            if getattr(signal, name) is None:
                allowed = f"those of the groups' tokens, which {self.name} reads"
                raise BadOption(f"the signal's {name}", None, allowed)
        found = len(signal.top.ids), len(signal.token_logprobs if signal.token_logprobs is not None else ())
        wanted = side.groups, len(side.token_positions) if signal.token_logprobs is not None else 0
        if found != wanted:
            got, groups = "{} groups and {} tokens".format(*found), "{} and {}".format(*wanted)
            raise BadOption("the size of the signal", got, f"the signal of this batch, which has {groups}")


def output_of(sums: LossSums, *, labels: int, groups: int) -> LossOutput:
    """Turn the sums of one teacher into means."""
    (kd,) = sums.kd
    return LossOutput(
        ce=sums.ce / max(labels, 1),
        kd=kd.kd / max(groups, 1),
        matched_mass=kd.matched_mass.detach() / max(groups, 1),
        pairs=kd.pairs.detach() / max(groups, 1),
        labels=labels,
        groups=groups,
        sums=sums,
    )


def methods() -> dict[str, type[Method[Any, Any]]]:
    """List all methods by name, those for one tokenizer last: the toolkit's, and those of plugins (`kd.plugins`)."""
    load_plugins()
    return dict(sorted(_METHODS.items(), key=lambda item: (item[1].same_tokenizer, item[0])))


def find_method(name: str) -> type[Method[Any, Any]]:
    """Find a method by its name or an alias; `_` and `-` are one. UnknownName, with the nearest."""
    known = methods()
    for method in known.values():
        if _canonical(name) in map(_canonical, (method.name, *method.aliases)):
            return method
    raise UnknownName("method", name, list(known))


def _no_outcomes(name: str) -> BadOption:
    with_outcomes = [each.name for each in methods().values() if each.compare is not Method.compare]
    without = [each for each in methods() if each not in with_outcomes]
    allowed = (
        f"one that compares distributions over student tokens: {', '.join(with_outcomes)}; "
        f"{', '.join(without)} have no outcomes there"
    )
    return BadOption("method", name, allowed)


def _canonical(name: str) -> str:
    return name.replace("_", "-")


def _check_definition(method: type[Method[Any, Any]]) -> None:
    """Refuse a name that another class has, and a colour that no figure can draw. CdmError."""
    other = _METHODS.get(method.name)
    named = f"the method {method.name!r} ({method.__module__}.{method.__qualname__})"
    if other is not None and (other.__module__, other.__qualname__) != (
        method.__module__,
        method.__qualname__,
    ):
        there = f"{other.__module__}.{other.__qualname__}"
        raise CdmError(f"{named} has the name of another", got=there, fix="give it a name of its own")
    if method.color is not None and not re.fullmatch("#[0-9a-fA-F]{6}", method.color):
        raise CdmError(f"{named} has the color {method.color!r}", fix="give #rrggbb, or leave it out")


def as_buffer(ids: Any) -> Tensor:
    """Make a table of ids: int64 on the CPU."""
    return torch.as_tensor(ids, dtype=torch.int64)
