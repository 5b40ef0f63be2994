"""Texts that the project wrote itself: arithmetic word problems (`tools/make_sample` generates them), short prose."""

from pathlib import Path

FILES = {
    "train": "word_problems_train.jsonl",
    "heldout": "word_problems_heldout.jsonl",
    "prose": "prose.jsonl",
    "languages": "languages.jsonl",
}
"""File of each sample: word problems to train on and to hold out; English prose; prose in six other languages."""


def sample_path(name: str) -> Path:
    """Find the JSONL file of a sample, one of `FILES`."""
    return Path(__file__).with_name(FILES[name])
