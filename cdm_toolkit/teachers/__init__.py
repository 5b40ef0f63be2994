"""Where a teacher's signal comes from: a model in memory, a cache of log-probabilities, or a server.

Every teacher has `signal(batch, request) -> TeacherSignal` (`kd.Teacher`), so that any method works with each.
"""

from cdm_toolkit.teachers.cached import Cached, open_cache
from cdm_toolkit.teachers.local import Local
from cdm_toolkit.teachers.scoring_client import ServerSettings
from cdm_toolkit.teachers.served import Served, connect

__all__ = ["Cached", "Local", "Served", "ServerSettings", "connect", "open_cache"]
