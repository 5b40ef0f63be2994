"""What is taught at each position: the record of one row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from cdm_toolkit import kd
from cdm_toolkit.distill.explain import ORACLE, Explanation, explain
from cdm_toolkit.errors import BadOption, NothingToTrain
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.kd.next_token_oracle import NextTokenOracle
from cdm_toolkit.teachers import Local

TEXT = " through unbelievable 1250 naïve words"


@pytest.fixture(scope="module")
def case(small_models: Path) -> tuple[kd.TokenizerPair, Local, Any]:
    names = [str(small_models / side) for side in ("teacher", "student")]
    pair = kd.TokenizerPair.from_names(*names)
    return pair, Local(load_model(names[0]), vocab=pair.vocab_t), load_model(names[1])


@pytest.fixture(scope="module")
def explained(case) -> Explanation:
    pair, teacher, student = case
    methods = {"by spelling": kd.Spelling(pair), "exact": kd.ExactMatch(pair)}
    return explain(pair.collate([{"text": TEXT}]), methods, teacher, student)


def test_methods_come_under_the_names_given(explained: Explanation) -> None:
    assert [method.name for method in explained.methods] == ["by spelling", "exact"]
    for each in explained.positions:
        assert len(each.compared) == 2


def test_positions_are_read_in_their_groups(explained: Explanation) -> None:
    assert [each.position for each in explained.positions] == list(range(len(explained.student_ids) - 1))
    for each in explained.positions:
        assert each.follows.id == explained.student_ids[each.position + 1]
        assert each.group is not None
        assert explained.groups[each.group].student[each.before] == each.follows.id
        assert (each.compared[1] is None) == (each.before > 0)
    sizes = {"1-1": (1, 1), "1-n": (1, 2), "n-1": (2, 1), "n-m": (2, 2)}
    for group in explained.groups:
        assert sizes[group.kind] == (min(len(group.teacher), 2), min(len(group.student), 2))


def test_a_candidate_is_written_in_tokens_of_the_student(explained: Explanation) -> None:
    written = 0
    for candidate in (each for group in explained.groups for each in group.candidates):
        of_teacher = explained.teacher.token_bytes[candidate.id]
        if of_teacher is not None and candidate.spelled:
            of_student = b"".join(explained.student.literals[i] for i in candidate.spelled)
            assert of_student == of_teacher
            written += 1
    assert written


def test_outcomes_are_likeliest_first(explained: Explanation) -> None:
    for compared in (found for each in explained.positions for found in each.compared if found):
        masses = [outcome.teacher for outcome in compared.outcomes]
        assert masses == sorted(masses, reverse=True)
        assert all(outcome.id >= 0 for outcome in compared.outcomes)


def test_the_oracle_stands_beside_the_methods(case, explained: Explanation) -> None:
    pair, teacher, student = case
    batch = pair.collate([{"text": TEXT}])
    oracle = NextTokenOracle(pair, most=4)
    found = explain(batch, {"exact": kd.ExactMatch(pair)}, teacher, student, oracle=(oracle, teacher.model))
    assert [method.name for method in found.methods] == ["exact", ORACLE]
    for own, other in zip(found.positions, explained.positions, strict=True):
        assert own.compared[0] == other.compared[1]
    answers = [each.compared[1] for each in found.positions if each.compared[1]]
    assert len(answers) > 5
    for each in answers:
        assert sum(outcome.teacher for outcome in each.outcomes) == pytest.approx(1)
        kl = sum(o.teacher * math.log(o.teacher / o.student) for o in each.outcomes if o.teacher)
        assert each.divergence == pytest.approx(kl, rel=1e-4)
    assert found.methods[1].kd * len(found.groups) == pytest.approx(sum(each.divergence for each in answers))
    assert sum(each.share for each in answers) == pytest.approx(1)


def test_a_teacher_that_agrees_teaches_nothing(small_models: Path) -> None:
    name = str(small_models / "teacher")
    pair, model = kd.TokenizerPair.from_names(name, name), load_model(name)
    found = explain(
        pair.collate([{"text": TEXT}]), {"kl": kd.KL(pair)}, Local(model, vocab=pair.vocab_t), model
    )
    assert found.methods[0].kd == pytest.approx(0, abs=1e-6)
    assert {group.kind for group in found.groups} == {"1-1"}


def test_what_has_no_explanation(case) -> None:
    pair, teacher, student = case
    one, methods = pair.collate([{"text": TEXT}]), {"exact": kd.ExactMatch(pair)}
    with pytest.raises(BadOption, match="the number of rows in the batch is 2"):
        explain(pair.collate([{"text": TEXT}, {"text": "b"}]), methods, teacher, student)
    with pytest.raises(BadOption, match=r"`method` is 'uld'; .*: cdm, exact, .*; .*uld.* have no outcomes"):
        explain(one, {"uld": kd.ULD(pair)}, teacher, student)
    with pytest.raises(NothingToTrain, match="cannot be aligned"):
        explain(pair.collate([{"text": TEXT}], max_length=2), methods, teacher, student)
