"""The figures of a real pair: SmolLM2 teaches a fresh student that has Mistral's tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from cdm_toolkit.distill.collate import Batch, Collator, TeacherLayout
from cdm_toolkit.distill.data import Features, TeacherSide, build_features, side_of
from cdm_toolkit.distill.gather import logits_at
from cdm_toolkit.distill.losses.cdm import CdmSettings, cdm
from cdm_toolkit.distill.losses.combine import Reader, loss_parts
from cdm_toolkit.distill.losses.record import LossParts, TeacherSays, objective
from cdm_toolkit.distill.rows import Row
from cdm_toolkit.distill.teacher import OnlineTeacher

from cdm_toolkit.artifacts.maps import load_or_build_neighbours
from cdm_toolkit.errors import SourceNotFound
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.hub.students import new_student
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.vocab_map.contextual import PairTable
from cdm_toolkit.vocab_map.exact import build_exact

pytestmark = pytest.mark.slow

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl"


@dataclass(frozen=True, slots=True)
class Pair:
    """Both models, the loss between them, 32 rows."""

    student: torch.nn.Module
    teacher: OnlineTeacher
    settings: CdmSettings
    vocab_s: int
    features: list[Features]

    def asked(self, rows: list[Features]) -> tuple[Batch, TeacherSays]:
        batch = Collator((TeacherLayout(),))(rows)
        return batch, self.teacher.says(batch["teachers"][0], batch["rows"])

    def parts(self, batch: Batch, says: TeacherSays) -> LossParts:
        head = self.student.get_output_embeddings()
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        logits = logits_at(self.student, head, batch["label_at"], **inputs)
        method = partial(cdm, settings=self.settings)
        reader = Reader(method, says, self.vocab_s, batch["teachers"][0]["student_rows"])
        return loss_parts(logits, batch["labels"], [reader])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    if not GSM8K.is_file():
        pytest.skip(f"{GSM8K} is not here")
    try:
        teacher, student = load_tokenizer("smollm2"), load_tokenizer("mistral")
        model = load_model("smollm2")
    except SourceNotFound as error:
        pytest.skip(str(error))
    lines = GSM8K.read_text(encoding="utf-8").splitlines()[:32]
    rows = [Row(i, r["question"], r["answer"]) for i, r in enumerate(map(json.loads, lines), 1)]
    features, counts = build_features(rows, side_of(student), [TeacherSide(side_of(teacher))])
    assert counts.trained == 32
    exact = build_exact(teacher.view, student.view)
    near = load_or_build_neighbours(teacher.view, student.view, max_edit_distance=0.3)
    settings = CdmSettings(
        table=PairTable.from_tables(exact, near),
        exact=torch.from_numpy(exact.dense()),
        top_k=100,
        temperature=1.0,
        rest_bucket=True,
    )
    fresh = new_student(student, "10m", tmp_path_factory.mktemp("students") / "s")
    asked = OnlineTeacher(model, vocab_t=teacher.view.vocab_size, k=100)
    return Pair(fresh, asked, settings, student.view.vocab_size, list(features))


def test_kd_alone_moves_the_student_and_only_the_student(pair: Pair) -> None:
    for first in range(0, 32, 4):
        batch, says = pair.asked(pair.features[first : first + 4])
        (kd,) = pair.parts(batch, says).kd
        pair.student.zero_grad()
        kd.kd.backward()
        gradients = [p.grad for p in pair.student.parameters()]
        assert all(g is not None and g.abs().sum() > 0 for g in gradients)
        assert all(p.grad is None for p in pair.teacher.model.parameters())
        assert kd.matched_mass.item() / positions(batch) > 0.9


def positions(batch: Batch) -> int:
    return sum(batch["teachers"][0]["groups"])


@pytest.mark.parametrize("first", range(0, 32, 4))
def test_a_batch_of_4_is_four_batches_of_1(pair: Pair, first: int) -> None:
    rows = pair.features[first : first + 4]
    with torch.no_grad():
        batch, says = pair.asked(rows)
        labels, groups = len(batch["labels"]), positions(batch)
        joined = pair.parts(batch, says)
        singles = [pair.parts(*pair.asked([row])) for row in rows]

    def loss(parts: LossParts) -> float:
        return objective(parts, alpha=0.5, weights=[1.0], tokens=labels, positions=[groups]).item()

    assert sum(loss(parts) for parts in singles) == pytest.approx(loss(joined), abs=1e-5)
    ce, kd = (sum(part.ce for part in singles), sum(part.kd[0].kd for part in singles))
    assert ce.item() / labels == pytest.approx(joined.ce.item() / labels, abs=1e-5)
    assert kd.item() / groups == pytest.approx(joined.kd[0].kd.item() / groups, abs=1e-5)


def test_only_the_rest_or_exact_pairs_teach_a_fresh_student(pair: Pair) -> None:
    """What the option `exact_always` is for: a fresh student's top k are as good as random."""
    batch, says = pair.asked(pair.features[:2])
    with torch.no_grad():
        always = pair.parts(batch, says)
        among_top_k = replace(pair, settings=replace(pair.settings, exact=None)).parts(batch, says)
    assert always.kd[0].matched_mass.item() / positions(batch) > 0.9
    assert among_top_k.kd[0].matched_mass.item() / positions(batch) < 0.2
