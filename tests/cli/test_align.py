"""`cdm align`: what a person sees, and what a program reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PAIR = ("--t1", "llama3", "--t2", "mistral")
TEXT = "Zoë's 1250 croissants 👍🏽\n"


def test_json_holds_both_sides_and_groups(cdm, real_view) -> None:
    record = json.loads(cdm("align", "show", TEXT, *PAIR, "--json").out)
    assert set(record) == {"t1", "t2", "groups"}
    data = TEXT.encode()
    for side, name in (("t1", "llama3"), ("t2", "mistral")):
        assert record[side]["name"] == name
        view, at = real_view(name), 0
        for token in record[side]["tokens"]:
            assert set(token) == {"id", "text", "start", "end", "special"}
            assert token["start"] == at
            at = token["end"]
            assert (view.token_bytes[token["id"]] or b"").endswith(data[token["start"] : token["end"]])
        assert at == len(data)
        edges = [edge for group in record["groups"] for edge in group[side]]
        assert edges[0] == 0
        assert edges[-1] == len(record[side]["tokens"])
        assert edges[1:-1:2] == edges[2::2]
    assert all(group["exact"] for group in record["groups"])
    sizes = {"1-1": (1, 1), "1-n": (1, 2), "n-1": (2, 1), "n-m": (2, 2)}
    for group in record["groups"]:
        counts = tuple(min(group[side][1] - group[side][0], 2) for side in ("t1", "t2"))
        assert sizes[group["kind"]] == counts


def test_rows_read_without_colour(cdm) -> None:
    out = cdm("align", "show", "a don't", *PAIR).out
    lines = out.splitlines()
    assert lines[0].split("│")[0].strip() == "llama3"
    assert "1-n" in lines[1]
    assert lines[2].split("│")[0].strip() == "mistral"
    assert [line.count("│") for line in lines[:3]] == [lines[0].count("│")] * 3
    assert "\x1b" not in out
    assert "all exact" in lines[-1]


def test_the_entropies_of_models_are_asked_for_on_a_device(cdm, small_models: Path) -> None:
    pair = ("--t1", small_models / "teacher", "--t2", small_models / "student")
    command = ("align", "show", "Tokens, entropies", *pair, "--aligner", "entropy-dtw", "--json")
    answer = cdm(*command, "--entropy", "models", "--device", "cpu")
    assert answer.err == "device: cpu\n"
    assert json.loads(answer.out)["groups"]
    assert cdm(*command).err == ""
    assert cdm(*command, "--entropy", "models", "--device", "warp").status == 2


def test_a_file_gives_one_object_a_line(cdm, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("first\r\nsecond line\n\n", encoding="utf-8", newline="")
    lines = cdm("align", "show", *PAIR, "--file", file, "--json").out.splitlines()
    ends = [
        json.loads(line)["t1"]["tokens"][-1]["end"] if json.loads(line)["t1"]["tokens"] else 0
        for line in lines
    ]
    assert ends == [len("first\r"), len("second line"), 0]


def test_a_chat_is_aligned_by_contents_and_roles(cdm) -> None:
    messages = json.dumps([{"role": "user", "content": "user: 2+2?"}, {"role": "assistant", "content": "4."}])
    record = json.loads(
        cdm("align", "show", messages, "--chat", "--t1", "llama3", "--t2", "qwen2", "--json").out
    )
    texts = {side: [token["text"] for token in record[side]["tokens"]] for side in ("t1", "t2")}
    pairs = [
        ("".join(texts["t1"][slice(*group["t1"])]), "".join(texts["t2"][slice(*group["t2"])]), group["exact"])
        for group in record["groups"]
    ]
    assert pairs.count(("<|eot_id|>", "<|im_end|>", True)) == 2
    assert ("4", "4", True) in pairs
    assert (" ", " ", True) in pairs


@pytest.mark.parametrize(
    ("messages", "word"),
    [("not json", "JSON"), ("[]", "empty"), ('[{"role": "user"}]', "content"), ('{"a": 1}', "list")],
)
def test_messages_that_are_none(cdm, messages: str, word: str) -> None:
    answer = cdm("align", "show", messages, "--chat", "--t1", "llama3", "--t2", "qwen2")
    assert answer.status == 2
    assert word in answer.err


def test_pages_are_whole_and_escape_what_they_show(cdm, tmp_path: Path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "picture.svg"
    answer = cdm("align", "show", "<script>x & y</script> é", *PAIR, "--html", page, "--svg", picture)
    assert answer.status == 0
    for path in (page, picture):
        content = path.read_text(encoding="utf-8")
        assert "<script" not in content
        assert "&lt;script" in content.replace("&lt;</span>", "&lt;")
        assert "http:" not in content.replace("http://www.w3.org/2000/svg", "")
        assert "https:" not in content
    assert 'title="id ' in page.read_text(encoding="utf-8")
    import xml.etree.ElementTree as ET

    ET.fromstring(picture.read_text(encoding="utf-8"))


def test_a_report_counts_and_quotes(cdm, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    texts = ["plain words", "e\u0301 is not NFC", "don't"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    page = tmp_path / "report.html"
    record = json.loads(
        cdm("align", "report", file, "--t1", "llama3", "--t2", "qwen2", "--json", "--html", page).out
    )
    assert record["texts"] == 3
    assert record["exact_texts"] == 2
    assert record["worst"][0]["row"] == 2
    changed = record["changes"]["t2"]
    assert [(change["row"], bytes.fromhex(change["text"]).decode()) for change in changed] == [(2, "e\u0301")]
    assert bytes.fromhex(changed[0]["spelled"]).decode() == "é"
    assert record["changes"]["t1"] == []
    content = page.read_text(encoding="utf-8")
    assert '<span>1-1</span><i data-kind="1-1" style="--share: 1.0000"></i><span>' in content
    assert "plain words" in content


def test_a_report_does_not_depend_on_workers(cdm, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"line {i} of {i * 37 % 101}\n" for i in range(2100)), encoding="utf-8")
    answers = [cdm("align", "report", file, *PAIR, "--json", "--workers", n).out for n in (1, 2)]
    assert json.loads(answers[0]) == json.loads(answers[1])


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_an_export_reads_back(cdm, tmp_path: Path, form: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file, out = tmp_path / "texts.txt", tmp_path / "aligned"
    file.write_text("don't\nstop 👍🏽\n", encoding="utf-8")
    assert cdm("align", "export", file, *PAIR, "-o", out, "--format", form).status == 0
    path = out / f"alignments.{form}"
    read = pq.read_table(path) if form == "parquet" else pa.ipc.open_file(str(path)).read_all()
    rows = read.to_pylist()
    shown = [
        json.loads(line) for line in cdm("align", "show", *PAIR, "--file", file, "--json").out.splitlines()
    ]
    for row, record in zip(rows, shown, strict=True):
        assert row["ids_t"] == [token["id"] for token in record["t1"]["tokens"]]
        assert row["end_s"] == [token["end"] for token in record["t2"]["tokens"]]
        assert row["groups"] == [[*group["t1"], *group["t2"]] for group in record["groups"]]
    header = json.loads(read.schema.metadata[b"cdm-alignments"])
    assert header["teacher"] == "llama3"
    assert header["provenance"]["fingerprints"].keys() == {"teacher", "student"}
