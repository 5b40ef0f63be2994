"""Tensors that pass between a teacher, the student and a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

from jaxtyping import Bool, Float, Int64
from torch import Tensor

State = TypeVar("State")

NOT_USED: Any = None
"""State of a method that carries nothing from `select` to `loss`."""


@dataclass(frozen=True, slots=True, eq=False)
class TopK:
    """The k most likely ids at each group, most likely first, with log-probabilities over the whole vocabulary."""

    ids: Int64[Tensor, "group topk"]
    logprobs: Float[Tensor, "group topk"]

    def at(self, rows: Int64[Tensor, " row"]) -> TopK:
        """Take some rows."""
        return TopK(self.ids.index_select(0, rows), self.logprobs.index_select(0, rows))


@dataclass(frozen=True, slots=True, eq=False)
class TeacherSignal:
    """What a teacher predicts for the groups of a batch, in one flat list; detached from the teacher's graph.

    `top` is the distribution of the token that follows the shared boundary before each group, or the one of the
    group's mean logits. `token_logprobs` are the log-probabilities of the teacher's tokens in the groups, each
    given all tokens before it; `token_group` is the group of each of them, ascending, and `token_ids` are the
    tokens. `token_top` has the candidates at each of them. Methods that do not read these leave them None.
    """

    top: TopK
    token_logprobs: Float[Tensor, " token_t"] | None = None
    token_group: Int64[Tensor, " token_t"] | None = None
    token_ids: Int64[Tensor, " token_t"] | None = None
    token_top: TopK | None = None

    def detach(self) -> TeacherSignal:
        """Cut the signal off from gradients."""
        return self._with_each(Tensor.detach)

    def to(self, device: Any) -> TeacherSignal:
        """Move the tensors to a device."""
        return self._with_each(lambda tensor: tensor.to(device))

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> TeacherSignal:
        return TeacherSignal(*(_changed(getattr(self, each.name), change) for each in fields(self)))


def _changed(part: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(part, TopK):
        return TopK(change(part.ids), change(part.logprobs))
    return None if part is None else change(part)


@dataclass(frozen=True, slots=True)
class SignalRequest:
    """What a method needs of a teacher: what it reads is all that a teacher has to compute, send or keep."""

    top_k: int
    token_logprobs: bool = False
    """Log-probabilities of the tokens in the groups as well."""
    mean_logits: bool = False
    """Top k of the mean of a group's logits, in place of those at its first token: needs whole logits."""
    token_top: bool = False
    """The top k at each of these tokens too."""


@dataclass(frozen=True, slots=True, eq=False)
class StudentLogits:
    """Detached student logits at the groups of a batch, used to select candidates.

    Group g is predicted by row `rows[g]` of `logits`. The first `vocab` columns belong to ids of the student's
    tokenizer; columns after them are padding of the embedding. `lse` is the log-sum-exp of each row over all
    columns. `token_rows` are the rows that predict the student's tokens in the groups, `token_ids` those tokens
    and `token_group` the group of each, ascending; `follows` marks groups that begin where the one before ends, in
    the same text. All are None for methods that do not read tokens.
    """

    logits: Float[Tensor, "row vocab_s"]
    lse: Float[Tensor, " row"]
    rows: Int64[Tensor, " group"]
    vocab: int
    token_rows: Int64[Tensor, " token_s"] | None = None
    token_ids: Int64[Tensor, " token_s"] | None = None
    token_group: Int64[Tensor, " token_s"] | None = None
    follows: Bool[Tensor, " group"] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LogprobRequest(Generic[State]):
    """Student log-probabilities that a method wants: log softmax(logits)[rows, ids], as one flat list.

    Methods request log-probabilities instead of computing them, so that the labels and all teachers share one
    pass over the logits and one gradient tensor. `state` is what `Method.select` hands on to `Method.loss`.
    """

    rows: Int64[Tensor, " pick"]
    ids: Int64[Tensor, " pick"]
    state: State

    @classmethod
    def at_groups(
        cls, student: StudentLogits, ids: Int64[Tensor, "group pick"], state: State
    ) -> LogprobRequest[State]:
        """Request the same number of ids at each group."""
        return cls(student.rows.repeat_interleave(ids.shape[1]), ids.flatten(), state)


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """What a method compares at each position: outcomes over student ids, and their divergence.

    `rows` are rows of the logits that the student was read in, `ids` the outcomes' student ids, −1 where there is
    none. `teacher` and `student` are their log-probabilities before any temperature, where an outcome may have
    those of other ids added to its own. What is on no outcome is one more, where the method compares that.
    """

    rows: Int64[Tensor, " position"]
    ids: Int64[Tensor, "position outcome"]
    teacher: Float[Tensor, "position outcome"]
    student: Float[Tensor, "position outcome"]
    divergence: Float[Tensor, " position"]
    """As the loss sums it up, in nats where the method is a KL."""


@dataclass(frozen=True, slots=True, eq=False)
class KDSums:
    """Sums over the groups of a batch, so that batches add up whatever their sizes. All are scalars.

    `kd` carries the gradient. `matched_mass` is the teacher's probability on ids that have a match in the
    student's vocabulary, `pairs` the number of these ids; methods without a match (`uld`, `alm`) document what
    they count instead.
    """

    kd: Float[Tensor, ""]
    matched_mass: Float[Tensor, ""]
    pairs: Float[Tensor, ""]


@dataclass(frozen=True, slots=True, eq=False)
class LossSums:
    """Sums over a batch: cross-entropy in nats over its labels, and KD over the groups of each teacher.

    `label_logprobs`, detached, sum up to −`ce`: they tell which label is not finite.
    """

    ce: Float[Tensor, ""]
    kd: tuple[KDSums, ...]
    label_logprobs: Float[Tensor, " token"]


@dataclass(frozen=True, slots=True, eq=False)
class LossOutput:
    """Losses of a batch for one teacher, as means. All are scalars.

    `ce` is the cross-entropy in nats a label, `kd` the method's divergence a group, both differentiable.
    `matched_mass` is the mean teacher probability on matched ids and `pairs` their mean number, both detached.
    To accumulate over batches of different sizes add up `sums` and divide by the totals of `labels` and `groups`.
    """

    ce: Float[Tensor, ""]
    kd: Float[Tensor, ""]
    matched_mass: Float[Tensor, ""]
    pairs: Float[Tensor, ""]
    labels: int
    groups: int
    sums: LossSums = field(repr=False)


ModelInputs = Mapping[str, Tensor]
"""Keyword arguments of a causal model: input_ids, attention_mask and, padded on the left, position_ids."""
