"""Encode plain values as text, so that the results of an untrusted program are only data.

None, booleans, numbers, strings, bytes, and lists, tuples, sets and dictionaries of them, as JSON in which every array
starts with the name of its type. Decoding creates values of exactly these types, without methods of the program.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

MAX_DEPTH = 100
EXACT_IN_JSON = 2**53
_SEQUENCES: Mapping[str, Callable[[Iterable[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}


class NotPlainError(ValueError):
    """Raised for a value that is not plain, or a text that does not encode one."""


def encode(value: object) -> str:
    """Encode a value as one line of ASCII. An instance of a subclass of a plain type is encoded as the plain type.

    Raises NotPlainError.

    >>> decode(encode((1, {"a": {2.5}, "b": b"x"})))
    (1, {'a': {2.5}, 'b': b'x'})
    """
    return json.dumps(_tagged(value, 0))


def decode(text: str | bytes) -> Any:
    """Decode the output of `encode`. Raises NotPlainError."""
    try:
        return _value(json.loads(text), 0)
    except NotPlainError:
        raise
    except (ValueError, TypeError, RecursionError, MemoryError, OverflowError) as error:
        raise NotPlainError(f"it is no encoded value: {type(error).__name__}") from None


def _tagged(value: object, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise NotPlainError(f"it is nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        # In base 16, because Python limits the length of integers in base 10.
        exact = int.__int__(value)
        return exact if abs(exact) < EXACT_IN_JSON else ["int", hex(exact)]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", float.hex(value.real), float.hex(value.imag)]
    if isinstance(value, bytes):
        return ["bytes", bytes.hex(value)]
    if isinstance(value, dict):
        pairs = dict.items(value)
        return ["dict", *([_tagged(key, depth + 1), _tagged(item, depth + 1)] for key, item in pairs)]
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):  # type: ignore[arg-type]
            return [name, *(_tagged(item, depth + 1) for item in value)]  # type: ignore[attr-defined]
    raise NotPlainError(f"{type(value).__name__} is no plain value")


def _value(tagged: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise NotPlainError(f"it is nested more than {MAX_DEPTH} deep")
    if tagged is None or type(tagged) in (bool, int, str):
        return tagged
    if type(tagged) is not list or not tagged or type(tagged[0]) is not str:
        raise NotPlainError("it is no encoded value")
    kind, *parts = tagged
    if kind in _SEQUENCES:
        return _SEQUENCES[kind]([_value(part, depth + 1) for part in parts])
    if kind == "dict":
        return {_value(key, depth + 1): _value(item, depth + 1) for key, item in parts}
    if kind == "int":
        (digits,) = parts
        return int(digits, 16)
    if kind == "float":
        return float.fromhex(*parts)
    if kind == "complex":
        real, imaginary = parts
        return complex(float.fromhex(real), float.fromhex(imaginary))
    if kind == "bytes":
        return bytes.fromhex(*parts)
    raise NotPlainError("it is no encoded value")
