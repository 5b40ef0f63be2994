"""`cdm signal show`: its figures are those of the loss, its page is whole, and what cannot be shown is said."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cdm_toolkit import kd

from .test_bad_input import refused

TEXT = "Unbelievable: 1250 croissants,\n\ta naïve 👍🏽 <b>&amp;</b> </script>"
WITH_OUTCOMES = [name for name, method in kd.methods().items() if method.compare is not kd.Method.compare]
WITHOUT = [name for name in kd.methods() if name not in WITH_OUTCOMES]


@pytest.fixture
def pair(small_models: Path) -> tuple[Any, ...]:
    return ("--teacher", small_models / "teacher", "--student", small_models / "student", "--device", "cpu")


def loss_of(models: Path, student: str, name: str, row: dict[str, str], **settings: Any) -> kd.LossOutput:
    """Compute the loss of a run on one row."""
    from cdm_toolkit.hub.models import load_model

    pair = kd.TokenizerPair.from_names(str(models / "teacher"), str(models / student))
    method = kd.find_method(name)(pair, **settings)
    batch = pair.collate([row])
    signal = method.signal(load_model(str(models / "teacher")), batch)
    return method(load_model(str(models / student))(**batch.student).logits, signal, batch)


@pytest.mark.parametrize("name", WITH_OUTCOMES)
def test_positions_add_up_to_the_loss_of_a_run(cdm, small_models: Path, name: str) -> None:
    method = kd.find_method(name)
    student = "other" if method.same_tokenizer else "nested" if method.nested_tokenizers else "student"
    models = ("--teacher", small_models / "teacher", "--student", small_models / student)
    record = json.loads(cdm("signal", "show", TEXT, *models, "--method", name, "--json").out)
    out = loss_of(small_models, student, name, {"text": TEXT})
    compared = [found for each in record["positions"] if (found := each["methods"][0])]
    whole = sum(each["divergence"] for each in compared)
    assert len(record["groups"]) == out.groups
    assert whole == pytest.approx(out.kd.item() * out.groups, abs=1e-5)
    assert record["methods"] == [
        {"name": name, "kd": pytest.approx(out.kd.item(), abs=1e-5), "rest_bucket": True}
    ]
    assert record["ce"] == pytest.approx(out.ce.item(), abs=1e-5)
    assert sum(each["share"] for each in compared) == pytest.approx(1)
    for each in compared:
        for side in ("teacher", "student"):
            mass = sum(outcome[side] for outcome in each["outcomes"]) + each["rest"][side]
            assert mass == pytest.approx(1, abs=1e-4)


def test_settings_of_a_method_and_top_k_are_those_of_a_run(cdm, small_models: Path, pair) -> None:
    specs = ("exact:temperature=2,positions=mean", "spelling:intra_group=false")
    asked = ("--method", specs[0], "--method", specs[1], "--top-k", "20")
    record = json.loads(cdm("signal", "show", TEXT, *pair, *asked, "--json").out)
    losses = [
        loss_of(small_models, "student", "exact", {"text": TEXT}, temperature=2, positions="mean", top_k=20),
        loss_of(small_models, "student", "spelling", {"text": TEXT}, intra_group=False, top_k=20),
    ]
    for nth, (spec, out) in enumerate(zip(specs, losses, strict=True)):
        assert record["methods"][nth]["name"] == spec
        found = [each["methods"][nth] for each in record["positions"]]
        whole = sum(each["divergence"] for each in found if each)
        assert whole == pytest.approx(out.kd.item() * out.groups, abs=1e-5)
        inside = [each for each, at in zip(found, record["positions"], strict=True) if at["before"]]
        assert inside
        assert not any(inside)
    assert all(len(group["candidates"]) == 20 for group in record["groups"])


def test_json_has_the_tokens_that_follow_and_their_groups(cdm, pair) -> None:
    record = json.loads(cdm("signal", "show", TEXT, *pair, "--json").out)
    tokens, groups = record["tokens"], record["groups"]
    for each in record["positions"]:
        assert each["follows"]["id"] == tokens[each["position"] + 1]["id"]
        group = groups[each["group"]]
        assert group["student"][each["before"]]["id"] == each["follows"]["id"]
        assert each["follows"]["logprob"] < 0
    assert "".join(token["text"] for group in groups for token in group["student"]).startswith("Unbel")
    kinds = {
        (min(len(group["teacher"]), 2), min(len(group["student"]), 2)): group["kind"] for group in groups
    }
    names = {(1, 1): "1-1", (1, 2): "1-n", (2, 1): "n-1", (2, 2): "n-m"}
    assert kinds.items() <= names.items()
    assert len(kinds) > 2
    for group in groups:
        probabilities = [candidate["probability"] for candidate in group["candidates"]]
        assert probabilities == sorted(probabilities, reverse=True)
        for candidate in group["candidates"]:
            assert {"id", "text", "probability", "spelled"} == set(candidate)


def test_a_completion_is_learned_and_its_prompt_read(cdm, pair, tmp_path: Path) -> None:
    asked = ("signal", "show", "How many?", *pair, "--completion", "12 of them.", "--json")
    record = json.loads(cdm(*asked).out)
    learned = "".join(each["follows"]["text"] for each in record["positions"][:-1])
    assert learned == "12 of them."
    assert "".join(token["text"] for token in record["tokens"]).endswith(
        "How many?\n12 of them." + record["tokens"][-1]["text"]
    )
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "How many?", "completion": "12 of them."}
    rows.write_text('{"prompt": "", "completion": "another"}\n\n' + json.dumps(row) + "\n", encoding="utf-8")
    assert json.loads(cdm("signal", "show", "--data", rows, "--row", "3", *pair, "--json").out) == record


def test_the_table_reads_without_colour(cdm, pair) -> None:
    text = "[bold]Don't[/bold] unbelievable"
    out = cdm("signal", "show", text, *pair, "--method", "spelling", "--method", "exact").out
    assert "\x1b" not in out
    for words in ("predicts", "spelling", "exact", "KL ", "others", "1-1", "not compared inside", "["):
        assert words in out
    *_, first, second, third = out.strip().splitlines()
    assert first.startswith("spelling: KD ")
    assert second.startswith("exact: KD ")
    assert third.startswith("CE ")


class Page(HTMLParser):
    """What a browser would make of a page: elements by tag, with their attributes, and the text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.found: dict[str, list[dict[str, str | None]]] = {}
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.setdefault(tag, []).append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_escapes_what_it_shows(cdm, pair, tmp_path: Path) -> None:
    path, hostile = tmp_path / "new" / "page.html", '</script></template><img src=x onerror="a"> \x07‮ ' + TEXT
    asked = ("signal", "show", hostile, *pair, "--method", "spelling", "--method", "exact", "--html", path)
    answer = cdm(*asked, "--json")
    assert answer.err == f"device: cpu\nwrote {path}\n"
    positions = json.loads(answer.out)["positions"]
    page = Page(content := path.read_text(encoding="utf-8"))
    assert len(page.found["button"]) == len(page.found["template"]) == len(positions)
    assert len(page.found["script"]) == 1
    assert "img" not in page.found
    assert "link" not in page.found
    assert "http" not in content
    assert "\x07" not in content
    assert "‮" not in content
    assert "prefers-color-scheme: dark" in content
    assert [button["tabindex"] for button in page.found["button"]].count("0") == 1
    assert all("KL" in (button["aria-label"] or "") for button in page.found["button"])
    assert [each["name"] for each in page.found["input"]] == ["by", "by"]
    for label in ("‹0007›", "script", "which follows, is no outcome", "not compared inside this group"):
        assert label in page.text


