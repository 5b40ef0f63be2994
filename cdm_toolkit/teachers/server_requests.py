"""What clients of servers share: the key, and which failures pass."""

from __future__ import annotations

import os

from cdm_toolkit.errors import BadOption


class Failed(Exception):
    """A request that may go better another time."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def is_retryable(status: int) -> bool:
    """Say whether a request that was answered with an HTTP status may go better another time."""
    return status >= 500 or status in (408, 425, 429)


def key_header(variable: str | None) -> dict[str, str]:
    """Give the header with the key that an environment variable holds. BadOption where it is not set."""
    if variable is None:
        return {}
    key = os.environ.get(variable, "").strip()
    if not (key and key.isascii() and key.isprintable()):
        allowed = "the name of an environment variable that is set, to a key in ASCII"
        raise BadOption("api_key_env", variable, allowed)
    return {"Authorization": f"Bearer {key}"}


def why(error: BaseException | None) -> str:
    """Say in a few words why a connection failed: the system's reason, where there is one."""
    said = str(error) or type(error).__name__
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return os.strerror(error.errno).lower() if error.errno > 0 else str(error.strerror)
        inner = getattr(error, "exceptions", None)
        error = inner[0] if inner else error.__cause__ or error.__context__
    return said
