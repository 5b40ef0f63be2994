"""Entropies of models in memory, for the data step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64, Int32

from cdm_toolkit.hub.token_entropies import batch_entropies

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, eq=False)
class ModelEntropies:
    """Ask loaded models: what `build_dataset` takes."""

    models: Mapping[int, Callable[[], PreTrainedModel]]
    """By side: 0 is the student, 1 the first teacher. A side that is not there weighs all its tokens the same."""
    fingerprint: str
    """Names the models."""
    on_sequences: Callable[[int], None] = lambda _some: None
    """Is told how many sequences a call has run."""

    def along(
        self, side: int, sequences: Sequence[Int32[np.ndarray, " _"]], *, vocab: int
    ) -> Sequence[Float64[np.ndarray, " time"]]:
        """Give the entropy, in nats, of the prediction after each token."""
        if side not in self.models:
            return [np.zeros(len(ids)) for ids in sequences]
        found = batch_entropies(self.models[side](), sequences, vocab=vocab)
        self.on_sequences(len(sequences))
        return found
