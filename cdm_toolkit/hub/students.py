"""Create student models: randomly initialised ones, and trained ones with another vocabulary or fewer layers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.errors import BadOption, CdmError, OutputExists
from cdm_toolkit.hub.cut_vocabulary import load_cut
from cdm_toolkit.hub.embedding_rows import Donation, load_donation, replace_rows
from cdm_toolkit.hub.hidden_states import mean_state, token_sequences
from cdm_toolkit.hub.models import (
    check_vocabulary,
    load_model,
    model_fingerprint,
    model_folder,
    model_folder_to_fill,
    save_model,
)
from cdm_toolkit.hub.omp import Donor
from cdm_toolkit.hub.prune_layers import Pruned, prune_layers
from cdm_toolkit.hub.tokenizers import Loaded, load_tokenizer
from cdm_toolkit.vocab_map.row_sources import SourceCounts, row_sources

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Shape:
    """Width and depth of a Llama-architecture model with tied embeddings."""

    hidden: int
    layers: int

    @property
    def heads(self) -> int:
        return self.hidden // HEAD

    @property
    def feed_forward(self) -> int:
        """8/3 of the width, as in Llama, rounded to a multiple of 32."""
        return 32 * round(self.hidden * 8 / 3 / 32)

    def parameters(self, vocab: int) -> int:
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.feed_forward + 2 * self.hidden
        return vocab * self.hidden + self.layers * layer + self.hidden


HEAD = 64
"""Width of an attention head."""
LAYER_WIDTH = 64
"""Target ratio of width to depth: 768 for 12 layers, 1,024 for 16."""
TOLERANCE = 0.15
"""Maximum relative difference between parameters and budget."""


def parse_size(size: str) -> int:
    """Parse a number of parameters.

    >>> parse_size("10m"), parse_size("1.5B")
    (10000000, 1500000000)
    """
    units = {"k": 10**3, "m": 10**6, "b": 10**9}
    digits, unit = (size[:-1], units[size[-1].lower()]) if size[-1:].lower() in units else (size, 1)
    try:
        count = float(digits) * unit
    except ValueError:
        count = math.nan
    if not 1 <= count < math.inf:
        raise BadOption("size", size, "a number of parameters, such as 10m or 1.5b")
    return round(count)


def student_shape(vocab: int, parameters: int) -> Shape:
    """Choose width and depth with a ratio closest to 64, within 15 % of the budget.

    >>> student_shape(32_000, 10_000_000)
    Shape(hidden=256, layers=4)
    """
    shapes = [
        shape
        for hidden in range(HEAD, 8192 + 1, HEAD)
        for layers in _depths(vocab, parameters, hidden)
        if abs((shape := Shape(hidden, layers)).parameters(vocab) / parameters - 1) <= TOLERANCE
    ]
    if not shapes:
        least = Shape(HEAD, 1).parameters(vocab)
        raise BadOption(
            "size", f"{parameters:,}", f"at least {least:,} parameters: the vocabulary has {vocab:,} ids"
        )

    def mismatch(shape: Shape) -> tuple[float, float]:
        return (
            abs(math.log(shape.hidden / (LAYER_WIDTH * shape.layers))),
            abs(shape.parameters(vocab) - parameters),
        )

    return min(shapes, key=mismatch)


def _depths(vocab: int, parameters: int, hidden: int) -> range:
    """Give the numbers of layers, up to 128, that may be within the budget at a width; one more on either side."""
    without, with_one = (Shape(hidden, layers).parameters(vocab) for layers in (0, 1))
    least, most = (
        ((1 + share) * parameters - without) / (with_one - without) for share in (-TOLERANCE, TOLERANCE)
    )
    return range(max(1, math.floor(least)), min(128, math.ceil(most)) + 1)


def student_config(tokenizer: PreTrainedTokenizerFast, vocab: int, shape: Shape) -> LlamaConfig:
    """Describe a Llama-architecture model for a tokenizer's vocabulary and special tokens."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_student(
    tokenizer: str | Loaded,
    size: str,
    output: str | Path,
    *,
    entries: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> PreTrainedModel:
    """Create and save an untrained Llama-architecture model of about `size` parameters, with its tokenizer.

    `entries` truncates the vocabulary to that many ids (`cut`). The weights depend on shape and seed alone. Raises
    OutputExists, BadOption for a size that is too small for the vocabulary, FileProblem, and as `cut`.
    """
    import torch
    from transformers import LlamaForCausalLM

    output, parameters = Path(output), parse_size(size)
    _check_free(output, overwrite=overwrite)
    loaded = load_cut(tokenizer, entries)
    vocab = loaded.view.vocab_size
    config = student_config(loaded.tokenizer, vocab, student_shape(vocab, parameters))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    facts = provenance(fingerprints={"tokenizer": loaded.view.fingerprint}, seed=seed, device="cpu")
    _save(model, loaded, output, {**facts, "tokenizer": loaded.view.name, "size": size})
    return model.eval()


