"""How DistillKit (github.com/arcee-ai/DistillKit) writes top-k log-probabilities: its settings, and bytes to numbers.

Log-probabilities of a position are sorted, the first kept as numbers, the others as a curve through them by least
squares and what is left of them in a few bits; ids are packed, highest bit first. Older sets have ids in words of 64
bits, and sets that are not compressed have both as they are. What its file `compression_config.yaml` says decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float32, Int32, UInt8
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from cdm_toolkit.artifacts.settings import Settings, make, read_yaml
from cdm_toolkit.artifacts.teacher_packing import id_bits, pack, unpack
from cdm_toolkit.errors import BadOption, FileProblem

CONFIG_FILE = "compression_config.yaml"

DtypeName = Literal["float16", "bfloat16", "float32", "float64"]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
SPECIAL_TERMS = ("sqrt", "exp")


def _term(term: int | str) -> int | str:
    if isinstance(term, str) and term not in SPECIAL_TERMS:
        raise ValueError(f"{term!r} is no term that is known: give powers, {' or '.join(SPECIAL_TERMS)}")
    return term


Term = Annotated[int | str, AfterValidator(_term)]
"""A power of the rank, or a function of it."""
Columns = Mapping[str, np.ndarray]
"""Columns of one row of a set: an array for each, with one entry a position."""
Candidates = tuple[Int32[np.ndarray, "position topk"], Float32[np.ndarray, "position topk"]]
"""Ids and log-probabilities, most probable first."""


class Compression(Protocol):
    """One of DistillKit's three ways to write candidates."""

    @property
    def vocab(self) -> int | None:
        """Ids that the teacher chose from; None where the set does not say."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that hold the candidates."""

    def decode(self, columns: Columns) -> Candidates:
        """Read candidates. ValueError where an entry has another size than it must have."""

    def encode(self, ids: np.ndarray, logprobs: np.ndarray) -> Columns:
        """Write candidates, which are sorted, the most probable first."""


