"""What docs/distill.md says of options is what the code has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from cdm_toolkit.distill.config import _OPTIONS, TeacherConfig

DOCS = Path(__file__).parents[2] / "docs" / "distill.md"
NO_ALIGNMENT = {"kl", "reverse-kl", "jsd"}


def rows() -> Iterator[tuple[str, str, str]]:
    section = DOCS.read_text(encoding="utf-8").split("### Options of a method")[1].split("###")[0]
    for line in section.splitlines():
        if line.startswith("| `"):
            option, default, methods, _ = (cell.strip() for cell in line.strip("|").split(" | "))
            yield option.strip("`"), default.strip("`"), methods


def described(methods: str) -> set[str]:
    """Give the keys of _OPTIONS that a cell of the table names."""
    found = set()
    for name, mapping in re.findall(r"`([\w-]+)`(?: \(`(\w+)`\))?", methods):
        if name == "cdm":
            found |= {"cdm"} if mapping != "near" else set()
            found |= {"cdm-near"} if mapping != "spelled" else set()
        else:
            found.add(name)
    return _OPTIONS.keys() - found if methods.startswith("all but") else found


def test_every_option_has_its_methods_and_its_default() -> None:
    told = {option: (default, described(methods)) for option, default, methods in rows()}
    assert told.keys() == set().union(*_OPTIONS.values())
    config = TeacherConfig(model="-")
    for option, (default, methods) in told.items():
        value = config.candidates if option == "top_k" else getattr(config, option)
        assert default == str(value).replace("True", "true"), option
        assert methods == {method for method, options in _OPTIONS.items() if option in options}, option
