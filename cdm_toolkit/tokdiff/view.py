"""The toolkit's view of a tokenizer: bytes of each id, roles of special tokens, byte spans of encoded texts."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from cdm_toolkit.errors import BadText, UnknownTokenId, UnsupportedTokenizer
from cdm_toolkit.tokdiff.roles import roles_of
from cdm_toolkit.tokdiff.spans import TokenSpans, does_not_spell, span_ids, span_tokens
from cdm_toolkit.tokdiff.token_bytes import Description, parts, scheme_of, token_bytes, vocabulary
from cdm_toolkit.tokdiff.vocabulary import SpecialToken, Vocabulary


@runtime_checkable
class Backend(Protocol):
    """The parts of `tokenizers.Tokenizer` that a view uses."""

    def to_str(self, pretty: bool = False) -> str: ...
    def encode(self, sequence: Any, *, add_special_tokens: bool = True) -> Any: ...
    def encode_batch(self, input: Any, *, add_special_tokens: bool = True) -> list[Any]: ...

    post_processor: Any

    def no_truncation(self) -> None: ...
    def no_padding(self) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class TokenizerView(Vocabulary):
    """Hold a tokenizer's vocabulary as bytes, and encode texts into spans."""

    backend: Backend = field(repr=False, kw_only=True)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> TokenSpans:
        """Tokenize a text. Raises BadText for a text with lone surrogates."""
        text_bytes = utf8(text)
        encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        return span_tokens(self, text, text_bytes, encoding)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[TokenSpans]:
        """Tokenize several texts on all cores; same result as `encode` of each. Raises BadText."""
        many_bytes = [utf8(text) for text in texts]
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [span_tokens(self, *each) for each in zip(texts, many_bytes, encodings, strict=True)]

    def spans_of(self, text: str, ids: Sequence[int]) -> TokenSpans:
        """Find the spans of given ids in the text that they encode.

        Special tokens that are not in the text are zero-width.
        Raises BadText, UnknownTokenId, DoesNotSpell.
        """
        text_bytes = utf8(text)
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise UnknownTokenId(self.name, int(token_id), self.vocab_size)
        given = [int(token_id) for token_id in ids]
        spans = span_ids(self, text_bytes, given)
        return self._reencoded(text, text_bytes, given) if spans is None else spans

    def _reencoded(self, text: str, text_bytes: bytes, ids: list[int]) -> TokenSpans:
        """Place ids that do not spell the text, but are what the tokenizer makes of it."""
        for add_special_tokens in (False, True):
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
            if encoding.ids == ids:
                return span_tokens(self, text, text_bytes, encoding)
        raise does_not_spell(self, text_bytes, ids)


