from __future__ import annotations

import pytest

from cdm_toolkit.compare.palette import family_of, styles

METHODS = (
    "sft",
    "exact",
    "min-ed",
    "prefix",
    "uld",
    "gold",
    "alm",
    "cdm",
    "spelling",
    "x-token",
    "simct",
    "likelihood",
    "byte-marginal",
)


def test_the_toolkit_s_methods_look_the_same_whatever_else_is_drawn() -> None:
    every = styles([*METHODS, "other"])
    for name in METHODS:
        assert styles(["another", name]) == {"another": styles(["another"])["another"], name: every[name]}


def test_all_methods_differ_in_colour_and_in_marker() -> None:
    found = styles([*METHODS, "mine", "reverse-kl"]).values()
    assert len({style.fill for style in found}) == len(METHODS) + 2
    assert len({style.marker for style in found}) == len(METHODS) + 2


def test_a_variant_has_its_family_s_colour_lighter_and_another_marker() -> None:
    found = styles(["spelling", "spelling k=20", "spelling k=50"])
    assert {style.edge for style in found.values()} == {found["spelling"].fill}
    assert found["spelling k=20"].fill == found["spelling k=50"].fill == "#80b8d8"
    assert len({style.marker for style in found.values()}) == 3
    assert [style.is_variant for style in found.values()] == [False, True, True]


def test_a_variant_alone_is_a_variant_still() -> None:
    assert (
        styles(["spelling k=20"])["spelling k=20"] == styles(["spelling", "spelling k=20"])["spelling k=20"]
    )


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("spelling k=20", "spelling"),
        ("reverse-kl", "reverse-kl"),
        ("cdm(k=20)", "cdm"),
        ("exact+kl", "exact"),
        ("=x", "=x"),
    ],
)
def test_a_family_is_what_is_before_the_options(name: str, family: str) -> None:
    assert family_of(name) == family


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", [*METHODS, "a", "b", "c", "d", "e", "f"])
def test_every_colour_is_seen_on_light_and_on_dark_paper(name: str) -> None:
    colour = luminance(styles(["a", "b", "c", "d", "e", "f", name])[name].fill)
    assert (luminance("#ffffff") + 0.05) / (colour + 0.05) > 2.2
    assert (colour + 0.05) / (luminance("#0d1117") + 0.05) > 2.4
