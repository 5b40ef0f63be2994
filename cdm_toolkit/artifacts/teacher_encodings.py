"""Encodings of the teacher's top-k candidates in a cache: whole, plain or quantised.

Each array has one row per position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float32, Int32

from cdm_toolkit.artifacts.teacher_header import CacheHeader
from cdm_toolkit.artifacts.teacher_packing import (
    HEAD,
    TAIL_BITS,
    QuantisedLogprobs,
    id_bits,
    log_rest,
    pack,
    pack_set,
    quantise,
    restore,
    unpack,
    unpack_set,
    with_rest,
)

Arrays = Mapping[str, np.ndarray]


def pack_candidates(
    header: CacheHeader,
    ids: Int32[np.ndarray, "position topk"],
    logprobs: Float32[np.ndarray, "position topk"],
) -> Arrays:
    """Encode candidates, most probable first, with the header's encoding."""
    return _ENCODINGS[header.encoding][0](header, ids, logprobs)


def unpack_candidates(header: CacheHeader, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Decode ids and log-probabilities; ids are exact, log-probabilities rounded."""
    return _ENCODINGS[header.encoding][1](header, arrays)


def _pack_whole(header: CacheHeader, _ids: np.ndarray, logprobs: np.ndarray) -> Arrays:
    return {"logprobs": logprobs.astype(np.float32)}


def _unpack_whole(header: CacheHeader, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    logprobs = arrays["logprobs"]
    return np.broadcast_to(np.arange(header.vocab, dtype=np.int32), logprobs.shape), logprobs


def _pack_plain(header: CacheHeader, ids: np.ndarray, logprobs: np.ndarray) -> Arrays:
    arrays = {"ids": pack(ids, id_bits(header.vocab)), "logprobs": logprobs.astype(header.dtype)}
    return arrays if header.dtype == "float32" else arrays | {"log_rest": log_rest(logprobs)}


def _unpack_plain(header: CacheHeader, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    ids, logprobs = unpack(arrays["ids"], header.k, id_bits(header.vocab)), arrays["logprobs"]
    return ids, logprobs if header.dtype == "float32" else with_rest(logprobs, arrays["log_rest"])


def _pack_quantised(header: CacheHeader, ids: np.ndarray, logprobs: np.ndarray) -> Arrays:
    order = np.argsort(ids[:, HEAD:], axis=1) + min(HEAD, header.k)
    tail_ids, tail = (np.take_along_axis(array, order, axis=1) for array in (ids, logprobs))
    levels = quantise(np.concatenate((logprobs[:, :HEAD], tail), axis=1))
    arrays = {"head_ids": pack(ids[:, :HEAD], id_bits(header.vocab)), "head": levels.head}
    if header.k > HEAD:
        arrays |= {"tail_ids": pack_set(tail_ids, header.vocab), "tail": pack(levels.tail, TAIL_BITS)}
    return arrays | {"ranges": levels.ranges, "log_tail": levels.log_tail, "log_rest": levels.log_rest}


def _unpack_quantised(header: CacheHeader, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    head, tail = min(HEAD, header.k), max(0, header.k - HEAD)
    ids = unpack(arrays["head_ids"], head, id_bits(header.vocab))
    tail_levels = np.zeros((len(ids), 0), np.uint8)
    if tail:
        ids = np.concatenate((ids, unpack_set(arrays["tail_ids"], tail, header.vocab)), axis=1)
        tail_levels = unpack(arrays["tail"], tail, TAIL_BITS).astype(np.uint8)
    rest = (arrays[name] for name in ("ranges", "log_tail", "log_rest"))
    logprobs = restore(QuantisedLogprobs(arrays["head"], tail_levels, *rest))
    order = np.argsort(-logprobs, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)


_Pack = Callable[[CacheHeader, np.ndarray, np.ndarray], Arrays]
_Unpack = Callable[[CacheHeader, Arrays], tuple[np.ndarray, np.ndarray]]
_ENCODINGS: Mapping[str, tuple[_Pack, _Unpack]] = {
    "whole": (_pack_whole, _unpack_whole),
    "plain": (_pack_plain, _unpack_plain),
    "quantised": (_pack_quantised, _unpack_quantised),
}