def test_a_page_of_one_method_has_no_choice(cdm, pair, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    answer = cdm("signal", "show", "Hello there", *pair, "--html", path)
    assert (answer.status, answer.out) == (0, "")
    assert "input" not in Page(path.read_text(encoding="utf-8")).found


def test_the_oracle_is_one_more_column(cdm, pair, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    asked = ("signal", "show", "Hi", *pair, "--method", "spelling", "--method", "exact", "--oracle")
    record = json.loads(cdm(*asked, "--html", path, "--json").out)
    assert [method["name"] for method in record["methods"]] == ["spelling", "exact", "oracle"]
    found = Page(path.read_text(encoding="utf-8")).found
    assert [each["value"] for each in found["input"]] == ["0", "1", "2"]


def test_what_cannot_be_shown(cdm, pair, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n', encoding="utf-8")
    show = ("signal", "show")
    refused(cdm(*show, "", *pair), "text is ''", "at least one character")
    refused(cdm(*show, "Why?", "--completion", "", *pair), "--completion is ''")
    refused(cdm(*show, *pair), "give a text, or --data")
    refused(cdm(*show, "text", "--data", rows, *pair), "give a text, or --data")
    refused(cdm(*show, "--data", rows, "--completion", "x", *pair), "--completion")
    refused(cdm(*show, "--data", rows, "--row", "2", *pair), "--row is 2", "the last is 1")
    refused(cdm(*show, "a\ud800", *pair), "surrogate")
    refused(cdm(*show, "text", *pair, "--template", "chta"), "did you mean chat?")
    refused(cdm(*show, "text", *pair, "--device", "warp"), "--device is 'warp'")


def test_methods_that_cannot_be_shown(cdm, pair) -> None:
    def asked(*methods: str) -> Any:
        return cdm(
            "signal", "show", "text", *pair, *(word for name in methods for word in ("--method", name))
        )

    refused(asked("speling"), "unknown method 'speling'", "did you mean spelling?")
    for name in WITHOUT:
        refused(asked(name), f"--method is '{name}'", ", ".join(WITH_OUTCOMES), ", ".join(WITHOUT))
    refused(asked("exact", "uld"), "--method is 'uld'")
    refused(asked("spelling", "exact", "cdm"), "spelling, exact, cdm", "one method, or two")
    refused(asked("kl"), "one for different tokenizers")
    refused(asked("spelling:temprature=2"), "did you mean temperature?")
    refused(asked("spelling:temperature=0"), "a number above 0")
    refused(cdm("signal", "show", "text", *pair, "--top-k", "1000"), "--top-k is 1000", "at most 700")


def changed(folder: Path, **config: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def test_models_that_cannot_read_the_text(cdm, small_models: Path, tmp_path: Path) -> None:
    short, foreign = (
        shutil.copytree(small_models / "student", tmp_path / name) for name in ("short", "foreign")
    )
    changed(short, max_position_embeddings=16)
    shutil.copy(small_models / "teacher" / "tokenizer.json", foreign / "tokenizer.json")
    show = ("signal", "show", TEXT, "--teacher", small_models / "teacher", "--student")
    refused(cdm(*show, short), "--max-length is", "at most 16: ", "no more positions")
    refused(cdm(*show, foreign), "700 embedding rows, its tokenizer 900 ids")


def test_a_long_text_is_cut_as_in_a_run(cdm, pair) -> None:
    show = ("signal", "show", " through a word and another", *pair, "--json", "--max-length")
    whole, cut = cdm(*show, "512"), cdm(*show, "10")
    assert whole.err == "device: cpu\n"
    assert "tokens are cut off by --max-length, as in a run with 10" in cut.err
    tokens, left = (json.loads(answer.out)["tokens"] for answer in (whole, cut))
    assert left == tokens[: len(left)]
    assert 1 < len(left) <= 10
    refused(cdm(*show, "2"), "cannot be aligned", "raise --max-length")


def test_help_says_what_is_shown(cdm) -> None:
    out = " ".join(cdm("signal", "show", "--help").out.replace("│", " ").split())
    for words in (
        "--teacher",
        "--student",
        "--method",
        "--completion",
        "--html",
        "side by side",
        "Example: cdm signal",
    ):
        assert words in out
    assert cdm("signal", "--help").status == 0
