"""Every error, printed once into a page that a person can read as prose."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path

from cdm_toolkit import errors
from cdm_toolkit.errors import CdmError

GOLDEN = Path(__file__).with_name("errors.golden.txt")

LLAMA3 = ("llama3", "9f3c51d2aa")
QWEN2 = ("qwen2", "1b77e0c4bb")

EXAMPLES: list[CdmError] = [
    errors.BadOption("--max-edit-distance", 1.5, "a number above 0 and below 1"),
    errors.TwoWays("--overwrite", "--resume"),
    errors.UnknownName("aligner", "byte", ["bytes", "dtw", "entropy-dtw", "anchored"]),
    errors.SourceNotFound(
        "gemma2",
        ["local folder: there is none of this name", "cache: not there", "hub: HF_HUB_OFFLINE is set"],
        needs="tokenizer.json",
    ),
    errors.DamagedSource("qwen2", "qwen.tiktoken", "b2b1b8dfb5cc5f02", "0000aaaa0000aaaa"),
    errors.UnsupportedTokenizer("my-tokenizer", "it has no fast backend"),
    errors.ModelNotLoaded("out/student", "config.json is missing", "give a folder that holds a model"),
    errors.MissingExtra("lm-eval", "eval", "the suite 'math'"),
    errors.FileProblem("data.jsonl", "there is no such file"),
    errors.BadRow("data.jsonl", 7, "has neither of the field sets", "give prompt and completion"),
    errors.OutputExists("out", can_resume=True),
    errors.BadArtifact("map.safetensors", "it ends too early", "build it again: cdm vocab-map build"),
    errors.TokenizerMismatch(
        "the mapping", "teacher", LLAMA3, QWEN2, "rebuild it: cdm vocab-map build --t1 qwen2"
    ),
    errors.BadText("has a lone surrogate at character 3 (U+D800)", "save it as UTF-8 without surrogates"),
    errors.UnknownTokenId("llama3", 130000, 128256),
    errors.DoesNotSpell("llama3", 12, "'foo'", b"bar"),
    errors.BadRunConfig("run.yaml", ["train.lr is -1: give a number above 0", "methd: did you mean method?"]),
    errors.NothingToTrain("data.jsonl", "12 rows: 12 too long"),
    errors.NotFinite("the loss", 41, "the checkpoint of step 40 is kept in out/checkpoint-40"),
    errors.Interrupted(
        "the run", "step 40 of 200 is kept in out/checkpoint-40", "cdm distill run.yaml --resume"
    ),
    errors.VocabularyTooSmall("out/student", 32000, 128256),
    errors.NoData("math", ["openai/gsm8k on the hub: HF_HUB_OFFLINE is set"], "question and answer"),
    errors.CodeNotAllowed("code", 164, "user, mount, pid, resource limits"),
    errors.IsolationMissing("user, mount, pid", "unshare: Operation not permitted"),
]


def test_every_error_has_an_example() -> None:
    kinds = {
        kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, CdmError)
    } - {CdmError}
    assert kinds == {type(example) for example in EXAMPLES}


def test_errors_read_as_the_golden_page() -> None:
    page = "".join(f"{type(example).__name__}: {example}\n" for example in EXAMPLES)
    assert page == GOLDEN.read_text(encoding="utf-8"), (
        "read the new page as prose, then write it to the golden file"
    )


def test_each_error_is_one_line_with_a_fix() -> None:
    for example in EXAMPLES:
        assert "\n" not in str(example)
        assert example.fix, f"{type(example).__name__} does not say how to mend it"


def test_errors_come_out_of_other_processes_whole() -> None:
    for example in EXAMPLES:
        copy = pickle.loads(pickle.dumps(example))
        assert (type(copy), str(copy)) == (type(example), str(example))
        assert (copy.what, copy.got, copy.fix) == (example.what, example.got, example.fix)
