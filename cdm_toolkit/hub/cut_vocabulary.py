"""Truncate the vocabulary of a byte-level BPE tokenizer to its first merges."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdm_toolkit.errors import BadOption, FileProblem
from cdm_toolkit.hub.tokenizers import Loaded, load_tokenizer
from cdm_toolkit.tokdiff.token_bytes import gpt2_alphabet, parts

if TYPE_CHECKING:
    from cdm_toolkit.tokdiff.token_bytes import Description


def cut(loaded: Loaded, entries: int) -> Loaded:
    """Keep `entries` ids of a byte-level BPE tokenizer: bytes and first merges in order, then all added tokens.

    The ids of such a vocabulary are in the order in which its merges were learned, so its first ids, with the merges
    among them, are the vocabulary of a training that stopped earlier. Ids are renumbered: kept tokens in their old
    order, then the added tokens, special or not, in theirs. Pre-tokenization and post-processing stay the same.
    Raises BadOption for another kind of tokenizer, for too few or too many entries, and for a vocabulary that is not in
    the order of its merges: a byte is not kept, or a kept token is made of tokens that are not. FileProblem where the
    folder for temporary files is full.
    """
    description = json.loads(loaded.tokenizer.backend_tokenizer.to_str())
    _check(loaded, description, entries)
    return _remade(
        loaded, _cut(description, entries, loaded.view.name), f"{loaded.view.name} cut to {entries}"
    )


def load_cut(tokenizer: str | Loaded, entries: int | None) -> Loaded:
    """Load a tokenizer, truncated to `entries` ids unless it is None. Raises as `load_tokenizer` and `cut`."""
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    return loaded if entries is None else cut(loaded, entries)


def _check(loaded: Loaded, description: Description, entries: int) -> None:
    name, family = loaded.view.name, loaded.view.family
    if family != "byte-level BPE":
        raise BadOption(
            "entries", entries, f"it with a byte-level BPE tokenizer, such as gpt2: {name} is {family}"
        )
    added = {token["content"] for token in description["added_tokens"]}
    tokens = added | description["model"]["vocab"].keys()
    least = len(added | gpt2_alphabet().keys() & tokens)
    if not least <= entries <= len(tokens):
        has = f"its bytes and added tokens are {least:,} of {len(tokens):,}"
        raise BadOption("entries", entries, f"{least} to {len(tokens)} for {name}: {has}")


def _cut(description: Description, entries: int, name: str) -> Description:
    vocab, added = description["model"]["vocab"], description["added_tokens"]
    contents = {token["content"] for token in added}
    plain = sorted((token for token in vocab if token not in contents), key=vocab.__getitem__)
    kept = plain[: entries - len(added)]
    _check_order(description, set(kept), plain, entries, name)
    # Added tokens that are not in the model's vocabulary get the ids after it.
    in_order = sorted(added, key=lambda token: (token["content"] not in vocab, token["id"]))
    new_ids = {token: new for new, token in enumerate([*kept, *(token["content"] for token in in_order)])}
    model = {
        **description["model"],
        "vocab": {token: new for token, new in new_ids.items() if token in vocab},
        "merges": list(_merges_among(description, set(kept))),
    }
    tokens = [token | {"id": new_ids[token["content"]]} for token in in_order]
    return {**description, "model": model, "added_tokens": tokens} | _renumbered(description, new_ids)


def _check_order(
    description: Description, kept: Collection[str], plain: Iterable[str], entries: int, name: str
) -> None:
    """Check that all bytes are kept, and that kept tokens made by merges can still be made by the kept merges."""
    letters = gpt2_alphabet()
    made = {left + right for left, right in _merges_among(description, kept)}
    was_made = {left + right for left, right in _pairs(description)}
    lost = [
        token
        for token in plain
        if (token in letters and token not in kept)
        or (token in kept and token in was_made and token not in made)
    ]
    if lost:
        problem = f"{len(lost):,} tokens would be out of reach, {lost[0]!r} among them"
        raise BadOption(
            "entries", entries, f"none: the ids of {name} are not in the order of its merges, {problem}"
        )


def _merges_among(description: Description, kept: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the merges whose parts and result are kept."""
    for left, right in _pairs(description):
        if left in kept and right in kept and left + right in kept:
            yield left, right


def _pairs(description: Description) -> Iterator[tuple[str, str]]:
    """Yield the merges as pairs; older files have them as one string with a space."""
    for merge in description["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _renumbered(description: Description, new_ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the post-processor with the new ids of its special tokens."""
    processor = json.loads(json.dumps(description.get("post_processor")))
    for part in parts(processor):
        if part["type"] == "TemplateProcessing":
            for token in part["special_tokens"].values():
                token["ids"] = [new_ids[content] for content in token["tokens"]]
        for side in ("sep", "cls"):  # of BertProcessing and RobertaProcessing
            if side in part:
                part[side][1] = new_ids[part[side][0]]
    return {"post_processor": processor}


def _remade(loaded: Loaded, description: Description, name: str) -> Loaded:
    """Load a new description with the configuration of the original tokenizer."""
    try:
        with tempfile.TemporaryDirectory(prefix="cdm-cut-") as folder:
            loaded.tokenizer.save_pretrained(folder)
            _replace_description(Path(folder), description)
            found = load_tokenizer(folder)
    except OSError as error:
        problem = f"it cannot be written ({error.strerror})"
        raise FileProblem(tempfile.gettempdir(), problem, "make room there, or set TMPDIR") from None
    found.tokenizer.name_or_path = name
    return Loaded(replace(found.view, name=name), found.tokenizer, loaded.source)


def _replace_description(folder: Path, description: Description) -> None:
    """Replace tokenizer.json in a folder, and remove old ids from tokenizer_config.json."""
    (folder / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("added_tokens_decoder", None)
    file.write_text(json.dumps(config), encoding="utf-8")
