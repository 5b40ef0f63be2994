"""What servers do for a teacher: how fast, how many candidates, and whether they agree with the model in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cdm_toolkit.forward import logits_by_batch
from cdm_toolkit.kd.sparse_logprobs import log_sum_exp
from cdm_toolkit.teachers.engines import Scored
from cdm_toolkit.teachers.scoring_client import ServerSettings
from cdm_toolkit.teachers.served import connect

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cdm_toolkit.kd.tokenized_rows import TokenizerSide


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a server's log-probabilities are from those of a model in memory, over the tokens of the texts."""

    mean: float
    largest: float
    """In nats."""
    same_best: float
    """Share of positions whose likeliest token is the same."""


@dataclass(frozen=True, slots=True)
class ServerCheck:
    """What was found out; speed and bytes are of all texts, with `in_flight` requests open."""

    k: int
    """Candidates that were given at each position."""
    bits_per_byte: float
    """Of a known English text: far above 2 is not what a trained model gives."""
    texts: int
    tokens: int
    seconds: float
    bytes_per_token: float
    """Received."""
    retries: int
    agreement: Agreement | None
    notes: tuple[str, ...]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def check_servers(
    settings: ServerSettings,
    side: TokenizerSide,
    texts: Sequence[str],
    *,
    k: int,
    model: PreTrainedModel | None = None,
    on_text: Callable[[int], None] = lambda _: None,
) -> ServerCheck:
    """Score texts, and compare with a `model` where one is given. `k` is what is asked for; servers may give fewer.

    Raises as `connect`, and ServerProblem where a text is not answered.
    """
    connection = connect(settings, side, k=k, at_most=True)
    client = connection.client
    try:
        sequences = [side.framed(side.view.encode(text).ids, ended=False) for text in texts]
        received, began = client.bytes_received, time.perf_counter()
        futures = [client.submit(ids.tolist(), 0, connection.k) for ids in sequences]
        scored = []
        for nth, future in enumerate(futures):
            scored.append(future.result())
            on_text(nth + 1)
        seconds = time.perf_counter() - began
        tokens = sum(map(len, sequences))
        return ServerCheck(
            k=connection.k,
            bits_per_byte=connection.bits_per_byte,
            texts=len(texts),
            tokens=tokens,
            seconds=seconds,
            bytes_per_token=(client.bytes_received - received) / tokens,
            retries=client.retries,
            agreement=None if model is None else _agreement(model, sequences, scored, side.view.vocab_size),
            notes=connection.notes,
        )
    finally:
        client.close()


def _agreement(
    model: PreTrainedModel, sequences: Sequence[np.ndarray], scored: Sequence[Scored], vocab: int
) -> Agreement:
    apart, same = [], []
    positions = [range(len(ids) - 1) for ids in sequences]
    for batch in logits_by_batch(model, sequences, positions):
        for row, logits in batch.by_row():
            real = logits.narrow(1, 0, vocab)
            following = torch.from_numpy(sequences[row][1:].astype(np.int64)).to(real.device)
            own = real.gather(1, following[:, None])[:, 0].float() - log_sum_exp(real)
            apart.append(np.abs(own.cpu().numpy() - scored[row].token_logprobs))
            same.append(real.argmax(1).cpu().numpy() == scored[row].ids[:, 0])
    every = np.concatenate(apart)
    return Agreement(float(every.mean()), float(every.max()), float(np.concatenate(same).mean()))
