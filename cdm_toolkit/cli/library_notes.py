"""Print the library's warnings as notes of the command line."""

from __future__ import annotations

import logging


class _Notes(logging.Handler):
    """Prints each record as one note; rich is loaded where there is one to print."""

    def emit(self, record: logging.LogRecord) -> None:
        from cdm_toolkit.cli import screen

        screen.warn(record.getMessage())


def start() -> None:
    """Print warnings of `cdm_toolkit` on stderr from here on."""
    logger = logging.getLogger("cdm_toolkit")
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes(logging.WARNING))
    # it warns of a faster kernel when it is imported, which transformers and peft do wherever it is installed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
