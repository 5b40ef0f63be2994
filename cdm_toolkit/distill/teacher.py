"""Where the teacher's distributions come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from cdm_toolkit.distill.gather import logits_at
from cdm_toolkit.distill.losses.cdm import mean_logits
from cdm_toolkit.distill.losses.pick import top_k
from cdm_toolkit.distill.losses.record import TopK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cdm_toolkit.distill.collate import Batch


class Teacher(Protocol):
    """Gives the teacher's likeliest ids at the groups of a batch, without a gradient."""

    def top_k(self, batch: Batch) -> TopK: ...


class OnlineTeacher:
    """A frozen model in memory, asked anew at each step."""

    def __init__(self, model: PreTrainedModel, *, vocab_t: int, k: int) -> None:
        """Freeze `model`; of its logits the first `vocab_t` belong to ids of its tokenizer."""
        self.model = model.eval().requires_grad_(False)
        self.vocab_t, self.k = vocab_t, k

    @torch.no_grad()
    def top_k(self, batch: Batch) -> TopK:
        """Reduce the logits at the batch's groups to top-k log-probabilities; padded ids have none."""
        logits = logits_at(
            self.model,
            self.model.get_output_embeddings(),
            batch["teacher_at"],
            input_ids=batch["teacher_input_ids"],
            attention_mask=batch["teacher_attention_mask"],
            **({"position_ids": batch["teacher_position_ids"]} if "teacher_position_ids" in batch else {}),
        )
        if "teacher_group" in batch:
            group = batch["teacher_group"]
            rows = torch.arange(len(group), device=group.device)
            logits = mean_logits(logits, rows, group, sum(batch["groups"]))
        return top_k(logits, self.k, real=self.vocab_t)


class RememberingTeacher:
    """Asks a teacher once for each row, and answers from memory when the row comes again in a later epoch.

    What is kept costs 8 bytes for each of k candidates at each position. Rows for which there is no room are
    asked anew.
    """

    def __init__(self, teacher: Teacher, *, room: int) -> None:
        """Keep up to `room` bytes."""
        self.teacher, self.room = teacher, room
        self._known: dict[int, TopK] = {}

    def top_k(self, batch: Batch) -> TopK:
        """Answer from memory where all rows of the batch are known."""
        known = [self._known.get(row) for row in batch["rows"]]
        if all(known):
            device = batch["labels"].device
            ids = torch.cat([top.ids for top in known if top]).to(device, torch.int64)
            return TopK(ids, torch.cat([top.logprobs for top in known if top]).to(device))
        answer = self.teacher.top_k(batch)
        split = zip(answer.ids.split(batch["groups"]), answer.logprobs.split(batch["groups"]), strict=True)
        for row, (ids, logprobs) in zip(batch["rows"], split, strict=True):
            size = ids.numel() * 8
            if row not in self._known and size <= self.room:
                self.room -= size
                self._known[row] = TopK(ids.to("cpu", torch.int32, copy=True), logprobs.to("cpu", copy=True))
        return answer
