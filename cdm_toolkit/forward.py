"""Run a causal model over many sequences: one rule of batches, padding, device and inference mode for all."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from cdm_toolkit.batching import TOKENS_AT_ONCE, batches, packed, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = Sequence[int] | Int[np.ndarray, " _"]
Run = Callable[..., Float[Tensor, "position width"]]


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBatch:
    """What a model gives at the wanted positions of sequences that ran together, one row after the other."""

    rows: list[int]
    """Indices of the sequences, the longest first."""
    counts: list[int]
    """How many positions of each are wanted."""
    at: Int64[Tensor, " position"]
    """The positions, counted through batch × time."""
    values: Float[Tensor, "position width"]

    def by_row(self) -> Iterator[tuple[int, Float[Tensor, "position width"]]]:
        """Yield the index of each sequence with its values."""
        return zip(self.rows, self.values.split(self.counts), strict=True)


def logits_by_batch(
    model: PreTrainedModel,
    sequences: Sequence[Ids],
    positions: Sequence[range] | None = None,
    *,
    size: int | None = None,
    only: Collection[int] | None = None,
) -> Iterator[ForwardBatch]:
    """Yield a model's logits at the wanted positions of sequences, at all of them unless given, batch by batch.

    Batches have sequences of similar length, the longest first, padded on the right, which causal attention ignores:
    at most `TOKENS_AT_ONCE` tokens, `LOGITS_AT_ONCE` logits, and `size` sequences where that is given. Sequences
    without a wanted position are left out; with `only`, so are batches without any of these sequences, and the others
    are the same. No gradient is kept.
    """
    columns = model.get_input_embeddings().weight.shape[0]
    wanted = [range(len(ids)) for ids in sequences] if positions is None else positions
    logits = [len(at) * columns for at in wanted]
    run = partial(logits_at, model, model.get_output_embeddings())
    return _by_batch(model, run, sequences, wanted, logits=logits, size=size, only=only)


def states_by_batch(model: PreTrainedModel, sequences: Sequence[Ids]) -> Iterator[ForwardBatch]:
    """Yield what the output head reads at all positions; batches are those of `logits_by_batch`, without the logits."""

    def run(at: Int64[Tensor, " position"], **inputs: Tensor) -> Float[Tensor, "position hidden"]:
        states: Tensor = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        return states.flatten(0, 1).index_select(0, at.to(states.device))

    return _by_batch(model, run, sequences, [range(len(ids)) for ids in sequences])


def _by_batch(
    model: PreTrainedModel,
    run: Run,
    sequences: Sequence[Ids],
    positions: Sequence[range],
    *,
    logits: Sequence[int] | None = None,
    size: int | None = None,
    only: Collection[int] | None = None,
) -> Iterator[ForwardBatch]:
    full = [index for index, at in enumerate(positions) if at]
    lengths = [len(sequences[index]) for index in full]
    costs = None if logits is None else [logits[index] for index in full]
    for batch in batches(lengths, size, tokens=TOKENS_AT_ONCE, logits=costs):
        rows = [full[nth] for nth in batch]
        if only is not None and not any(row in only for row in rows):
            continue
        ids, mask, starts = padded([sequences[row] for row in rows])
        wanted = [start + np.asarray(positions[row]) for row, start in zip(rows, starts, strict=True)]
        arrays, device = (np.concatenate(wanted), ids, mask), device_of(model)
        at, input_ids, attention_mask = (torch.from_numpy(array).to(device) for array in arrays)
        with torch.inference_mode():  # not around the yield: it would hold in the caller's code
            values = run(at, input_ids=input_ids, attention_mask=attention_mask)
        yield ForwardBatch(rows, [len(positions[row]) for row in rows], at, values)


def device_of(model: nn.Module) -> torch.device:
    """Name the device that a causal model gives its logits on; they stay there where its inputs are there too.

    A model whose layers lie on several devices, or outside of memory until they run, has the hooks of accelerate.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    hook = getattr(head, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if (runs_on := getattr(each, "execution_device", None)) is not None:
            return torch.device(runs_on)
    tensors: Iterator[Tensor] = chain(head.parameters(), head.buffers(), model.parameters(), model.buffers())
    return next(tensors).device


def logits_at(
    model: nn.Module, head: nn.Module, at: Int64[Tensor, " position"], **inputs: Any
) -> Float[Tensor, "position vocab"]:
    """Run a causal model, and its head at the positions `at` alone; `at` counts through batch × time.

    The hidden states are gathered before `head` (the output embedding) multiplies them, so that logits of
    prompts and padding are never made. What a model does to its logits after the head (a scale, a cap) is
    kept: it is done to each logit by itself. `inputs` are the model's own.
    """

    def take(_head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = arguments[0].flatten(0, 1)  # of a model in parts, perhaps on another device than the batch
        return (hidden.index_select(0, at.to(hidden.device)).unsqueeze(0), *arguments[1:])

    with head.register_forward_pre_hook(take):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.squeeze(0)


@contextmanager
def as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a model without gradients and dropout, and leave it and all random numbers as they were."""
    training, of_python, of_numpy = model.training, random.getstate(), np.random.get_state()
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        model.train(training)
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@torch.no_grad()
def keeps_rows_apart(model: nn.Module) -> bool:
    """Tell whether a causal model reads sequences that lie end to end as it reads each by itself (`batching.packed`).

    It is asked, with a few ids: what it predicts for packed sequences has to be nearer to what it predicts for each
    alone than what it predicts for one long sequence is.
    """
    device = device_of(model)
    sequences = [np.arange(3, 3 + length) for length in (8, 7, 6)]
    ids, positions, starts = (torch.from_numpy(array).to(device) for array in packed(sequences, rows=1))
    was_training = model.training
    model.eval()

    def logits(of: Tensor, **more: Tensor) -> Tensor:
        found: Tensor = model(input_ids=of, use_cache=False, **more).logits[0].float()
        return found

    try:
        together, as_one = logits(ids, position_ids=positions), logits(ids)
    except TypeError:  # it takes no positions
        return False
    alone = torch.cat(
        [logits(ids[:, start : start + len(one)]) for start, one in zip(starts, sequences, strict=True)]
    )
    model.train(was_training)
    return bool((together - alone).abs().max() < 0.5 * (as_one - alone).abs().max())
