"""What the how-tos show runs: every block of docs/how-to, in its order, on small models under the pages' names."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from scoring_server import Engine, ScoringServer

from cdm_toolkit.cli import main
from cdm_toolkit.cli.app import app
from cdm_toolkit.distill.sources import read_rows
from cdm_toolkit.hub import tokenizers
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.samples import sample_path

ROOT = Path(__file__).parents[1]
PAGES = {page.stem: page for page in (ROOT / "docs" / "how-to").glob("*.md")}
MODELS = {
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": "teacher",
    "Qwen/Qwen2.5-0.5B": "student",
    "Qwen/Qwen2.5-7B-Instruct": "student",  # other models with this tokenizer
    "Qwen/Qwen2.5-32B-Instruct": "student",
}


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code, and the file that it is, if its page names one."""

    language: str
    code: str
    file: str | None


def blocks(page: Path) -> list[Block]:
    found = re.findall(
        r"^(?:`([\w.]+)`:\n\n)?```(\w+)\n(.*?)^```$",
        page.read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    return [Block(language, code, file or None) for file, language, code in found]


def commands(code: str) -> Iterator[list[str]]:
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@dataclass(slots=True)
class Reader:
    """A person who does what a page says, in the folder where the test is."""

    capsys: pytest.CaptureFixture[str]
    names: dict[str, Any] = field(default_factory=dict)
    said: str = ""
    servers: dict[str, ScoringServer] = field(default_factory=dict)
    """Those that the page starts, by the addresses that it gives them."""

    def do(self, block: Block) -> None:
        code = block.code
        for address, server in self.servers.items():
            code = code.replace(address, server.url)
        if block.file is not None:
            Path(block.file).write_text(code, encoding="utf-8")
        elif block.language == "bash":
            for words in commands(code):
                self.run(words)
        elif block.language == "python":
            exec(code, self.names)
        elif block.language == "json":
            for line in block.code.splitlines():
                Path("form.jsonl").write_text(line, encoding="utf-8")
                assert len(read_rows("form.jsonl")) == 1
        elif block.language == "text":
            assert block.code.strip() in "\n".join(line.rstrip() for line in self.said.splitlines())
        else:
            assert tomllib.loads(block.code)

    def run(self, words: list[str]) -> None:
        if words[0] == "accelerate":
            parse(words[words.index("cdm_toolkit.cli") + 1 :])
            return
        if words[0] == "vllm" or "sglang.launch_server" in words:
            self.serve(words)
            return
        assert words[0] == "cdm"
        self.capsys.readouterr()
        assert main(words[1:]) == 0, shlex.join(words)
        self.said = self.capsys.readouterr().out

    def serve(self, words: list[str]) -> None:
        """Start a server that answers as the one that a command starts."""
        options = dict(pairwise(words))
        engine: Engine = "vllm" if words[0] == "vllm" else "sglang"
        path = options["serve" if engine == "vllm" else "--model-path"]
        model, tokenizer = load_model(path), load_tokenizer(path).tokenizer
        server = ScoringServer(
            model, engine, options["--served-model-name"], tokenizer, model.config.vocab_size
        )
        server.max_model_len = int(options["--max-model-len" if engine == "vllm" else "--context-length"])
        server.max_logprobs = int(options.get("--max-logprobs", 20))
        server.start()
        self.servers[f"http://localhost:{options['--port']}"] = server


def parse(words: list[str]) -> None:
    """Parse a command line as `cdm` does. An unknown option or a missing argument raises."""
    command: Any = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    command.make_context("cdm", list(words))


@pytest.fixture
def workplace(small_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder that has small models under the names of the pages, and rows."""
    for name, model in MODELS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(small_models / model)
    for name, rows in (("train", 12), ("heldout", 3)):
        lines = sample_path(name).read_text(encoding="utf-8").splitlines()[:rows]
        file = tmp_path / {"train": "rows.jsonl", "heldout": "heldout.jsonl"}[name]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def test_the_seven_are_there() -> None:
    runs = {"distill-yours", "own-loop", "cache-a-teacher", "serve-a-teacher"}
    elsewhere = {"train-in-trl"}  # tests/integrations/test_trl.py, with TRL in an environment of its own
    assert set(PAGES) == runs | elsewhere | {"look-at-a-pair", "add-a-method"}


def test_look_at_a_pair(
    workplace: Path, real_view: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_view("llama3"), real_view("mistral")
    monkeypatch.setattr(tokenizers, "_view", cache(tokenizers._view))  # read once, not by every command
    reader = Reader(capsys)
    for block in blocks(PAGES["look-at-a-pair"]):
        reader.do(block)
    assert {"report.html", "map.safetensors", "signal.html"} <= {path.name for path in workplace.iterdir()}


@pytest.mark.parametrize("name", ["distill-yours", "own-loop", "cache-a-teacher", "serve-a-teacher"])
def test_how_to(
    name: str,
    workplace: Path,
    small_models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CDM_CACHE", str(small_models / "cache"))
    reader = Reader(capsys)
    try:
        for block in blocks(PAGES[name]):
            reader.do(block)
    finally:
        for server in reader.servers.values():
            server.stop()
    if "out" in reader.names:
        assert reader.names["out"].kd.isfinite()


def test_add_a_method(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # in a process of its own: the method would be known to all tests after this one.
    # tests/test_docs_kd.py runs its commands, which need such a process too
    page = blocks(PAGES["add-a-method"])
    script = "".join(block.code for block in page if block.language == "python" and block.file is None)
    reader = Reader(capsys)
    for block in page:
        if block.language == "bash":
            for words in commands(block.code):
                if words[0] == "cdm" and "--help" not in words:
                    parse(words[1:])
        elif block.language != "python" or block.file is not None:
            reader.do(block)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{workplace}", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
