"""What docs/distill.md says of methods and their options is what the classes have."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from cdm_toolkit.distill.settings import from_mapping
from cdm_toolkit.distill.teacher_settings import ACROSS_TOKENIZERS, TeacherConfig
from cdm_toolkit.distill.training_arguments import training_arguments
from cdm_toolkit.kd.method import Method, methods
from cdm_toolkit.kd.settings import fields_of

PAGE = (Path(__file__).parents[2] / "docs" / "distill.md").read_text(encoding="utf-8")
OURS = {name: method for name, method in methods().items() if method.__module__.startswith("cdm_toolkit.")}


def table(head: str) -> list[list[str]]:
    """Give the cells of the table that has this head."""
    section = PAGE.split(f"| {head} |\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines()[1:]]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def written(default: Any) -> str:
    if default is None:
        return "unset"
    return str(default).lower() if isinstance(default, bool) else str(default)


def tokenizers_of(method: type[Method[Any, Any]]) -> str:
    if method.nested_tokenizers:
        return "[nested](#students-of-the-teachers-first-merges)"
    return "one" if method.same_tokenizer else "any two"


def test_every_method_is_in_the_table() -> None:
    told = {
        named(name)[0]: others for name, *others in table("method | what is compared | tokenizers | source")
    }
    assert told == {
        name: [method.summary, tokenizers_of(method), method.source] for name, method in OURS.items()
    }


def test_every_option_has_its_methods_its_default_and_its_meaning() -> None:
    told = {}
    for option, default, of, meaning in table("option | default | methods | meaning"):
        listed = set(named(of))
        key = (named(option)[0], named(default)[0], meaning)
        told[key] = OURS.keys() - listed if of.startswith("all but") else listed
    found = defaultdict(set)
    for name, method in OURS.items():
        for field in fields_of(method.Settings):
            found[field.name, written(field.default), field.about].add(name)
    assert told == found


def test_the_options_of_two_tokenizers() -> None:
    told = {named(option)[0]: named(default)[0] for option, default, _ in table("option | default | meaning")}
    config = TeacherConfig(model="-")
    assert told == {name: getattr(config, name) for name in ACROSS_TOKENIZERS}


def test_the_run_file_is_one_and_its_parts_fit(tmp_path: Path) -> None:
    import yaml

    whole, *parts = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL))
    assert [teacher.method for teacher in from_mapping(whole).teachers] == ["kl", "spelling"]
    made = from_mapping({**whole, **{name: part for each in parts for name, part in each.items()}})
    assert [(source.weight, source.alpha) for source in made.data.all_sources] == [
        (1, None),
        (0.5, None),
        (1, 0),
    ]
    with_trainer = made.model_copy(
        update={"train": made.train.model_copy(update={"device": "cpu", "report_to": ()})}
    )
    assert training_arguments(with_trainer, tmp_path).lr_scheduler_type == "warmup_stable_decay"
