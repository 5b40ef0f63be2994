"""The exact bytes of each vocabulary id, read from a tokenizer's own description.

A description is the parsed `tokenizer.json`, as returned by `tokenizers.Tokenizer.to_str()`. How the strings of a
vocabulary encode bytes follows from the model, normalizer, pre-tokenizer and decoder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cdm_toolkit.errors import UnsupportedTokenizer

Description = Mapping[str, Any]

MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")
WORD_MARK = "▁"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the strings of a vocabulary encode bytes, and what is done to a text before it is split."""

    model: str
    normalizers: tuple[str, ...]
    pre_tokenizers: tuple[str, ...]
    decoders: tuple[str, ...]
    byte_level: bool
    """Strings use GPT-2's alphabet, one character per byte."""
    word_mark: str
    """The character that represents a space, such as `▁`; empty where spaces are written as they are."""
    byte_fallback: bool
    """`<0x41>` is the byte 41."""
    affixes: tuple[str, str]
    """Prefix of a word-internal piece (`##`) and suffix of a word-final piece (`</w>`): not part of the bytes."""
    dummy_prefix: bytes
    """What the tokenizer prepends to a text that does not begin with it."""

    @property
    def family(self) -> str:
        """Name the kind of vocabulary."""
        if self.model == "BPE":
            return "byte-level BPE" if self.byte_level else "SentencePiece BPE" if self.word_mark else "BPE"
        return self.model


def parts(component: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield a component of a description, with nested Sequences flattened, in order."""
    if component is None:
        return
    if component["type"] == "Sequence":
        for key in ("normalizers", "pretokenizers", "decoders", "processors"):
            for part in component.get(key) or ():
                yield from parts(part)
    else:
        yield component


def _replaced(part: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the string that a Replace searches for (None for a regex) and its replacement."""
    return part["pattern"].get("String"), part["content"]


def _word_mark(normalizers: list[Any], pre_tokenizers: list[Any], decoders: list[Any]) -> str:
    for part in (*pre_tokenizers, *decoders):
        if part["type"] == "Metaspace":
            return str(part["replacement"])
    for part in decoders:
        if part["type"] == "Replace" and part["content"] == " " and _replaced(part)[0]:
            return str(_replaced(part)[0])
    return next((c for p in normalizers if p["type"] == "Replace" for s, c in [_replaced(p)] if s == " "), "")


def _prepends_blank(part: Mapping[str, Any], word_mark: str) -> bool:
    match part["type"]:
        case "Prepend":
            return bool(part["prepend"] in (word_mark, " "))
        case "Metaspace":  # files from before tokenizers 0.15 have add_prefix_space instead
            scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space") else "never")
            return bool(scheme != "never")
        case "ByteLevel":
            return bool(part.get("add_prefix_space"))
    return False


def scheme_of(description: Description, *, name: str = "tokenizer") -> Scheme:
    """Read a description's scheme.

    Raises UnsupportedTokenizer where it does not determine the bytes of the strings.
    """
    try:
        model = description["model"]
        kind = model.get("type") or ("Unigram" if isinstance(model["vocab"], list) else "BPE")
        groups = [list(parts(description.get(k))) for k in ("normalizer", "pre_tokenizer", "decoder")]
    except (KeyError, TypeError, AttributeError) as error:
        raise UnsupportedTokenizer(name, f"its description has no {error}") from None
    normalizers, pre_tokenizers, decoders = groups
    types = [tuple(str(part["type"]) for part in group) for group in groups]
    byte_level = any("ByteLevel" in group for group in types)
    word_mark = "" if byte_level else _word_mark(normalizers, pre_tokenizers, decoders)
    if kind not in MODELS:
        raise UnsupportedTokenizer(name, f"its model is {kind}, known are {', '.join(MODELS)}")
    if "CTC" in types[2] or (byte_level and any("Metaspace" in group for group in types)):
        raise UnsupportedTokenizer(name, f"its decoder is {' + '.join(types[2])}")
    fallback = "ByteFallback" in types[2] or bool(model.get("byte_fallback"))
    if kind == "BPE" and not (byte_level or fallback or model.get("unk_token")):
        # The library then counts offsets as if the unknown characters were not in the text.
        why = "its model drops characters that it does not know, and reports wrong offsets where it did"
        raise UnsupportedTokenizer(name, why, "give its model an unk_token")
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    return Scheme(
        model=kind,
        normalizers=types[0],
        pre_tokenizers=types[1],
        decoders=types[2],
        byte_level=byte_level,
        word_mark=word_mark,
        byte_fallback=fallback and not byte_level,
        affixes=(prefix, suffix),
        dummy_prefix=b" "
        if any(_prepends_blank(p, word_mark) for p in normalizers + pre_tokenizers)
        else b"",
    )


def gpt2_alphabet() -> dict[str, int]:
    """Map the characters of GPT-2's byte-level alphabet to bytes.

    >>> gpt2_alphabet()["Ġ"], gpt2_alphabet()["A"]
    (32, 65)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level_reader() -> Callable[[str], bytes]:
    # Characters below U+0100 outside the alphabet must not be read as bytes: map them to one that latin-1 rejects.
    table = dict.fromkeys(range(256), 0xFFFF) | {ord(char): byte for char, byte in gpt2_alphabet().items()}

    def read(token: str) -> bytes:
        try:
            return token.translate(table).encode("latin-1")
        except UnicodeEncodeError:  # not in the alphabet: the decoder keeps it as text
            return token.encode()

    return read


def reader_of(scheme: Scheme) -> Callable[[str], bytes]:
    """Return the function from a vocabulary string to its bytes.

    >>> read = reader_of(scheme_of({"model": {"type": "BPE", "byte_fallback": True}, "decoder": {"type":
    ...     "Metaspace", "replacement": "▁"}}))
    >>> read("▁the"), read("<0xE2>")
    (b' the', b'\\xe2')
    """
    prefix, suffix = scheme.affixes
    if scheme.byte_level:
        read = _byte_level_reader()
        return (lambda token: read(token.removesuffix(suffix))) if suffix else read
    mark, fallback = scheme.word_mark, scheme.byte_fallback

    def read_plain(token: str) -> bytes:
        if fallback and _BYTE_TOKEN.fullmatch(token):
            return bytes((int(token[3:5], 16),))
        token = token.removeprefix(prefix).removesuffix(suffix)
        return (token.replace(mark, " ") if mark else token).encode()

    return read_plain


def vocabulary(description: Description) -> dict[str, int]:
    """Return the model's vocabulary as string -> id, without added tokens."""
    vocab = description["model"]["vocab"]
    return dict(vocab) if isinstance(vocab, Mapping) else {piece: i for i, (piece, _) in enumerate(vocab)}


def token_bytes(description: Description, *, name: str = "tokenizer") -> tuple[bytes | None, ...]:
    """Return the bytes of every id; None for special tokens and unused ids.

    The bytes of a non-special added token are its content. Raises UnsupportedTokenizer.
    """
    read = reader_of(scheme_of(description, name=name))
    vocab = vocabulary(description)
    added = description.get("added_tokens") or ()
    size = 1 + max(max(vocab.values(), default=-1), max((t["id"] for t in added), default=-1))
    table: list[bytes | None] = [None] * size
    for token, token_id in vocab.items():
        table[token_id] = read(token)
    for token in added:
        if token["special"]:
            table[token["id"]] = None
        elif vocab.get(token["content"]) != token["id"]:
            # A token that the model's vocabulary has too keeps the bytes of its vocabulary string.
            table[token["id"]] = token["content"].encode()
    return tuple(table)
