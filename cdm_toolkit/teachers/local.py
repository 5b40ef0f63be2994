"""Teacher that is a model in memory."""

from __future__ import annotations

import torch
from torch import nn

from cdm_toolkit.forward import device_of
from cdm_toolkit.kd.batch import AlignedBatch
from cdm_toolkit.kd.teacher_signal import teacher_signal
from cdm_toolkit.kd.types import SignalRequest, TeacherSignal


class Local:
    """A frozen causal model of transformers, run at each step."""

    def __init__(self, model: nn.Module, *, vocab: int) -> None:
        """Freeze `model`; of its logits the first `vocab` belong to ids of its tokenizer."""
        self.model = model.eval().requires_grad_(False)
        self.vocab = vocab

    def signal(self, batch: AlignedBatch, request: SignalRequest) -> TeacherSignal:
        """Run the model over the batch, and reduce its logits to the top k that the request asks for.

        The model may be on another device than the batch, or on several: what it reads goes there, and the signal
        comes back.
        """
        (side,) = batch.teachers
        return teacher_signal(self.model, side, request, vocab=self.vocab)

    @torch.no_grad()
    def join(self) -> None:
        """Run the model on one token where other processes ask it: one in shards runs in all of them or in none."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=device_of(self.model))
        self.model(input_ids=ids, use_cache=False)
