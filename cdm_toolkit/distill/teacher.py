"""Where the teacher's distributions come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from cdm_toolkit.distill.gather import logits_at
from cdm_toolkit.distill.losses.pick import log_sum_exp, mean_logits, top_k, values_at
from cdm_toolkit.distill.losses.record import TeacherSays

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cdm_toolkit.distill.collate import TeacherBatch


class Teacher(Protocol):
    """Says what a teacher thinks of the groups of a batch, without a gradient. `rows` are their numbers."""

    def says(self, batch: TeacherBatch, rows: Sequence[int]) -> TeacherSays: ...


class OnlineTeacher:
    """A frozen model in memory, asked anew at each step."""

    def __init__(self, model: PreTrainedModel, *, vocab_t: int, k: int, mean: bool = False) -> None:
        """Freeze `model`; of its logits the first `vocab_t` belong to ids of its tokenizer.

        `mean` speaks for a group with the mean of its tokens' logits instead of those before it.
        """
        self.model = model.eval().requires_grad_(False)
        self.vocab_t, self.k, self.mean = vocab_t, k, mean

    @torch.no_grad()
    def says(self, batch: TeacherBatch, rows: Sequence[int]) -> TeacherSays:
        """Reduce the logits that the batch reads to top-k log-probabilities; padded ids have none."""
        logits = logits_at(
            self.model,
            self.model.get_output_embeddings(),
            batch["at"],
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            **({"position_ids": batch["position_ids"]} if "position_ids" in batch else {}),
        )
        if "group" not in batch:
            return TeacherSays(top_k(logits, self.k, real=self.vocab_t))
        group = batch["group"]
        every = torch.arange(len(group), device=group.device)
        if self.mean:
            means = mean_logits(logits, every, group, sum(batch["groups"]))
            top = top_k(means, self.k, real=self.vocab_t)
        else:
            top = top_k(logits, self.k, real=self.vocab_t, rows=batch["first"])
        if "next_ids" not in batch:
            return TeacherSays(top)
        real = logits.narrow(1, 0, self.vocab_t)
        chosen = values_at(logits, every, batch["next_ids"]).to(top.logprobs.dtype) - log_sum_exp(real)
        return TeacherSays(top, chosen, group)
