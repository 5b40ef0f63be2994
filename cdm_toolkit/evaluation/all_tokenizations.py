"""The likelihood of a text over all of its tokenizations, beside that of the tokenizer's own.

Bits per byte by `bpb` are of the tokens that the tokenizer makes of a text. The model writes the same bytes in other
tokens, too; their probabilities are part of the text's (Vieira et al., arXiv 2412.03719; Hayase et al., arXiv
2506.14123). The difference says how much of it one tokenization leaves out. It takes a run of the model for each
sequence of tokens that is followed, several for each token of the text: a measure for short texts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cdm_toolkit.errors import CdmError
from cdm_toolkit.evaluation.evaluate import Subject, start_token
from cdm_toolkit.kd.byte_lattice import ByteDistributions, ByteSortedVocab, byte_distributions
from cdm_toolkit.kd.continuations import ReadText


@dataclass(frozen=True, slots=True, eq=False)
class TextLikelihood:
    """The negative log-likelihood of a text in bits, given the token that stands before texts."""

    bits: float
    """That a text begins with its bytes, over all tokenizations; at most `own_bits`."""
    own_bits: float
    """Of the tokens that the tokenizer makes of it."""
    bytes: int
    """Bytes of its tokens: with a dummy prefix where the tokenizer adds one."""
    distributions: ByteDistributions
    """What follows each prefix of it."""

    @property
    def dropped(self) -> float:
        """Share of the text's probability that is missing, had the paths that were dropped gone on as the others."""
        found = self.distributions
        return float(np.exp(found.log_dropped - np.logaddexp(found.log_prefix, found.log_dropped)).sum())


def text_likelihood(subject: Subject, text: str, *, floor: float = 1e-3) -> TextLikelihood:
    """Measure a text. Sequences with less than the share `floor` of the probability of their bytes are dropped.

    With `floor` 0 the result is exact, at a cost that doubles with every few bytes. The tokenizer's own sequence is
    never dropped, so that `bits` is at most `own_bits`, up to float rounding. CdmError for a tokenizer without a
    token to begin a text with.
    """
    view, start = subject.view, start_token(subject.tokenizer)
    if start is None:
        raise CdmError(
            f"{view.name} has no token to begin a text with",
            fix="set its bos_token or eos_token to what its model was trained with",
        )
    own = view.encode(text).ids.tolist()
    spelled = b"".join(view.token_bytes[i] or b"" for i in own)
    read = ReadText(subject.model, [start, *own], vocab=view.vocab_size)
    nats = -sum(float(read.logprobs[n, i]) for n, i in enumerate(own))
    found = byte_distributions(
        spelled, ByteSortedVocab(view.token_bytes), read.after(1), floor=floor, own=own
    )
    return TextLikelihood(-float(found.log_prefix[-1]) / math.log(2), nats / math.log(2), len(spelled), found)
