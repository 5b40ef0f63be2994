"""Small tokenizers of families that no wheel ships, trained here."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from cdm_toolkit.tokdiff.view import TokenizerView, make_view

_FRAGMENTS = (
    *(
        " ",
        "  ",
        "   ",
        "\n",
        "\r\n",
        "\t",
        "\0",
        "\u3000",
        "\u00a0",
        "\u2581",
        "\u2581\u2581",
        "a",
        "Ab",
        "foo",
        "12",
        "2024",
        "##",
    ),
    *(
        "e\u0301",
        "\u00e9",
        "a\u0315\u0300",
        "\u0301",
        "q\u0301\u0323",
        "\u1112\u1161\u11ab",
        "\ud55c",
        "\uff76\uff9e",
        "\ufb01",
        "\u0130",
        "\u03a3",
    ),
    *(
        "\u4f60\u597d",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "\U0001f600",
        "\u2764\ufe0f",
        "\u200d",
        "\u0e01\u0e33",
        "\u0915\u094d\u0937",
        "\ufeff",
    ),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "[UNK]",
        "[MASK]",
        "<|endoftext|>",
        "<|im_start|>",
        "<|end|>",
        "<0x0A>",
        "\u0120a",
    ),
)
texts = st.lists(
    st.one_of(st.sampled_from(_FRAGMENTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=6)),
    max_size=12,
).map("".join)
"""Any Unicode text, with many characters that tokenizers change."""


def _corpus(multilingual: list[str]) -> list[str]:
    return [
        *multilingual,
        *(f"the quick brown fox {i} jumps over {i * 37} lazy dogs, isn't it?" for i in range(200)),
    ]


@pytest.fixture(scope="session")
def made_view(multilingual: list[str], llama2_view: TokenizerView) -> Callable[[str], TokenizerView]:
    """Give the function that makes a small tokenizer of a family by name."""
    made: dict[str, TokenizerView] = {}

    def make(name: str) -> TokenizerView:
        if name not in made:
            made[name] = _MAKERS[name](_corpus(multilingual))
        return made[name]

    return make


def unigram(corpus: list[str]) -> TokenizerView:
    """NFKC, collapsed blanks, Metaspace, characters that are unknown."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<unk>", "<s>", "</s>", "<mask>"]
    short = [text for text in corpus if text.isascii()]
    tokenizer.train_from_iterator(
        short,
        trainers.UnigramTrainer(
            vocab_size=300, unk_token="<unk>", special_tokens=specials, show_progress=False
        ),
    )
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return make_view("unigram", tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def wordpiece(corpus: list[str]) -> TokenizerView:
    """Lower case, accents stripped, blanks lost, ## for what goes on a word."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        corpus, trainers.WordPieceTrainer(vocab_size=900, special_tokens=specials, show_progress=False)
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special_map = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return make_view("wordpiece", tokenizer, special_map)


def roberta_like(corpus: list[str]) -> TokenizerView:
    """Byte-level with a dummy prefix, lower case, and offsets that leave blanks out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        character_coverage=0.98,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True)
    return make_view("roberta-like", tokenizer, {"bos_token": "<s>", "eos_token": "</s>"})


def plain_bpe(corpus: list[str]) -> TokenizerView:
    """Characters as they are, words apart."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator([text for text in corpus if text.isascii()], trainer)
    return make_view("plain-bpe", tokenizer)


def t5_like(corpus: list[str]) -> TokenizerView:
    """Every word apart, each with a dummy prefix of its own."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.NFC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=900, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return make_view("t5-like", tokenizer, {"unk_token": "<unk>"})


def xlmr_like(corpus: list[str]) -> TokenizerView:
    """SentencePiece's own Unigram and its nmt_nfkc character map, as T5 and XLM-R have it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2").ModelProto()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\0", "") for text in corpus),
        model_writer=model,
        vocab_size=800,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    proto.ParseFromString(model.getvalue())
    tokenizer = Tokenizer(models.Unigram([(piece.piece, piece.score) for piece in proto.pieces], unk_id=0))
    character_map = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    tokenizer.normalizer = normalizers.Sequence([character_map, normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return make_view("xlmr-like", tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


_MAKERS = {
    "xlmr-like": xlmr_like,
    "unigram": unigram,
    "wordpiece": wordpiece,
    "roberta-like": roberta_like,
    "plain-bpe": plain_bpe,
    "t5-like": t5_like,
}
MADE = tuple(_MAKERS)


@pytest.fixture(scope="session")
def phi3_like_view(llama2_view: TokenizerView) -> TokenizerView:
    """Llama 2's vocabulary with Phi-3's markers, which swallow the blanks behind them."""
    tokenizer = Tokenizer.from_str(llama2_view.backend.to_str())
    markers = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
    tokenizer.add_special_tokens([AddedToken(marker, rstrip=True, normalized=False) for marker in markers])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return make_view("phi3-like", tokenizer, json.loads('{"bos_token": "<s>", "eos_token": "<|end|>"}'))
