"""The figures of a real pair: SmolLM2 teaches a fresh student that has Mistral's tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from cdm_toolkit.artifacts.maps import load_or_build_neighbours
from cdm_toolkit.distill.dataset import build_dataset
from cdm_toolkit.errors import SourceNotFound
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.hub.students import new_student
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.kd import CDM, AlignedBatch, LossOutput, TeacherSignal, TokenizerPair
from cdm_toolkit.kd.aligned_rows import AlignedRow
from cdm_toolkit.kd.batch import Collator
from cdm_toolkit.kd.objective import weighted_loss
from cdm_toolkit.kd.rows import Row
from cdm_toolkit.kd.tokenized_rows import TeacherSide
from cdm_toolkit.teachers import Local

pytestmark = pytest.mark.slow

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl"


@pytest.fixture(autouse=True, scope="module")
def own_cache() -> None:
    """Take the user's, which may have the neighbour table of the real pair."""


@dataclass(frozen=True, slots=True)
class Models:
    """Both models, the method between them, 8 rows."""

    student: torch.nn.Module
    teacher: Local
    method: CDM
    features: list[AlignedRow]
    asked: dict[tuple[int, ...], TeacherSignal]
    """The teacher's signals by the rows of a batch: two tests ask for the same."""

    def batch(self, rows: list[AlignedRow]) -> tuple[AlignedBatch, TeacherSignal]:
        pair = self.method.pair
        batch = Collator((pair.fingerprints,), ((pair.name_t, pair.name_s),))(rows)
        if batch.rows not in self.asked:
            self.asked[batch.rows] = self.method.signal(self.teacher, batch)
        return batch, self.asked[batch.rows]

    def loss(self, batch: AlignedBatch, signal: TeacherSignal) -> LossOutput:
        return self.method(batch.student_logits_at(self.student), signal, batch)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    if not GSM8K.is_file():
        pytest.skip(f"{GSM8K} is not here")
    try:
        teacher, student = load_tokenizer("smollm2"), load_tokenizer("mistral")
        model = load_model("smollm2")
    except SourceNotFound as error:
        pytest.skip(str(error))
    lines = GSM8K.read_text(encoding="utf-8").splitlines()[:8]
    rows = [Row(i, r["question"], r["answer"]) for i, r in enumerate(map(json.loads, lines), 1)]
    pair = TokenizerPair(teacher.tokenizer, student.tokenizer)
    pair.neighbour_builder = load_or_build_neighbours
    features, counts = build_dataset(rows, pair.student, [TeacherSide(pair.teacher)])
    assert counts.trained == 8
    fresh = new_student(student, "10m", tmp_path_factory.mktemp("students") / "s")
    return Models(fresh, Local(model, vocab=pair.vocab_t), CDM(pair, top_k=100), list(features), {})


def test_kd_alone_moves_the_student_and_only_the_student(models: Models) -> None:
    for first in range(0, 8, 4):
        found = models.loss(*models.batch(models.features[first : first + 4]))
        models.student.zero_grad()
        found.kd.backward()
        gradients = [p.grad for p in models.student.parameters()]
        assert all(g is not None and g.abs().sum() > 0 for g in gradients)
        assert all(p.grad is None for p in models.teacher.model.parameters())
        assert found.matched_mass.item() > 0.9


@pytest.mark.parametrize("first", range(0, 8, 4))
def test_a_batch_of_4_is_four_batches_of_1(models: Models, first: int) -> None:
    rows = models.features[first : first + 4]
    with torch.no_grad():
        joined = models.loss(*models.batch(rows))
        singles = [models.loss(*models.batch([row])) for row in rows]
    labels, groups = joined.labels, joined.groups

    def loss(found: LossOutput) -> float:
        return weighted_loss(found.sums, alpha=0.5, weights=[1.0], labels=labels, groups=[groups]).item()

    assert sum(loss(found) for found in singles) == pytest.approx(loss(joined), abs=1e-5)
    ce, kd = (sum(one.sums.ce for one in singles), sum(one.sums.kd[0].kd for one in singles))
    assert ce.item() / labels == pytest.approx(joined.ce.item(), abs=1e-5)
    assert kd.item() / groups == pytest.approx(joined.kd.item(), abs=1e-5)


def test_only_the_rest_or_exact_pairs_teach_a_fresh_student(models: Models) -> None:
    """What the option `exact_always` is for: a fresh student's top k are as good as random."""
    batch, signal = models.batch(models.features[:2])
    among_top_k = replace(models, method=CDM(models.method.pair, top_k=100, exact_always=False))
    with torch.no_grad():
        assert models.loss(batch, signal).matched_mass.item() > 0.9
        assert among_top_k.loss(batch, signal).matched_mass.item() < 0.2


@pytest.mark.parametrize(
    ("loading", "within"),
    [
        ({"dtype": "auto"}, 0),  # float32, as its weights are stored
        ({"dtype": "bfloat16"}, 0.001),
        ({"quantization": "8bit"}, 0.01),
        ({"quantization": "4bit"}, 0.04),
    ],
    ids=lambda given: next(iter(given.values())) if isinstance(given, dict) else None,
)
def test_losses_of_a_teacher_in_fewer_bits(models: Models, loading: dict[str, str], within: float) -> None:
    if "quantization" in loading:
        pytest.importorskip("bitsandbytes")
    batch, signal = models.batch(models.features[:4])
    teacher = Local(load_model("smollm2", **loading), vocab=models.method.pair.vocab_t)
    found = models.method.signal(teacher, batch)
    with torch.no_grad():
        kd, whole = models.loss(batch, found).kd, models.loss(batch, signal).kd
    assert kd.item() == pytest.approx(whole.item(), rel=within)
    assert torch.equal(found.top.ids, signal.top.ids) == (within == 0)
