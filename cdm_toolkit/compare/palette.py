"""A colour and a marker for each method: the same in all figures and pages, whatever else is drawn beside it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle

from cdm_toolkit.kd.method import methods


@dataclass(frozen=True, slots=True)
class Style:
    """How a method is drawn."""

    fill: str
    edge: str
    """The family's colour; `fill` is lighter for a variant."""
    marker: str
    """As matplotlib names it."""

    @property
    def is_variant(self) -> bool:
        return self.fill != self.edge


# Methods bring their own colours: Okabe and Ito's palette without its yellow and black, which are lost on white and on
# dark paper, and some that stay apart from it and from each other for colour-blind readers. All can be seen on white
# and on #0d1117.
_SFT = ("#6b6b6b", "s")
_OTHERS = (
    ("#804620", ">"),
    ("#8a8a00", "h"),
    ("#3950e6", "*"),
    ("#00929c", "d"),
    ("#b05fd0", "8"),
    ("#9a5b6a", "H"),
)
_VARIANTS = (">", "h", "*", "<", "H", "D", "8", "d")
_LIGHTER = 0.5


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Give each method its style. A variant, such as `uld k=20`, has its family's colour in a lighter shade.

    Methods with a colour of their own keep it, others get one by their order: give all names of a study, so that
    one is drawn the same when others have not been run.
    """
    own = {name: (method.color, method.marker or "o") for name, method in methods().items() if method.color}
    families, others = {"sft": _SFT} | own, cycle(_OTHERS)
    variants: Counter[str] = Counter()
    found = {}
    for name in dict.fromkeys(names):
        family = family_of(name)
        if family not in families:
            families[family] = next(others)
        colour, marker = families[family]
        if name == family:
            found[name] = Style(colour, colour, marker)
        else:
            markers = [each for each in _VARIANTS if each != marker]
            found[name] = Style(_lighter(colour), colour, markers[variants[family] % len(markers)])
            variants[family] += 1
    return found


def family_of(name: str) -> str:
    """Return a method's name without its options: what is before a space or a sign such as `,`, `=`, `(`, `+`."""
    found = re.match(r"[\w.-]+", name)
    return found.group() if found else name


def _lighter(colour: str) -> str:
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * _LIGHTER):02x}" for part in parts)
