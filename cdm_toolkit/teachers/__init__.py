"""Where a teacher's signal comes from: a model in memory, or a cache of log-probabilities.

Every teacher has `signal(batch, request) -> TeacherSignal` (`kd.Teacher`), so that any method works with each.
"""

from cdm_toolkit.teachers.cached import Cached, open_cache
from cdm_toolkit.teachers.local import Local

__all__ = ["Cached", "Local", "open_cache"]
