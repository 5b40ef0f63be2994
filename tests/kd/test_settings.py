"""Settings of methods: defaults, bounds, choices, numbers as texts, and faults all at once."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest

from cdm_toolkit.errors import BadSettings, UnknownName
from cdm_toolkit.kd import CDM, GOLD, MethodSettings, Spelling, TokenizerPair, find_method, methods, setting
from cdm_toolkit.kd.cdm import CDMSettings
from cdm_toolkit.kd.settings import DEFAULT_TOP_K, Faults, Positions, fields_of
from cdm_toolkit.kd.uld import ULDSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Every(MethodSettings):
    """Settings of each kind."""

    share: float = setting(0.5, "Between two bounds.", above=0, below=1)
    count: int = setting(3, "A whole number.", at_least=1)
    most: int | None = setting(None, "A number or none.", at_least=1)
    flag: bool = setting(True, "One or the other.")
    positions: Positions = setting("boundary", "One of a few.")


def fault(**given: Any) -> str:
    with pytest.raises(BadSettings) as caught:
        Every.make(given, source="every")
    (found,) = caught.value.faults
    return found


def test_defaults_are_without_fault() -> None:
    for kind in methods().values():
        assert kind.Settings() == kind.Settings.make({}, source=kind.name)


def test_fields_say_what_they_are() -> None:
    share, count, most, flag, positions = fields_of(Every)
    assert (share.name, share.default, share.about, share.kind) == (
        "share",
        0.5,
        "Between two bounds.",
        float,
    )
    assert str(share.bounds) == "a number above 0 and below 1"
    assert str(count.bounds) == "a number of at least 1"
    assert (most.default, most.kind) == (None, int | None)
    assert (flag.bounds, flag.choices) == (None, ())
    assert positions.choices == ("boundary", "mean")


@pytest.mark.parametrize("kind", methods().values(), ids=methods())
def test_each_setting_of_a_method_has_a_sentence_and_is_a_keyword(kind: type) -> None:
    found = fields_of(kind.Settings)
    assert all(field.about.endswith(".") for field in found)
    parameters = inspect.signature(kind).parameters
    assert list(parameters) == ["pair", *(field.name for field in found)]
    assert all(parameters[field.name].default == field.default for field in found)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"share": 0}, "share is 0: give a number above 0 and below 1"),
        ({"share": 1}, "share is 1: give a number above 0 and below 1"),
        ({"share": "much"}, "share is 'much': give a number"),
        ({"share": "nan"}, "share is 'nan': give a finite number"),
        ({"share": True}, "share is True: give a number"),
        ({"share": None}, "share is nothing: give a number"),
        ({"count": 0}, "count is 0: give a number of at least 1"),
        ({"count": 2.5}, "count is 2.5: give a whole number"),
        ({"count": [1]}, "count is [1]: give a whole number"),
        ({"most": 0}, "most is 0: give a number of at least 1"),
        ({"flag": "perhaps"}, "flag is 'perhaps': give true or false"),
        ({"flag": 1}, "flag is 1: give true or false"),
        ({"positions": "means"}, "positions is 'means': give one of boundary, mean (did you mean mean?)"),
        ({"positions": 5}, "positions is 5: give one of boundary, mean"),
        ({"shere": 0.5}, "shere is no setting, did you mean share?"),
        ({"x": 1}, "x is no setting, known: share, count, most, flag, positions"),
    ],
)
def test_a_value_outside_what_it_can_be(given: dict[str, Any], said: str) -> None:
    assert fault(**given) == said


def test_numbers_may_be_texts() -> None:
    """YAML reads 1e-1 as a text."""
    made = Every.make({"share": "1e-1", "count": "7", "most": 5.0}, source="every")
    assert (made.share, made.count, made.most) == (0.1, 7, 5)
    assert [type(value) for value in (made.share, made.count, made.most)] == [float, int, int]
    assert type(CDMSettings(temperature=2).temperature) is float
    assert Every.make({"most": None}, source="every").most is None


def test_all_faults_are_listed_at_once() -> None:
    with pytest.raises(BadSettings) as caught:
        Every.make({"share": 2, "count": "many", "flg": True}, source="every")
    assert str(caught.value) == (
        "every has 3 faults: share is 2: give a number above 0 and below 1; count is 'many': give a whole number; "
        "flg is no setting, did you mean flag?; mend them and run again"
    )
    with pytest.raises(Faults, match=r"share is 2.*count is 0"):
        Every(share=2, count=0)


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        ULDSettings().temperature = 2.0  # type: ignore[misc]


def test_a_method_says_all_that_is_wrong_with_its_settings(two: TokenizerPair) -> None:
    with pytest.raises(BadSettings) as caught:
        CDM(two, temprature=1.0, max_edit_distance=1, positions="first")
    assert str(caught.value) == (
        "cdm has 3 faults: temprature is no setting, did you mean temperature?; max_edit_distance is 1: give a "
        "number above 0 and below 1; positions is 'first': give one of boundary, mean; mend them and run again"
    )
    with pytest.raises(BadSettings, match="gold has a fault: beta is 0: give a number above 0 and below 1"):
        GOLD(two, beta=0)


def test_a_method_keeps_its_settings(two: TokenizerPair) -> None:
    method = Spelling(two, temperature="2", intra_group=False)
    assert (method.settings.temperature, method.settings.intra_group) == (2.0, False)
    assert method.top_k == DEFAULT_TOP_K == 100


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("em", "exact"),
        ("exact-match", "exact"),
        ("exact_match", "exact"),
        ("mined", "min-ed"),
        ("min_ed", "min-ed"),
        ("reverse_kl", "reverse-kl"),
        ("spelling", "spelling"),
    ],
)
def test_names_and_aliases(given: str, name: str) -> None:
    assert find_method(given).name == name


def test_an_unknown_method() -> None:
    with pytest.raises(UnknownName, match="unknown method 'speling'; did you mean spelling"):
        find_method("speling")
