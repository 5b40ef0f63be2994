"""A smaller vocabulary of the same kind: a byte-level BPE tokenizer cut to its first ids."""

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
    """Keep `entries` ids of a byte-level BPE tokenizer: bytes and merges in their order, then all added tokens.

    The ids of such a vocabulary are in the order in which its merges were learned, so that its first ids with the
    merges among them are what training would have stopped at earlier. Ids are numbered anew: kept tokens in their old
    order, and behind them the added ones, special or not, in theirs; rules that split a text and what is put around it
    stay. Raises BadOption for another kind of tokenizer, for too few or too many entries, and where the order does not
    hold: a byte is not kept, or a kept token was made of others of which some are not.
    FileProblem where the folder for temporary files is full.
    """
    description = json.loads(loaded.tokenizer.backend_tokenizer.to_str())
    _check(loaded, description, entries)
    return _remade(
        loaded, _cut(description, entries, loaded.view.name), f"{loaded.view.name} cut to {entries}"
    )


def load_cut(tokenizer: str | Loaded, entries: int | None) -> Loaded:
    """Load a tokenizer, whole where `entries` is None. Raises as `load_tokenizer` and `cut`."""
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
    # the library numbers added tokens that the model does not have from the size of its vocabulary on
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
    """See that all bytes are kept, and that a kept token which merges can make is made by those that are left."""
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
    """Take the merges whose parts and result are kept."""
    for left, right in _pairs(description):
        if left in kept and right in kept and left + right in kept:
            yield left, right


def _pairs(description: Description) -> Iterator[tuple[str, str]]:
    """Walk the merges, which older files write as two strings with a blank between."""
    for merge in description["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _renumbered(description: Description, new_ids: Mapping[str, int]) -> dict[str, Any]:
    """Give the post-processor, which names tokens that are put around a text, with their new ids."""
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
    """Load a description with all that the configuration of a tokenizer says besides ids."""
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
    """Put another tokenizer.json in a folder, and drop from tokenizer_config.json what it says of old ids."""
    (folder / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("added_tokens_decoder", None)
    file.write_text(json.dumps(config), encoding="utf-8")
