"""What methods share that compare the likelihoods of whole groups: the tokens that are read, and their sums."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from cdm_toolkit.kd.divergences import group_sums
from cdm_toolkit.kd.types import LogprobRequest, StudentLogits, TeacherSignal


def every_token(student: StudentLogits) -> LogprobRequest[Tensor]:
    """Ask for the log-probability of each student token of the groups; the state has the group of each."""
    assert student.token_rows is not None
    assert student.token_ids is not None
    assert student.token_group is not None
    return LogprobRequest(student.token_rows, student.token_ids, student.token_group)


def log_likelihoods(
    logprobs: Float[Tensor, " pick"], request: LogprobRequest[Tensor], signal: TeacherSignal
) -> tuple[Float[Tensor, " group"], Float[Tensor, " group"]]:
    """Sum up the log-probabilities of each group's tokens, the teacher's and the student's."""
    assert signal.token_logprobs is not None
    assert signal.token_group is not None
    groups = len(signal.top.ids)
    of_teacher = group_sums(signal.token_logprobs, signal.token_group, groups)
    return of_teacher, group_sums(logprobs, request.state, groups)