class ResidualBin(Settings):
    """Values in a few bits each, with one scale for all of them."""

    scale_dtype: DtypeName
    element_bits: Annotated[int, Field(ge=1, le=31)]
    num_elements: Count

    @property
    def lowest(self) -> int:
        """The integer that is written as 0; a single bit stands for −1 and 1."""
        return 0 if self.element_bits == 1 else -(1 << (self.element_bits - 1))

    @property
    def packed_bytes(self) -> int:
        return -(-self.num_elements * self.element_bits // 8)


class Quantised(Settings):
    """DistillKit's `logprob_compressor`; the names are its own."""

    d: Count
    """Ids of the vocabulary."""
    k: Count
    exact_k: CountOrNone
    """How many of the k are kept as numbers."""
    exact_dtype: DtypeName = "float32"
    polynomial_terms: tuple[Term, ...] | None = None
    """Powers of the rank, and sqrt and exp of it, whose sum is the curve through the others."""
    term_dtype: DtypeName = "float32"
    residual_bins: tuple[ResidualBin, ...]
    delta_encoding: bool = True
    """Each value is written as its distance from the one before it."""
    error_diffusion: bool = False
    """How the writer rounded; reading is the same."""
    normalize_t: bool = False
    """Ranks go from 0 to 1."""

    @model_validator(mode="after")
    def _adds_up(self) -> Quantised:
        if self.exact_k > self.k:
            raise ValueError(f"exact_k {self.exact_k} is more than k {self.k}")
        if self.exact_k < self.k and not (self.polynomial_terms or self.residual_bins):
            raise ValueError("polynomial_terms or residual_bins are needed where exact_k is less than k")
        if (held := sum(each.num_elements for each in self.residual_bins)) > self.k - self.exact_k:
            raise ValueError(f"residual_bins hold {held} values, and k - exact_k is {self.k - self.exact_k}")
        return self

    @property
    def vocab(self) -> int:
        return self.d

    @property
    def columns(self) -> tuple[str, ...]:
        return ("compressed_logprobs", "bytepacked_indices")

    def decode(self, columns: Columns) -> Candidates:
        logprobs, ids = (
            _sized(name, columns[name], size).astype(np.uint8)
            for name, size in zip(self.columns, (self._logprob_bytes, self._id_bytes), strict=True)
        )
        return unpack(ids, self.k, id_bits(self.d)), self._logprobs(logprobs)

    def encode(self, ids: np.ndarray, logprobs: np.ndarray) -> Columns:
        packed = pack(ids, id_bits(self.d))
        return dict(zip(self.columns, (self._compressed(logprobs), packed), strict=True))

    @property
    def _tail(self) -> int:
        return self.k - self.exact_k

    @property
    def _terms(self) -> tuple[Term, ...]:
        return self.polynomial_terms or ()

    @property
    def _logprob_bytes(self) -> int:
        numbers = self.exact_k * _dtype(self.exact_dtype).itemsize
        numbers += len(self._terms) * _dtype(self.term_dtype).itemsize
        scales = sum(_dtype(each.scale_dtype).itemsize + each.packed_bytes for each in self.residual_bins)
        return numbers + scales

    @property
    def _id_bytes(self) -> int:
        return -(-self.k * id_bits(self.d) // 8)

    def _logprobs(self, packed: UInt8[np.ndarray, "position byte"]) -> np.ndarray:
        """Add up the parts in the dtypes in which DistillKit does, for the same rounding."""
        left, dtype = _Left(torch.from_numpy(packed)), _dtype(self.exact_dtype)
        exact = left.floats(self.exact_k, dtype)
        coefficients = left.floats(len(self._terms), _dtype(self.term_dtype))
        bins = [_restored(each, left) for each in self.residual_bins]
        missing = self._tail - sum(each.num_elements for each in self.residual_bins)
        residual = torch.cat((*bins, torch.zeros(len(packed), missing)), -1).to(dtype)
        values = torch.cat((exact, self._curve(coefficients) + residual), -1)
        if self.delta_encoding:
            values = values.float().cumsum(-1).to(dtype)
        return np.asarray(values.float().numpy())

    def _compressed(self, logprobs: np.ndarray) -> np.ndarray:
        values = torch.from_numpy(np.ascontiguousarray(logprobs)).double()
        if self.delta_encoding:
            values = torch.cat((values[:, :1], values.diff(dim=-1)), -1)
        exact, tail = values[:, : self.exact_k], values[:, self.exact_k :]
        coefficients = self._fit(tail)
        residual = tail - self._curve(coefficients).double()
        parts, first = [_bytes(exact.to(_dtype(self.exact_dtype))), _bytes(coefficients)], 0
        for each in self.residual_bins:
            parts += _rounded(each, residual[:, first : first + each.num_elements])
            first += each.num_elements
        return np.asarray(torch.cat(parts, -1).numpy())

    def _curve(self, coefficients: Tensor) -> Tensor:
        curve = coefficients.new_zeros(len(coefficients), self._tail)
        if self._terms:
            curve = (self._basis(coefficients.dtype) * coefficients[:, None, :]).sum(-1)
        return curve

    def _basis(self, dtype: torch.dtype) -> Tensor:
        """Give the terms' values [rank, term]."""
        rank = torch.arange(self._tail, dtype=dtype)
        if self.normalize_t:
            rank = torch.linspace(0, 1, self._tail, dtype=dtype)
        each = [getattr(rank, term)() if isinstance(term, str) else rank**term for term in self._terms]
        return torch.stack(each, -1)

    def _fit(self, tail: Tensor) -> Tensor:
        """Find the coefficients of least squares."""
        dtype = _dtype(self.term_dtype)
        if not self._terms:
            return torch.zeros(len(tail), 0, dtype=dtype)
        basis = self._basis(torch.float64)
        if not basis.isfinite().all():
            raise BadOption(
                "polynomial_terms", list(self._terms), f"terms that are finite at {self._tail} ranks"
            )
        coefficients: Tensor = tail @ torch.linalg.pinv(basis).T
        return coefficients.to(dtype)


class LegacyPolynomial(Settings):
    """DistillKit's `legacy_logit_compression`; the names are its own."""

    vocab_size: Count
    k: Count
    exact_k: CountOrNone
    polynomial_degree: CountOrNone
    invert_polynomial: bool = True
    """Powers of 1 / rank."""
    with_sqrt_term: bool = False
    term_dtype: DtypeName = "float32"

    @model_validator(mode="after")
    def _adds_up(self) -> LegacyPolynomial:
        if self.exact_k > self.k:
            raise ValueError(f"exact_k {self.exact_k} is more than k {self.k}")
        return self

    @property
    def vocab(self) -> int:
        return self.vocab_size

    @property
    def columns(self) -> tuple[str, ...]:
        return ("packed_indices", "exact_values", "coeffs")

    def decode(self, columns: Columns) -> Candidates:
        sizes = (
            -(-self.k // self._ids_in_word),
            self.exact_k,
            self._basis.shape[1] * (self.exact_k < self.k),
        )
        words, exact, coefficients = (
            _sized(name, columns[name], size) for name, size in zip(self.columns, sizes, strict=True)
        )
        shifts = np.arange(self._ids_in_word, dtype=np.uint64) * np.uint64(self._bits)
        ids = (words.astype(np.uint64)[:, :, None] >> shifts) & np.uint64((1 << self._bits) - 1)
        ids = ids.reshape(len(words), sizes[0] * self._ids_in_word)[:, : self.k].astype(np.int32)
        tail = torch.from_numpy(coefficients.astype(np.float32))[:, None, :] * self._basis
        tail = tail.sum(-1)[:, : self.k - self.exact_k]
        return ids, np.concatenate((exact.astype(np.float32), tail.numpy()), axis=1)

    def encode(self, ids: np.ndarray, logprobs: np.ndarray) -> Columns:
        raise BadOption(
            "compression", "legacy_logit_compression", "logprob_compressor: the older form is only read"
        )

    @property
    def _bits(self) -> int:
        return id_bits(self.vocab_size)

    @property
    def _ids_in_word(self) -> int:
        return 64 // self._bits

    @property
    def _basis(self) -> Tensor:
        """Give the terms' values [rank, term]; ranks count from 1."""
        rank = torch.arange(1, self.k - self.exact_k + 1, dtype=torch.float32)
        sign = -1 if self.invert_polynomial else 1
        each = [rank ** (sign * power) for power in range(self.polynomial_degree + 1)]
        return torch.stack([*each, *([rank.sqrt()] if self.with_sqrt_term else [])], -1)


class Uncompressed:
    """Ids and log-probabilities as they are."""

    vocab: int | None = None
    columns = ("token_ids", "top_values")

    def decode(self, columns: Columns) -> Candidates:
        ids, logprobs = (columns[name] for name in self.columns)
        return ids.astype(np.int32), logprobs.astype(np.float32)

    def encode(self, ids: np.ndarray, logprobs: np.ndarray) -> Columns:
        return dict(zip(self.columns, (ids.astype(np.int64), logprobs), strict=True))


WAYS = ("logprob_compressor", "legacy_logit_compression")
"""Settings of a compression, as a run file of DistillKit names them under `teacher`."""


def read_compression(file: Path) -> Quantised | LegacyPolynomial:
    """Read `compression_config.yaml`, or the teacher's part of a run file of DistillKit.

    FileProblem where there is no such file, BadSettings for what it has that is not known.
    """
    if not file.is_file():
        fix = f"give `compression`: the set's {CONFIG_FILE}, or a run file of DistillKit that reads the set"
        raise FileProblem(file, "there is no such file, which says how the set is compressed", fix)
    content: Any = read_yaml(file)
    if isinstance(content.get("teacher"), Mapping):
        content = content["teacher"]
    named = next((name for name in WAYS if content.get(name)), None)
    settings = content[named] if named else content
    if named == WAYS[1] or "polynomial_degree" in settings:
        return make(LegacyPolynomial, settings, source=str(file))
    return make(Quantised, settings, source=str(file))


def _dtype(name: DtypeName) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def _sized(name: str, column: np.ndarray, size: int) -> np.ndarray:
    if column.shape[1] != size:
        raise ValueError(f"{name} has {column.shape[1]} values at a position, and {size} by its settings")
    return column


class _Left:
    """The bytes of each position that are not read yet."""

    def __init__(self, packed: Tensor) -> None:
        self.packed = packed

    def take(self, size: int) -> Tensor:
        taken, self.packed = self.packed[:, :size].contiguous(), self.packed[:, size:]
        return taken

    def floats(self, count: int, dtype: torch.dtype) -> Tensor:
        taken = self.take(count * dtype.itemsize)
        return taken.view(dtype) if taken.numel() else torch.zeros(len(taken), count, dtype=dtype)


def _restored(part: ResidualBin, left: _Left) -> Tensor:
    scale = left.floats(1, _dtype(part.scale_dtype))
    levels = unpack(left.take(part.packed_bytes).numpy(), part.num_elements, part.element_bits)
    steps = torch.from_numpy(levels).float()
    return (steps * 2 - 1 if part.element_bits == 1 else steps + part.lowest) * scale


def _rounded(part: ResidualBin, values: Tensor) -> list[Tensor]:
    """Write a scale, by which the largest value is the lowest level, and the levels."""
    largest = values.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / max(-part.lowest, 1), 1.0).to(_dtype(part.scale_dtype))
    steps = values / scale.double()
    if part.element_bits == 1:
        levels = (steps > 0).int()
    else:
        levels = steps.round().clamp(part.lowest, -part.lowest - 1).int() - part.lowest
    packed = pack(levels.numpy(), part.element_bits)
    return [_bytes(scale), torch.from_numpy(packed)]


def _bytes(values: Tensor) -> Tensor:
    size = values.shape[1] * values.dtype.itemsize
    if not values.numel():
        return torch.zeros(len(values), size, dtype=torch.uint8)
    return values.contiguous().view(torch.uint8)
