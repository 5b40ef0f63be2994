"""Sources of rows: the same rows from files of every kind, by pattern, from a folder; limits, columns, bad input."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdm_toolkit.distill.settings import SourceConfig
from cdm_toolkit.distill.sources import Rows
from cdm_toolkit.errors import BadRow, FileProblem
from cdm_toolkit.kd.rows import Row

from ..hub.hub_server import serve

RECORDS = [
    {"prompt": f'What is {n} + {n}?\nSay, "please".', "completion": f"{2 * n}, naïve, 東京"} for n in range(7)
]


def jsonl(path: Path, records: Sequence[Any]) -> Path:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(lines, encoding="utf-8")
    return path


def zipped(path: Path, records: Sequence[Any]) -> Path:
    path.write_bytes(gzip.compress(jsonl(path.with_suffix(""), records).read_bytes()))
    return path


def as_json(path: Path, records: Sequence[Any]) -> Path:
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


def table(path: Path, records: Sequence[Any]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(records)
    return path


def parquet(path: Path, records: Sequence[Any]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(records)), path, row_group_size=3)
    return path


def arrow(path: Path, records: Sequence[Any]) -> Path:
    import pyarrow as pa

    whole = pa.Table.from_pylist(list(records))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=2)
    return path


def stream(path: Path, records: Sequence[Any]) -> Path:
    import pyarrow as pa

    whole = pa.Table.from_pylist(list(records))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    return path


def saved(path: Path, records: Sequence[Any]) -> Path:
    import datasets

    datasets.Dataset.from_list(list(records)).save_to_disk(path)
    return path


KINDS: dict[str, Callable[[Path, Sequence[Any]], Path]] = {
    "rows.jsonl": jsonl,
    "rows.jsonl.gz": zipped,
    "rows.json": as_json,
    "lines.json": jsonl,
    "rows.csv": table,
    "rows.tsv": table,
    "rows.parquet": parquet,
    "rows.arrow": arrow,
    "stream.arrow": stream,
    "folder": saved,
}


def rows_of(*sources: str | Path | dict[str, Any], seed: int = 0) -> Rows:
    made = (each if isinstance(each, dict) else {"path": str(each)} for each in sources)
    return Rows(tuple(SourceConfig.model_validate(each | {"path": str(each["path"])}) for each in made), seed)


@pytest.fixture
def plain(tmp_path: Path) -> list[Row]:
    return list(rows_of(jsonl(tmp_path / "plain.jsonl", RECORDS)))


@pytest.mark.parametrize("name", KINDS)
def test_all_kinds_of_files_give_the_same_rows(name: str, tmp_path: Path, plain: list[Row]) -> None:
    rows = rows_of(KINDS[name](tmp_path / name, RECORDS))
    assert (
        list(rows)
        == plain
        == [Row(n, each["prompt"], each["completion"]) for n, each in enumerate(RECORDS, 1)]
    )
    assert len(rows) == 7
    assert rows.fingerprint == rows_of(tmp_path / "plain.jsonl").fingerprint
    assert list(rows) == plain, "a second pass reads the same"


def test_rows_go_on_from_file_to_file_and_from_source_to_source(tmp_path: Path, plain: list[Row]) -> None:
    (tmp_path / "parts").mkdir()
    jsonl(tmp_path / "parts" / "a.jsonl", RECORDS[:2])
    parquet(tmp_path / "parts" / "b.parquet", RECORDS[2:5])
    last = table(tmp_path / "c.csv", RECORDS[5:])
    rows = rows_of(tmp_path / "parts" / "*", last)
    assert list(rows) == plain
    assert rows.source_of(np.array([1, 5, 6, 7])).tolist() == [0, 0, 1, 1]
    assert rows_of(last).source_of(np.array([1, 2])).tolist() == [0, 0]
    deep = rows_of(tmp_path / "**" / "*.jsonl")
    assert len(list(deep)) == 9


def test_a_limit_takes_the_first_rows_or_any(tmp_path: Path, plain: list[Row]) -> None:
    path = jsonl(tmp_path / "rows.jsonl", RECORDS)
    assert list(rows_of({"path": path, "limit": 3})) == plain[:3]
    some = rows_of({"path": path, "limit": 3, "shuffle": True}, seed=1)
    assert [row.number for row in some] == sorted({row.number for row in some})
    assert len(some) == 3
    assert set(some) <= set(plain)
    assert set(some) == set(rows_of({"path": path, "limit": 3, "shuffle": True}, seed=1))
    assert any(
        set(rows_of({"path": path, "limit": 3, "shuffle": True}, seed=s)) != set(some) for s in range(5)
    )
    assert list(rows_of({"path": path, "limit": 99})) == plain


def test_columns_may_be_named_otherwise(tmp_path: Path, plain: list[Row]) -> None:
    others = [{"id": 1, "text": "no", "q": each["prompt"], "a": each["completion"]} for each in RECORDS]
    path = parquet(tmp_path / "rows.parquet", others)
    assert list(rows_of({"path": path, "columns": {"prompt": "q", "completion": "a"}})) == plain
    with pytest.raises(BadRow, match=r"row 1: it has no column 'b', but id, text, q, a; mend `columns`"):
        list(rows_of({"path": path, "columns": {"prompt": "q", "completion": "b"}}))


TURNS = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "2?"), ("assistant", "3")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": content}
    for role, content in TURNS
]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": MESSAGES},
        {"conversations": SHAREGPT},
        {"conversations": MESSAGES},
        {"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]},
    ],
)
@pytest.mark.parametrize("write", [jsonl, parquet])
def test_chats_of_all_shapes_are_one(
    record: dict[str, Any], write: Callable[[Path, Sequence[Any]], Path], tmp_path: Path
) -> None:
    (row,) = rows_of(write(tmp_path / f"rows.{write.__name__}", [record]))
    assert row.chat == MESSAGES
    assert row.completion == "3"


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"instruction": "Add.", "input": "2 and 3", "output": "5"}, "Add.\n\n2 and 3"),
        ({"instruction": "Add.", "input": "", "output": "5"}, "Add."),
        ({"instruction": "Add.", "output": "5"}, "Add."),
        ({"question": "Add.", "answer": "5"}, "Add."),
        ({"text": "5"}, ""),
    ],
)
def test_texts_of_all_shapes(record: dict[str, Any], prompt: str, tmp_path: Path) -> None:
    (row,) = rows_of(jsonl(tmp_path / "rows.jsonl", [record]))
    assert (row.prompt, row.completion) == (prompt, "5")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.jsonl", None, "none.jsonl: there is no such file"),
        ("none/*.jsonl", None, "none/*.jsonl: no file matches"),
        ("empty.jsonl", "", "empty.jsonl: it has no rows; give data whose rows have prompt and completion"),
        ("mixed.jsonl", '{"text": "a"}\n{"question": "b", "answer": "c"}\n', "row 2: it has question and answer, "),
        ("bad.json", "[1,", "it is not JSON (Expecting value, line 1, column 4); give a list of objects"),
        ("list.json", "[1, 2]", "list.json, row 1: it is not a JSON object; give each row"),
        ("bad.csv", 'prompt,completion\n"a,b\n', "it is not CSV after line 1 (unexpected end of data); name the"),
        ("long.csv", "prompt,completion\na,b,c\n", "its row 1 has more values than there are columns"),
        ("short.csv", "prompt,completion\na\n", "row 1: it has prompt; give each row"),
        ("bad.parquet", "no parquet", "bad.parquet: it is not parquet ("),
        ("bad.arrow", "no arrow", "bad.arrow: it is not arrow ("),
        ("number.jsonl", '{"text": 3}', "number.jsonl, row 1: text is int, not a string"),
        ("turns.jsonl", '{"conversations": "hi"}', "conversations is not a list of objects"),
    ],
)  # fmt: skip
def test_bad_data_is_one_line(name: str, content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((FileProblem, BadRow)) as caught:
        list(rows_of(tmp_path / name))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match=r"it is a folder; give files, such as .*/\*.parquet"):
        list(rows_of(tmp_path))


# The hub

ASK = """
import json, sys
from cdm_toolkit.distill.settings import SourceConfig
from cdm_toolkit.distill.sources import Rows
from cdm_toolkit.errors import CdmError
for source in json.loads(sys.argv[1]):
    try:
        rows = Rows((SourceConfig(**source),))
        print(json.dumps([rows.fingerprint, len(rows)]))
    except CdmError as error:
        print(json.dumps(str(error)))