def utf8(text: str) -> bytes:
    """Encode a text. Raises BadText where it has lone surrogates."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        problem = f"has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        raise BadText(problem, "remove it, or decode the source with errors='replace'") from None


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Pause the garbage collector: a vocabulary is a million objects, all live, and making them takes a third less."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def make_view(name: str, backend: Backend, special_map: Mapping[str, str] | None = None) -> TokenizerView:
    """Make the view of a tokenizer.

    `special_map` gives bos_token, eos_token, ... as in `tokenizer_config.json`. The view owns the backend from
    then on: truncation, padding and the trimming of offsets are turned off. Raises UnsupportedTokenizer.
    """
    try:
        described = backend.to_str()
    except Exception as error:  # plain Exception is what the library raises for parts written in Python
        raise UnsupportedTokenizer(name, f"it does not describe itself: {error}") from None
    return _view_as_described(name, backend, described, special_map or {})


@_garbage_collection_paused()
def _view_as_described(
    name: str, backend: Backend, described: str, special_map: Mapping[str, str]
) -> TokenizerView:
    """Make the view of a tokenizer from what its `to_str` gives."""
    description: Description = json.loads(described)
    backend.no_truncation()
    backend.no_padding()
    _disable_offset_trimming(backend, description)
    scheme = scheme_of(description, name=name)
    table = list(token_bytes(description, name=name))
    special = {}
    contents = {}
    for token in description["added_tokens"]:
        roles = roles_of(token["content"], special_map)
        # DeepSeek's turn markers are added tokens that are not flagged as special.
        if (
            token["special"]
            or token["content"] in special_map.values()
            or {"turn_start", "turn_end"} & set(roles)
        ):
            special[token["id"]] = SpecialToken(
                token["id"], token["content"], roles[0] if roles else None, frozenset(roles)
            )
            contents[token["id"]] = token["content"].encode()
            table[token["id"]] = None
    is_special = np.zeros(len(table), bool)
    is_special[list(special)] = True
    return TokenizerView(
        name=name,
        family=scheme.family,
        token_bytes=tuple(table),
        special=special,
        fingerprint=fingerprint(description, special),
        backend=backend,
        scheme=scheme,
        literals=tuple(contents.get(i, b"") if token is None else token for i, token in enumerate(table)),
        is_special=is_special,
        dropped_bytes=bytes(set(range(256)) - {token[0] for token in table if token and len(token) == 1})
        if scheme.byte_level
        else b"",
    )


def view_of(tokenizer: Any, name: str) -> TokenizerView:
    """Make the view of a fast tokenizer of transformers, which shares no state with it.

    Its backend is copied: transformers sets truncation and padding on it at every call. UnsupportedTokenizer for
    a slow tokenizer.
    """
    from tokenizers import Tokenizer

    if not getattr(tokenizer, "is_fast", False):
        fix = "load it with use_fast=True, or use a tokenizer that has a tokenizer.json"
        raise UnsupportedTokenizer(name, f"{type(tokenizer).__name__} has no fast backend", fix)
    special = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    described = tokenizer.backend_tokenizer.to_str()
    return _view_as_described(name, Tokenizer.from_str(described), described, special)


def _disable_offset_trimming(backend: Backend, description: Description) -> None:
    """Have blanks counted in: trimmed offsets are wrong behind a dummy prefix that is not at the front."""
    processor = description.get("post_processor")
    if not any(part.get("trim_offsets") for part in parts(processor)):
        return
    from tokenizers import Tokenizer

    untrimmed = json.loads(
        json.dumps(processor),
        object_hook=lambda part: part | {"trim_offsets": False} if "trim_offsets" in part else part,
    )
    model = {"type": "BPE", "vocab": {}, "merges": []}
    minimal = {"added_tokens": [], "model": model, "post_processor": untrimmed}
    backend.post_processor = Tokenizer.from_str(json.dumps(minimal)).post_processor


def _pruned(value: Any) -> Any:
    """Drop null, false and empty values, so that new optional fields of the format do not change fingerprints."""
    if isinstance(value, Mapping):
        pruned = {key: _pruned(inner) for key, inner in value.items()}
        return {key: inner for key, inner in pruned.items() if inner or type(inner) is int}
    return [_pruned(inner) for inner in value] if isinstance(value, list) else value


def fingerprint(description: Description, special: Mapping[int, SpecialToken]) -> str:
    """Hash the canonical form of a description and of the special tokens' roles."""
    model = dict(description["model"])
    vocab = model.pop("vocab")
    if isinstance(vocab, Mapping):
        vocab = sorted(vocabulary(description).items(), key=lambda item: item[1])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.pop("merges", ())]
    left_out = ("model", "truncation", "padding", "version", "post_processor")
    rest = _pruned({key: value for key, value in description.items() if key not in left_out})
    roles = [[token.id, token.content, sorted(token.roles)] for token in special.values()]
    canonical = [_pruned(model), rest, _adds_specials(description), sorted(roles), vocab, merges]
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()


def _adds_specials(description: Description) -> list[Any]:
    """Return the parts of the post-processor that add special tokens; the others only affect offsets.

    A template without special tokens is left out: transformers writes one where there was no post-processor.
    """
    processors = [part for part in parts(description.get("post_processor")) if part["type"] != "ByteLevel"]
    adding = [part for part in processors if part["type"] != "TemplateProcessing" or part["special_tokens"]]
    return [_pruned({key: value for key, value in part.items() if key != "trim_offsets"}) for part in adding]