def _check_free(output: Path, *, overwrite: bool) -> None:
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not overwrite)):
        raise OutputExists(output)


def _save(model: PreTrainedModel, tokenizer: Loaded, output: Path, facts: Mapping[str, Any]) -> None:
    """Write a model, its tokenizer and its provenance."""
    with model_folder_to_fill(output) as folder:
        save_model(model, tokenizer, folder)
        (folder / "provenance.json").write_text(
            json.dumps(facts, indent=1, ensure_ascii=False) + "\n", "utf-8"
        )


# Another vocabulary

OTHER_IDS = (
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "sequence_bias",
)
"""Generation settings with ids of the old vocabulary, which are removed."""


@dataclass(frozen=True, slots=True)
class Transplanted:
    """Number of parameters and ids of a transplanted model, and what was done to it."""

    parameters: int
    vocab_size: int
    rows: SourceCounts | None
    """Number of new embedding rows by source; None where the model keeps its vocabulary."""
    pruned: Pruned | None
    """The layers that were left out; None where all are kept."""


def transplant(
    source: str,
    tokenizer: str | Loaded | None,
    output: str | Path,
    *,
    entries: int | None = None,
    layers: int | None = None,
    texts: Sequence[str] = (),
    donor: Donor | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Transplanted:
    """Give a trained model another vocabulary, fewer layers, or both, and save it. All else, the dtype too, is kept.

    The rows of the new vocabulary, in the input embedding and in an untied output head (with its bias), are copies or
    means of the old rows from `row_sources`. A fresh row is the mean of the rows of all old ids plus Gaussian noise
    with their standard deviation in each column, drawn with `seed`. Padding rows of the old embedding are not used,
    and the new one has none. `entries` truncates the new vocabulary, or the model's own without `tokenizer`, to that
    many ids (`cut`). With a `donor`, new ids that it has get a row by orthogonal matching pursuit in place of a mean or
    a fresh one; without `tokenizer` the new vocabulary is then the donor's.

    The model reads `texts` with its own tokenizer. `layers` is how many to keep: those of greatest block influence on
    them (`prune_layers`). Their mean hidden state makes means of several rows less likely (`new_rows`), which without
    texts are plain means.

    Raises OutputExists, SourceNotFound, ModelNotLoaded, VocabularyTooSmall where the model has no row for some id of
    its own tokenizer, CdmError where nothing is asked for, FileProblem, and as `cut` and `prune_layers`.
    """
    output = Path(output)
    _check_free(output, overwrite=overwrite)
    if tokenizer is None and donor is not None:
        tokenizer = donor.model
    if tokenizer is None and entries is None and layers is None:
        raise CdmError("nothing of the model would change", fix="give `tokenizer`, `entries` or `layers`")
    old = load_tokenizer(source)
    new = load_cut(old if tokenizer is None else tokenizer, entries)
    model = load_model(source, dtype="auto")
    check_vocabulary(model, source, old.view.vocab_size)
    fingerprints = {
        "source model": model_fingerprint(model_folder(source)),
        "source tokenizer": old.view.fingerprint,
        "tokenizer": new.view.fingerprint,
        "texts": hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest(),
    }
    pruned, counts = None, None
    if layers is not None:
        model, pruned = prune_layers(model, old.view, layers, texts)
    if new is not old:
        donation = None if donor is None else load_donation(donor, old.view, new.view)
        fingerprints |= {} if donation is None else donation.fingerprints
        counts = _change_vocabulary(model, old, new, texts, donation, seed)
    facts = {
        **provenance(fingerprints=fingerprints, seed=seed, device="cpu"),
        "source": source,
        "tokenizer": new.view.name,
        "rows": counts and asdict(counts),
        "donor": donor and asdict(donor),
        "layers": pruned and asdict(pruned),
    }
    _save(model, new, output, facts)
    return Transplanted(model.num_parameters(), new.view.vocab_size, counts, pruned)


def _change_vocabulary(
    model: PreTrainedModel,
    old: Loaded,
    new: Loaded,
    texts: Sequence[str],
    donation: Donation | None,
    seed: int,
) -> SourceCounts:
    """Replace a model's rows and special ids by those of a new tokenizer; count the rows by their source."""
    sources = row_sources(old.view, new.view)
    if donation is not None:
        sources = donation.covers(sources)
    sequences = token_sequences(model, old.view, texts)
    state = mean_state(model, sequences) if sequences else None
    replace_rows(model, sources, seed, state=state, donation=donation)
    _set_special_ids(model, new.tokenizer)
    return sources.counts


def _set_special_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Set the new tokenizer's special ids in the configs, and remove other settings with old ids."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        for role in ("bos", "eos", "pad", "unk"):
            if role != "unk" or hasattr(config, "unk_token_id"):
                setattr(config, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
    generation = model.generation_config
    for role in ("bos", "eos", "pad"):
        setattr(generation, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
    for name in OTHER_IDS:
        if getattr(generation, name, None) is not None:
            setattr(generation, name, None)
