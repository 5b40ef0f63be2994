"""Every error, printed once into a page that a person can read as prose: as Python and a terminal say it."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import typer

from cdm_toolkit import errors
from cdm_toolkit.cli import translate_messages
from cdm_toolkit.cli.app import app
from cdm_toolkit.errors import CdmError

GOLDEN = Path(__file__).with_name("errors.golden.txt")

LLAMA3 = ("llama3", "9f3c51d2aa")
QWEN2 = ("qwen2", "1b77e0c4bb")

EXAMPLES: list[tuple[str, CdmError]] = [
    (
        "vocab-map build",
        errors.BadOption("max_edit_distance", 1.5, "a number between 0 and 1, such as 0.3"),
    ),
    ("distill", errors.TwoWays("overwrite", "resume")),
    ("align show", errors.UnknownName("aligner", "byte", ["bytes", "dtw", "entropy-dtw", "anchored"])),
    (
        "tokenizer info",
        errors.SourceNotFound(
            "gemma2",
            ["local folder: there is none of this name", "cache: not there", "hub: HF_HUB_OFFLINE is set"],
            needs="tokenizer.json",
        ),
    ),
    (
        "tokenizer info",
        errors.SourceNotFound(
            "lama3",
            [
                "the folder lama3 (not there)",
                "the hub's lama3 (there is no such repository, or it is private)",
            ],
            needs="a tokenizer.json",
            near="llama3",
            fix="check the spelling, log in or set HF_TOKEN where it is private",
        ),
    ),
    ("models fetch", errors.DamagedSource("qwen2", "qwen.tiktoken", "b2b1b8dfb5cc5f02", "0000aaaa0000aaaa")),
    ("tokenizer info", errors.UnsupportedTokenizer("my-tokenizer", "it has no fast backend")),
    (
        "generate",
        errors.ModelNotLoaded(
            "out/student",
            "it needs 34.0 GiB of memory in float32, 9.1 GiB are available on cuda",
            "end other programs, choose another `device`, or take a smaller model",
        ),
    ),
    ("eval", errors.MissingExtra("lm-eval", "eval", "the suite 'math'")),
    ("align report", errors.FileProblem("data.jsonl", "there is no such file")),
    (
        "distill",
        errors.BadRow("data.jsonl", 7, "it has question, not answer", "give each row question and answer"),
    ),
    ("distill", errors.OutputExists("out", can_resume=True)),
    (
        "vocab-map stats",
        errors.BadArtifact(
            "table.safetensors", "it ends too early", "build it again with `build_neighbours`"
        ),
    ),
    (
        "vocab-map stats",
        errors.TokenizerMismatch(
            "the neighbour table",
            "teacher",
            LLAMA3,
            QWEN2,
            "build it again with `build_neighbours(load_view('qwen2'), load_view('mistral'))`",
        ),
    ),
    (
        "teacher convert",
        errors.TokenizerMismatch.by_size("teacher-set", "a vocabulary of 151,936", "smollm2", 49152),
    ),
    (
        "align show",
        errors.BadText("has a lone surrogate at character 3 (U+D800)", "save it as UTF-8 without surrogates"),
    ),
    ("vocab-map show", errors.UnknownTokenId("llama3", 130000, 128256)),
    ("align show", errors.DoesNotSpell("llama3", 12, "'foo'", b"bar")),
    (
        "distill",
        errors.ServerProblem(
            "http://host:8000", "cannot be reached (connection refused)", "start it, or check `url`"
        ),
    ),
    (
        "distill",
        errors.BadSettings(
            "run.yaml", ["train.lr is -1: give a number above 0", "methd is no setting, did you mean method?"]
        ),
    ),
    ("distill", errors.NothingToTrain("data.jsonl", "12 rows: 12 too long")),
    (
        "distill",
        errors.NotFinite("the loss", 41, "the checkpoint of step 40 is kept in out/checkpoint-40"),
    ),
    (
        "distill",
        errors.Interrupted(
            "the run", "step 40 of 200 is kept in out/checkpoint-40", "the same run with `resume`"
        ),
    ),
    ("eval", errors.VocabularyTooSmall("out/student", 32000, 128256)),
    (
        "eval",
        errors.NoData("math", ["openai/gsm8k on the hub: HF_HUB_OFFLINE is set"], "question and answer"),
    ),
    ("eval", errors.CodeNotAllowed("code", 164, "user, mount, pid, resource limits")),
    ("eval", errors.IsolationMissing("user, mount, pid", "unshare: Operation not permitted")),
]
"""An example of each error, with a command that can meet it."""


def test_every_error_has_an_example() -> None:
    kinds = {
        kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, CdmError)
    } - {CdmError}
    assert kinds == {type(example) for _, example in EXAMPLES}


def _shown(command: str, example: CdmError) -> str:
    """Give the library's line, and below it the command's where that differs."""
    translate_messages.start(typer.main.get_command(app), command.split())
    said, shown = str(example), translate_messages.in_terminal(str(example))
    terminal = "" if shown == said else f"    cdm {command}: {shown}\n"
    return f"{type(example).__name__}: {said}\n{terminal}"


def test_errors_read_as_the_golden_page() -> None:
    page = "".join(_shown(*example) for example in EXAMPLES)
    assert page == GOLDEN.read_text(encoding="utf-8"), (
        "read the new page as prose, then write it to the golden file"
    )


def test_each_error_is_one_line_with_a_fix() -> None:
    for _, example in EXAMPLES:
        assert "\n" not in str(example)
        assert example.fix, f"{type(example).__name__} does not say how to mend it"


def test_errors_come_out_of_other_processes_whole() -> None:
    for _, example in EXAMPLES:
        copy = pickle.loads(pickle.dumps(example))
        assert (type(copy), str(copy)) == (type(example), str(example))
        assert (copy.what, copy.got, copy.fix) == (example.what, example.got, example.fix)
