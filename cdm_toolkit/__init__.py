"""Distill one language model into another that has a different tokenizer.

Three names are enough to look at two tokenizers from Python: `load_view` reads one, `align_text` aligns two over a
text, `token_groups` walks the groups.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdm_toolkit.alignment.aligners import align_text, token_groups
    from cdm_toolkit.hub.tokenizers import load_view

__all__ = ["__version__", "align_text", "load_view", "token_groups"]

try:
    __version__ = version("cdm-toolkit")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

# Loaded at first use: importing the package alone stays light.
_HOMES = {
    "align_text": "cdm_toolkit.alignment.aligners",
    "load_view": "cdm_toolkit.hub.tokenizers",
    "token_groups": "cdm_toolkit.alignment.aligners",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