"""


def ask_hub(
    endpoint: str, home: Path, sources: Sequence[dict[str, Any]], **environment: str
) -> tuple[list[Any], str]:
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(sources)],
        env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_a_data_set_on_the_hub_gives_the_same_rows(tmp_path: Path) -> None:
    """By id, revision, config and split; kept for a machine that is offline; what fails is one line."""
    path, test = jsonl(tmp_path / "rows.jsonl", RECORDS), jsonl(tmp_path / "test.jsonl", RECORDS[:2])
    other = jsonl(tmp_path / "other.jsonl", RECORDS[3:])
    card = """---
configs:
- {config_name: first, data_files: [{split: train, path: a.jsonl}, {split: test, path: b.jsonl}]}
- {config_name: second, data_files: c.jsonl}
---
"""
    files = {"README.md": card.encode(), "a.jsonl": path.read_bytes(), "b.jsonl": test.read_bytes()}
    with serve() as hub:
        old = hub.add("datasets/org/set", {"rows.jsonl": test.read_bytes()})
        hub.add("datasets/org/set", files | {"c.jsonl": other.read_bytes()})
        hub.add("datasets/org/plain", {"train.jsonl": path.read_bytes()})
        hub.add("datasets/org/gated", {"train.jsonl": path.read_bytes()}, token="secret")
        found, said = ask_hub(
            hub.endpoint,
            tmp_path / "home",
            [
                {"path": "org/plain"},
                {"path": "org/plain@main"},
                {"path": f"org/set@{old}"},
                {"path": "org/set", "config": "first", "split": "test"},
                {"path": "org/set", "config": "second"},
                {"path": "org/set"},
                {"path": "org/set", "config": "third"},
                {"path": "org/plain", "split": "validation"},
                {"path": "org/plain", "split": "train+test"},
                {"path": "org/none"},
                {"path": "org/plain@none"},
                {"path": "org/gated"},
            ],
        )
        same = [rows_of(path).fingerprint, 7]
        few, second = [rows_of(test).fingerprint, 2], [rows_of(other).fingerprint, 4]
        assert found[:5] == [same, same, few, few, second]
        *_, missing, third, validation, sum_of_splits, none, revision, gated = found
        for line, words in (
            (missing, "org/set: it cannot be read (Config name is missing. Please pick one among"),
            (third, "BuilderConfig 'third' not found"),
            (validation, 'Unknown split "validation"'),
            (sum_of_splits, 'Unknown split "test"'),
            (none, "org/none: there is no such file, and no such data set on the hub"),
            (revision, "org/plain@none: "),
            (gated, "org/gated: "),
        ):
            assert words in line
            assert "\n" not in line
        assert said == ""
    offline, _ = ask_hub(hub.endpoint, tmp_path / "home", [{"path": "org/plain"}], HF_HUB_OFFLINE="1")
    assert offline == [same]
    (unknown,), _ = ask_hub(hub.endpoint, tmp_path / "home", [{"path": "org/more"}], HF_HUB_OFFLINE="1")
    assert "org/more: " in unknown
