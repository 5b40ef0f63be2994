"""The header of a teacher cache: what it was made of, and what makes two caches the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from cdm_toolkit.artifacts.manifest import Format, differences

FORMAT = Format(
    "cdm-toolkit teacher cache",
    2,
    "make the cache again, in another folder, with `write_cache`",
    code=("batching.py", "forward.py", "tokdiff", "kd", "artifacts", "distill/write_teacher_cache.py"),
)
HEADER_FILE = "cache.json"
ROWS_PER_SHARD = 256
"""A shard of so many answers of 150 tokens has 10 MB at k = 64."""


class CacheHeader(BaseModel):
    """What a cache was made of, and how; `k` is the whole vocabulary's size where no id is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format: str = FORMAT.name
    version: int = FORMAT.version
    code: str | None = None
    """Hash of the sources that made it; None where a version of this toolkit wrote it that did not keep that."""
    model: str
    model_fingerprint: str
    teacher_dtype: str
    """Of the model's weights when it was run; where they were quantised: 4bit, 8bit, or how their checkpoint was."""
    tokenizer: str
    tokenizer_fingerprint: str
    vocab: int
    data: str
    data_fingerprint: str
    rows: int
    limit: int | None
    """Rows at the front of the file that were taken; None for all."""
    template: Literal["none", "chat"]
    template_fingerprint: str
    """Of what stands around a text: the ids, or the chat template."""
    k: int
    dtype: Literal["float16", "float32"]
    """Of the log-probabilities on disk."""
    quantised: bool
    max_length: int
    rows_per_shard: int
    probe: tuple[float, ...] | None = None
    """Log-probabilities of the tokens of a known text, by which a served model is known again."""
    provenance: dict[str, Any]

    @property
    def shards(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    @property
    def encoding(self) -> str:
        return "whole" if self.k == self.vocab else "quantised" if self.quantised else "plain"

    def written(self) -> dict[str, Any]:
        """Give what is written: without a probe where none was asked, as versions before had none."""
        return self.model_dump(exclude={"probe"} if self.probe is None else None)

    @property
    def digest(self) -> str:
        """Give the sha256 of what makes two caches the same; names, paths and provenance do not."""
        facts = {"format": FORMAT.name, "version": FORMAT.version} | {
            name: getattr(self, name) for name in _FACTS
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def differences(self, other: CacheHeader) -> list[str]:
        """Say in which facts another header is not the same."""
        differ = [name for name in _FACTS if getattr(self, name) != getattr(other, name)]
        there, now = ({_FACTS[name]: each._shown(name) for name in differ} for each in (self, other))
        return list(differences(there, now))

    def _shown(self, name: str) -> str:
        value = getattr(self, name)
        kind, _, of = name.partition("_")
        return f"{getattr(self, kind)} ({value[:8]}…)" if of == "fingerprint" else str(value)

    def call(self, folder: Path, shard: str | None = None) -> str:
        """Write the call that makes this cache, or one of its shards."""
        same = ("dtype", "quantised", "max_length", "template", "rows_per_shard", "limit")
        settings: dict[str, Any] = {"model": self.model, "data": self.data, "output": str(folder)}
        settings |= {
            "k": 0 if self.encoding == "whole" else self.k,
            **{name: getattr(self, name) for name in same},
        }
        source = {"url": "…", "tokenizer": self.tokenizer} if self.probe is not None else self._weights
        settings |= {**source, "shard": shard}
        said = [f"{name}={value!r}" for name, value in settings.items() if value is not None]
        return f"write_cache(CacheSettings({', '.join(said)}))"

    @property
    def _weights(self) -> dict[str, str]:
        """Give the setting that the kind of weights comes from."""
        if self.teacher_dtype in ("4bit", "8bit"):
            return {"quantization": self.teacher_dtype}
        is_dtype = self.teacher_dtype in ("float32", "bfloat16", "float16")
        return {"teacher_dtype": self.teacher_dtype if is_dtype else "auto"}


_FACTS = {
    "model_fingerprint": "the model",
    "teacher_dtype": "the kind of weights",
    "tokenizer_fingerprint": "the tokenizer",
    "data_fingerprint": "the data",
    "rows": "the count of rows",
    "template_fingerprint": "`template`",
    "k": "`k`",
    "dtype": "`dtype`",
    "quantised": "`quantised`",
    "max_length": "`max_length`",
    "rows_per_shard": "`rows_per_shard`",
}
"""What makes two caches the same, with the words for it."""
