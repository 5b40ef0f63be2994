"""Load a tokenizer by alias, path or hub id."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdm_toolkit.errors import FileProblem, UnsupportedTokenizer
from cdm_toolkit.hub.resolve import Resolved, resolve
from cdm_toolkit.tokdiff.roles import MAP_ROLES
from cdm_toolkit.tokdiff.view import TokenizerView, make_view, view_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A tokenizer as this toolkit's view and as transformers' object, which share no state."""

    view: TokenizerView
    tokenizer: PreTrainedTokenizerFast
    source: Resolved


def load_view(name: str) -> TokenizerView:
    """Load a tokenizer's view; transformers is imported only if there is no usable tokenizer.json.

    Raises SourceNotFound, UnsupportedTokenizer, FileProblem, and what `resolve` raises.
    """
    return view_from(resolve(name))


def view_from(source: Resolved) -> TokenizerView:
    """Load the view of a tokenizer whose files were found before. Raises UnsupportedTokenizer and FileProblem."""
    return _view(source.name, source.folder)


def load_tokenizer(name: str) -> Loaded:
    """Load a tokenizer as a view and as transformers' object. Raises as `load_view`.

    tokenizer.json is loaded unchanged: transformers' tokenizer classes for some families replace parts of it
    (LlamaTokenizer replaces the normalizer, and then splits a leading space differently).
    """
    source = resolve(name)
    tokenizer = _fast_tokenizer(name, source.folder)
    return Loaded(view_of(tokenizer, name), tokenizer, source)


def _view(name: str, folder: Path) -> TokenizerView:
    file = folder / "tokenizer.json"
    config = _read_json(folder / "tokenizer_config.json") | _read_json(folder / "special_tokens_map.json")
    special_map = {key: _content(config[key]) for key in MAP_ROLES if config.get(key)}
    if file.is_file():
        from tokenizers import Tokenizer

        try:
            backend = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise UnsupportedTokenizer(name, f"{file} is damaged: {error}", "fetch it again") from None
        if all(backend.token_to_id(content) is not None for content in special_map.values()):
            return make_view(name, backend, special_map)
    # transformers converts other formats, and adds special tokens that are only in the configuration.
    return make_view(name, _copied(_fast_tokenizer(name, folder)), special_map)


def _content(token: str | dict[str, Any]) -> str:
    """Return a special token's text, which configurations hold as a string or as an AddedToken."""
    return token if isinstance(token, str) else str(token["content"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise FileProblem(path, f"cannot be read: {error}", "fetch it again") from None


def _fast_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loader = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # many types, depending on the tokenizer class
        raise UnsupportedTokenizer(name, " ".join(str(error).split())[:200]) from None
    if not tokenizer.is_fast:
        raise UnsupportedTokenizer(name, f"{type(tokenizer).__name__} has no fast backend")
    return tokenizer


def _copied(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Copy the backend: transformers sets truncation and padding on its own at every call."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
