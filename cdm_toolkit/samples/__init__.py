"""Arithmetic word problems that the project wrote itself: `tools/make_sample` generates them."""

from pathlib import Path

SPLITS = ("train", "heldout")


def sample_path(split: str) -> Path:
    """Find the JSONL file of a split, one of `SPLITS`."""
    return Path(__file__).with_name(f"word_problems_{split}.jsonl")
