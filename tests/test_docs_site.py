"""The site has a page for everything, and what its pages say of the code is made of the code."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

from cdm_toolkit import kd
from cdm_toolkit.cli.app import app
from cdm_toolkit.distill.settings import DistillConfig, from_mapping

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OURS = {name: method for name, method in kd.methods().items() if method.__module__.startswith("cdm_toolkit.")}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """Import tools/make_pages."""
    loader = SourceFileLoader("make_pages", str(ROOT / "tools" / "make_pages"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tool: ModuleType) -> dict[str, str]:
    return dict(tool.parts())


def pages_of(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for entry in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
        yield from pages_of(entry)


def test_every_page_is_in_the_navigation(tool: ModuleType) -> None:
    project = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    pages = [page for page in tool.page_names().values() if page.endswith(".md")]
    assert sorted(pages_of(project["nav"])) == sorted(pages)


def test_links_lead_to_pages(tool: ModuleType) -> None:
    pages = {"docs/a/one.md": "a/one.md", "docs/two.md": "two.md", "CHANGELOG.md": "changelog.md"}

    def shown(source: str, text: str) -> str:
        return str(tool.page_text(source, text, pages, {}))

    assert shown("docs/a/one.md", "[x](../two.md#there)") == "[x](../two.md#there)"
    assert shown("docs/a/one.md", "[x](../../CHANGELOG.md)") == "[x](../changelog.md)"
    assert shown("CHANGELOG.md", "[x](docs/a/one.md), [y](#here)") == "[x](a/one.md), [y](#here)"
    assert (
        shown("docs/two.md", "[x](https://a.org/two.md) [y](gone.md)")
        == "[x](https://a.org/two.md) [y](gone.md)"
    )


def test_pages_are_written_once_and_go_when_their_file_goes(
    tool: ModuleType, made: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "gone.md").write_text("no file of the repository", encoding="utf-8")
    tool.write_pages(tmp_path, made)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path).as_posix() for path in written} == set(tool.page_names().values())
    tool.write_pages(tmp_path, made)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert not any("<!-- made:" in path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.md"))


# What is made of the code


def test_every_command_and_option_is_there(made: dict[str, str]) -> None:
    told = made["commands"]

    def check(command: Any, words: str) -> None:
        assert re.search(rf"^##+ `{words}`$", told, re.MULTILINE), words
        section = re.split(rf"^##+ `{words}`$", told, flags=re.MULTILINE)[1].split("\n##")[0]
        for option in command.params:
            assert all(f"`{name}`" in section for name in option.opts if name.startswith("-")), (
                words,
                option.opts,
            )
        for name, inner in getattr(command, "commands", {}).items():
            check(inner, f"{words} {name}")

    check(typer.main.get_command(app), "cdm")
    assert "Example:" not in told


def test_every_setting_of_a_run_is_there_with_its_meaning(made: dict[str, str]) -> None:
    def check(record: Any, tool_path: str) -> None:
        for name, field in record.model_fields.items():
            assert field.description, f"{tool_path}{name} has no description"
            assert " ".join(field.description.split()).replace("|", "\\|") in made["run-file"]

    for record in (DistillConfig, *(type(value) for value in _examples())):
        check(record, f"{record.__name__}.")
    for heading in ("`data`", "`teachers`", "`train`", "`train.lora`"):
        assert f"## {heading}\n" in made["run-file"]


def _examples() -> list[Any]:
    config = from_mapping(
        {
            "student": "s",
            "output": "o",
            "data": "rows.jsonl",
            "teachers": [{"model": "t"}],
            "train": {"lora": {}},
        }
    )
    return [config.data, config.teachers[0], config.train, config.train.lora]


def test_the_run_file_of_the_reference_is_one() -> None:
    page = (DOCS / "reference" / "run-file.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert from_mapping(yaml.safe_load(block)).teachers[0].method_options == {"top_k": 100}


@pytest.mark.parametrize("name", OURS)
def test_a_method_has_its_equation_and_its_facts(name: str, made: dict[str, str]) -> None:
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    section = page.split(f"\n### `{name}`\n")[1].split("\n### ")[0]
    assert "D(g)" in re.findall(r"```text\n(.*?)```", section, flags=re.DOTALL)[0]
    assert section.count(f"<!-- made: method {name} -->") == 1
    facts, method = made[f"method {name}"], OURS[name]
    assert re.sub(r"\[([\d.]+)\]\(https://arxiv.org/abs/\1\)", r"\1", facts).startswith(
        f"- Source: {method.source}\n"
    )
    for field in kd.settings.fields_of(method.Settings):
        assert f"| `{field.name}` |" in facts
        assert field.about in facts


def test_no_method_is_on_the_page_that_is_not_there() -> None:
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^### `(.+)`$", page, re.MULTILINE)) == set(OURS)


def test_what_a_method_reads_of_the_teacher(made: dict[str, str]) -> None:
    def read(name: str) -> str:
        return made[f"method {name}"].split("- Reads of the teacher: ")[1].split("\n")[0]

    assert read("exact") == "top k at each group"
    assert read("alm") == "log-probabilities of its tokens in a group"
    assert read("spelling").endswith("top k at each of these")


def test_all_of_kd_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "python-kd.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: cdm_toolkit\.kd\.(\w+)$", page, re.MULTILINE)) == sorted(kd.__all__)


# Files beside the site


def test_the_citation_has_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]


def test_the_layers_are_those_of_the_contract() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawn = page.split("```text\n")[1].split("```")[0]
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = contract["contracts"][0]["layers"]
    assert [word for word in re.findall(r"\w+", drawn) if word in layers] == layers
