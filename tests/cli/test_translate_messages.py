"""What the library says in Python's words, in those of the command that runs."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import cdm_toolkit
from cdm_toolkit.artifacts.teacher_cache import CacheHeader
from cdm_toolkit.cli import main, translate_messages
from cdm_toolkit.cli.app import app
from cdm_toolkit.cli.translate_messages import in_terminal

ROOT = Path(cdm_toolkit.__file__).parent
CDM = typer.main.get_command(app)


@pytest.fixture(autouse=True)
def _no_command_runs_after() -> Iterator[None]:
    yield
    translate_messages.start(CDM, [])


def said_by(command: str, message: str) -> str:
    translate_messages.start(CDM, command.split())
    return in_terminal(message)


def test_a_setting_is_the_running_commands_option() -> None:
    assert said_by("distill run.yaml", "raise `max_length`") == "raise --max-length"
    assert said_by("student transplant", "`source` is 'x'") == "--from is 'x'"
    assert said_by("eval --suite math", "no `data`") == "no --data"
    assert said_by("align export x.jsonl --t1 a", "another `output`") == "another --output"


def test_the_longest_name_of_an_option_is_shown() -> None:
    assert said_by("teacher cache", "`k` is 0") == "--top-k is 0"


def test_a_setting_without_an_option_is_set_in_the_run_file_or_bare() -> None:
    assert said_by("distill", "lower `train.weight_decay`") == "lower --set train.weight_decay=…"
    assert said_by("generate", "lower `train.weight_decay`") == "lower train.weight_decay"
    assert said_by("distill", "`stride` is 0") == "stride is 0"
    assert said_by("compare", "`study` is bad") == "study is bad"  # an argument, which no option sets
    assert said_by("", "`max_length` is 0") == "max_length is 0"


def test_a_setting_with_its_value() -> None:
    assert said_by("align show", "choose `aligner='dtw'`") == "choose --aligner dtw"
    assert said_by("eval", "`allow_code_execution=True`") == "--allow-code-execution"
    assert said_by("generate", "choose `aligner='dtw'`") == "choose aligner='dtw'"


def test_a_function_is_the_command_that_does_it() -> None:
    assert said_by("eval", "with `write_cache`, or `maps.export_map`") == (
        "with cdm teacher cache, or cdm vocab-map export"
    )


def test_a_call_is_a_command_line_to_copy() -> None:
    call = "`write_cache(CacheSettings(model='a b', output='out', k=0, quantised=True, shard='1/2'))`"
    line = said_by("teacher info", call)
    assert line == "cdm teacher cache --model 'a b' --output out --top-k 0 --quantised --shard 1/2"
    off = "`write_cache(CacheSettings(model='a', quantised=False))`"
    assert said_by("teacher info", off) == "cdm teacher cache --model a"
    views = "`build_neighbours(load_view('llama3'), load_view('my folder'))`"
    assert said_by("distill", views) == "cdm vocab-map build --t1 llama3 --t2 'my folder'"


def test_other_words_stay_as_they_are() -> None:
    for message in ("raise --max-length", "the token ` a` is no token", "`` and `'x'`", "a single ` mark"):
        assert said_by("distill", message) == message


def test_every_function_is_public_and_its_command_exists() -> None:
    functions = {
        node.name
        for path in ROOT.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    for function, command in translate_messages.COMMANDS.items():
        assert function in functions
        assert main([*command.split(), "--help"]) == 0


def test_a_call_that_makes_a_shard_is_a_command_that_parses(cdm, tmp_path: Path) -> None:
    data = str(tmp_path / "none.jsonl")
    made = CacheHeader.model_construct(
        model="smollm2",
        data=data,
        vocab=100,
        k=5,
        dtype="float16",
        quantised=True,
        max_length=64,
        template="none",
        teacher_dtype="float32",
        rows_per_shard=4,
        limit=3,
    )
    line = said_by("teacher info", f"`{made.call(tmp_path / 'a folder', '2/3')}`")
    assert "--shard 2/3" in line
    answer = cdm(*shlex.split(line)[1:])
    assert answer.status == 2
    assert "none.jsonl: there is no such file" in answer.err
