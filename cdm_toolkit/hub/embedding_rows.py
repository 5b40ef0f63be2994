"""Replace the rows of a model's vocabulary: means of old rows, combinations after a donor's, and random ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Shaped
from torch import Tensor

from cdm_toolkit.hub.models import check_vocabulary, load_model, model_fingerprint, model_folder
from cdm_toolkit.hub.omp import Donor, SharedTokens, rows_by_omp, shared_tokens
from cdm_toolkit.hub.tokenizers import load_view
from cdm_toolkit.vocab_map.row_sources import RowSources, SourceKind

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from cdm_toolkit.tokdiff.view import TokenizerView

PIECE_NATS = 1.0
"""What each old token after the first takes from the logit of a new token that is a mean of several.

The mean of their rows has the mean of their logits, but a token is as likely as all its pieces in turn. Without it, the
1,681 numbers that GPT-2 has as tokens and SmolLM2 writes digit by digit hold 0.4 of all probability."""


@dataclass(frozen=True, slots=True, eq=False)
class Donation:
    """A loaded donor, and the tokens that it shares with the old and the new vocabulary."""

    model: PreTrainedModel
    tokens: SharedTokens
    k: int
    fingerprints: dict[str, str]

    def covers(self, sources: RowSources) -> RowSources:
        """Mark the rows that are made after the donor."""
        kind = sources.kind.copy()
        kind[self.tokens.targets_new] = SourceKind.OMP
        return replace(sources, kind=kind)


def load_donation(donor: Donor, old: TokenizerView, new: TokenizerView) -> Donation:
    """Load a donor for the new ids that no single old row is copied to. Raises as `load_model`, CdmError."""
    model, view = load_model(donor.model, dtype="auto"), load_view(donor.model)
    check_vocabulary(model, donor.model, view.vocab_size)
    fingerprints = {
        "donor model": model_fingerprint(model_folder(donor.model)),
        "donor tokenizer": view.fingerprint,
    }
    return Donation(model, shared_tokens(view, old, new), donor.k, fingerprints)


def replace_rows(
    model: PreTrainedModel,
    sources: RowSources,
    seed: int,
    *,
    state: Float[Tensor, " hidden"] | None = None,
    donation: Donation | None = None,
) -> None:
    """Give a model the rows of a new vocabulary, in the input embedding and in an untied output head with its bias.

    With the mean `state` that the head reads (`mean_state`), logits of the head's means of several rows are lowered by
    `PIECE_NATS`. A donation replaces rows of the embedding by those after the donor's, rows of the head by those after
    the donor's head.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    tables = vocabulary_tables(model)
    head = model.get_output_embeddings().weight
    made = [
        new_rows(table.detach(), sources, generator, state if table is head else None) for table in tables
    ]
    if donation is not None:
        donors = donation.model.get_input_embeddings(), donation.model.get_output_embeddings()
        for table, rows, donor in zip(tables, made, donors, strict=False):  # a bias, the third, has no donor
            by_omp = rows_by_omp(table.detach(), donor.weight.detach(), donation.tokens, donation.k)
            rows[torch.from_numpy(donation.tokens.targets_new)] = by_omp
    with torch.random.fork_rng(devices=[]):  # resizing initialises new rows at random
        model.resize_token_embeddings(len(sources.kind), mean_resizing=False)
    with torch.no_grad():
        for table, rows in zip(vocabulary_tables(model), made, strict=True):
            table.copy_(rows)


def vocabulary_tables(model: PreTrainedModel) -> list[Tensor]:
    """List the parameters with a row for each id: input embedding, and an untied head with its bias."""
    inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    own = [] if head is None or head.weight is inputs else [head.weight]
    bias = getattr(head, "bias", None)
    return [inputs, *own, *([] if bias is None else [bias])]


def new_rows(
    table: Shaped[Tensor, "rows_old ..."],
    sources: RowSources,
    generator: torch.Generator,
    state: Float[Tensor, " hidden"] | None = None,
) -> Shaped[Tensor, "vocab_new ..."]:
    """Compute the rows of the new vocabulary, in the table's dtype; means are computed in float32 or better.

    A mean of n rows is moved against `state`, where given, until its product with it is `PIECE_NATS` (n − 1) lower.
    """
    import torch

    old = table[: sources.size_old].reshape(sources.size_old, -1)
    old = old.to(torch.promote_types(old.dtype, torch.float32))
    ids, bounds = torch.from_numpy(sources.ids).long(), torch.from_numpy(sources.indptr)
    rows = torch.nn.functional.embedding_bag(ids, old, bounds, mode="mean", include_last_offset=True)
    if state is not None:
        means = np.flatnonzero(sources.kind == SourceKind.MEAN)
        extra = torch.from_numpy(np.diff(sources.indptr)[means] - 1).to(rows)
        rows[torch.from_numpy(means)] -= PIECE_NATS * torch.outer(extra, (state / state.dot(state)).to(rows))
    fresh = torch.from_numpy(sources.kind == SourceKind.FRESH)
    noise = torch.randn(int(fresh.sum()), old.shape[1], generator=generator, dtype=old.dtype)
    rows[fresh] = old.mean(0) + noise * old.std(0)
    return rows.to(table.dtype).reshape(-1, *table.shape[1:])
