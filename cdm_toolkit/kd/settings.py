"""Settings of a method: frozen records whose fields have a default, a description and bounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cdm_toolkit.errors import BadSettings

Made = TypeVar("Made", bound="MethodSettings")

DEFAULT_TOP_K = 100
"""Candidates at a position where nothing else is set."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a number may be; None is no bound."""

    above: float | None = None
    below: float | None = None
    at_least: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.at_least is None or value >= self.at_least)
        )

    def __str__(self) -> str:
        words = {"above": self.above, "below": self.below, "of at least": self.at_least}
        return "a number " + " and ".join(
            f"{word} {bound:g}" for word, bound in words.items() if bound is not None
        )


@dataclass(frozen=True, slots=True)
class Field:
    """One setting of a method, for help texts, documentation and checks."""

    name: str
    default: Any
    about: str
    kind: Any
    bounds: Bounds | None

    @property
    def choices(self) -> tuple[Any, ...]:
        """Values of a setting that is one of a few."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one setting: `name` and `problem` read as one sentence."""

    name: str
    problem: str

    def __str__(self) -> str:
        return f"{self.name} {self.problem}"


class Faults(ValueError):
    """All that is wrong with some settings."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(map(str, faults)))
        self.faults = tuple(faults)


def setting(
    default: Any,
    about: str,
    *,
    above: float | None = None,
    below: float | None = None,
    at_least: float | None = None,
) -> Any:
    """Declare a setting: its default, one sentence about it, and its bounds."""
    bounds = Bounds(above, below, at_least)
    return dataclasses.field(
        default=default, metadata={"about": about, "bounds": None if bounds == Bounds() else bounds}
    )


def top_k_setting() -> Any:
    """Declare `top_k: int | None`."""
    about = f"Candidates of each model at a position; unset, {DEFAULT_TOP_K} or all that a smaller vocabulary has."
    return setting(None, about, at_least=1)


def temperature_setting() -> Any:
    """Declare `temperature: float`."""
    return setting(1.0, "Softmax temperature of both distributions; KD is multiplied by its square.", above=0)


def rest_bucket_setting() -> Any:
    """Declare `rest_bucket: bool`."""
    about = "Compare the unmatched probability as one more outcome; without it a single pair teaches nothing."
    return setting(True, about)


def positions_setting() -> Any:
    """Declare `positions: Positions`."""
    about = "Logits that stand for a group: boundary, those at the shared boundary before it; mean, their mean over it."
    return setting("boundary", about)


def beta_setting() -> Any:
    """Declare `beta: float`."""
    about = "Mixture weight of the generalised JSD: near 0 it is like KL, near 1 like reverse KL."
    return setting(0.5, about, above=0, below=1)


def divergence_setting() -> Any:
    """Declare `divergence: Divergence`."""
    about = "kl: KL(teacher ‖ student). reverse-kl: KL(student ‖ teacher), usual on samples of the student. jsd: the "
    return setting("kl", f"{about}generalised JSD, with `beta`.")


Positions = Literal["boundary", "mean"]
Divergence = Literal["kl", "reverse-kl", "jsd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSettings:
    """Base of the settings of methods. Values are checked on construction, all faults at once: `Faults`."""

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values, faults = checked(type(self), given)
        if faults:
            raise Faults(faults)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def make(cls: type[Made], given: Mapping[str, Any], *, source: str) -> Made:
        """Make settings of a mapping. BadSettings names `source` and all faults, unknown settings among them."""
        values, faults = checked(cls, given)
        if faults:
            raise BadSettings(source, [str(fault) for fault in faults])
        return cls(**values)


def fields_of(settings: type[MethodSettings]) -> tuple[Field, ...]:
    """List the settings of a method."""
    kinds = get_type_hints(settings)
    return tuple(
        Field(
            field.name,
            field.default,
            field.metadata.get("about", ""),
            kinds[field.name],
            field.metadata.get("bounds"),
        )
        for field in dataclasses.fields(settings)
    )


def checked(settings: type[MethodSettings], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """Give the values as their fields have them, and what is wrong: unknown names, types, bounds."""
    known = {field.name: field for field in fields_of(settings)}
    values: dict[str, Any] = {}
    faults: list[Fault] = []
    for name, value in given.items():
        if name not in known:
            faults.append(Fault(name, unknown_setting(name, list(known))))
            continue
        try:
            values[name] = _value(known[name], value)
        except ValueError as error:
            faults.append(Fault(name, f"is {_shown(value)}: give {error}"))
    return values, faults


def unknown_setting(name: str, known: list[str]) -> str:
    """Say of a name that it is no setting, and which is meant."""
    near = get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"
    return f"is no setting, {hint}"


def _value(field: Field, value: Any) -> Any:
    """Convert a value to a field's type; ValueError says what is wanted."""
    for kind in _kinds(field.kind):
        if kind is NoneType and value is None:
            return None
    found = _converted(next(kind for kind in _kinds(field.kind) if kind is not NoneType), value)
    if field.bounds is not None and found not in field.bounds:
        raise ValueError(str(field.bounds))
    return found


def _kinds(kind: Any) -> Iterator[Any]:
    yield from get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _converted(kind: Any, value: Any) -> Any:
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        near = get_close_matches(str(value), [str(choice) for choice in get_args(kind)], n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"one of {', '.join(map(str, get_args(kind)))}{hint}")
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise ValueError("true or false")
    if kind is str:
        if isinstance(value, str):
            return value
        raise ValueError("a text")
    return _number(kind, value)


def _number(kind: type[int] | type[float], value: Any) -> int | float:
    """Convert a number, or the text of one: YAML reads 1e-5 as text."""
    wanted = "a whole number" if kind is int else "a number"
    try:
        found = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = None
    if found is None or (kind is int and not found.is_integer()):
        raise ValueError(wanted)
    if not math.isfinite(found):
        raise ValueError("a finite number")
    return kind(found)


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:60]
