from __future__ import annotations

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cdm_toolkit.errors import BadOption, TokenizerMismatch
from cdm_toolkit.vocab_map import contextual, contextual_reference
from cdm_toolkit.vocab_map.contextual import PairTable, check_top_k, matched_mass, select_pairs
from cdm_toolkit.vocab_map.contextual_reference import make_pairing_rule, select_reference
from cdm_toolkit.vocab_map.exact import build_exact
from cdm_toolkit.vocab_map.neighbours import build_neighbours
from cdm_toolkit.vocab_map.partners import partner_rows

NOTHING = float("-inf")


def _tables(view_t, view_s, *, max_edit_distance=0.3, match_digits=True, width=32):
    exact = build_exact(view_t, view_s)
    near = build_neighbours(view_t, view_s, max_edit_distance=max_edit_distance, match_digits=match_digits)
    rule = make_pairing_rule(
        view_t,
        view_s,
        partner_rows(exact, near, width=width)[0],
        max_edit_distance=max_edit_distance,
        match_digits=match_digits,
    )
    return PairTable.from_tables(exact, near, width=width), rule


def _candidates(source, size, groups, top_k):
    """Draw distinct ids, some outside the vocabulary, in descending order of probability with many ties."""
    ids = [source.sample(range(-2, size + 3), top_k) for _ in range(groups)]
    values = [
        sorted(source.choices([-0.5, -1.0, -2.0, NOTHING], k=top_k), reverse=True) for _ in range(groups)
    ]
    return torch.tensor(ids), torch.tensor(values)


def _as_dicts(pairs):
    return [{i: s for i, s in enumerate(row) if s >= 0} for row in pairs.student_slots.tolist()]


def _reference(rule, teacher_ids, teacher_logprob, student_ids, student_logprob):
    sides = [
        [list(zip(ids, values, strict=True)) for ids, values in zip(i.tolist(), v.tolist(), strict=True)]
        for i, v in ((teacher_ids, teacher_logprob), (student_ids, student_logprob))
    ]
    return [select_reference(rule, teacher, student) for teacher, student in zip(*sides, strict=True)]


def test_equals_its_twin_ties_and_cut_lists_included(rng, random_view):
    assert contextual.CHOICES == contextual_reference.CHOICES
    cases = pairs_found = inexact = 0
    for round_ in range(40):
        view_t, view_s = random_view(rng, "t", 90), random_view(rng, "s", 70)
        width = rng.choice([2, 4, 32])
        table, rule = _tables(
            view_t,
            view_s,
            max_edit_distance=rng.choice([0.3, 0.5]),
            match_digits=round_ % 2 == 0,
            width=width,
        )
        teacher = _candidates(rng, view_t.vocab_size, 20, rng.randint(1, 40))
        student = _candidates(rng, view_s.vocab_size, 20, rng.randint(1, 40))
        got = select_pairs(table, *teacher, *student)
        assert _as_dicts(got) == _reference(rule, *teacher, *student)
        cases += 20
        pairs_found += int(got.mask.sum())
        inexact += int((got.mask & ~got.exact).sum())
    assert cases >= 500
    assert pairs_found > inexact > 500


def test_pairs_are_consistent_and_one_to_one(rng, random_view):
    view_t, view_s = random_view(rng, "t", 200), random_view(rng, "s", 200)
    table, _ = _tables(view_t, view_s)
    teacher, student = _candidates(rng, 200, 64, 50), _candidates(rng, 200, 64, 50)
    pairs = select_pairs(table, *teacher, *student)
    exact = build_exact(view_t, view_s).dense()
    for row in range(64):
        mask = pairs.mask[row]
        slots = pairs.student_slots[row][mask].tolist()
        assert len(slots) == len(set(slots))
        assert torch.equal(pairs.teacher_ids[row][mask], teacher[0][row][mask])
        assert torch.equal(pairs.student_ids[row][mask], student[0][row][slots])
        for value in (pairs.teacher_ids, pairs.student_ids, pairs.student_slots):
            assert (value[row][~mask] == -1).all()
        # Every exact pair that can be made is made, if not for this id then for one of the same bytes.
        taken = set(pairs.student_ids[row][pairs.exact[row]].tolist())
        usable = {int(i) for i, v in zip(student[0][row], student[1][row], strict=True) if v > NOTHING}
        for token_id, value in zip(teacher[0][row].tolist(), teacher[1][row], strict=True):
            if 0 <= token_id < 200 and value > NOTHING and exact[token_id] >= 0:
                assert (int(exact[token_id]) in taken) == (int(exact[token_id]) in usable)


def test_a_rejected_candidate_takes_its_next_choice(toy_view):
    # Both teacher tokens are nearest to `colors`; the nearer gets it, the other goes to `color`.
    view_t, view_s = toy_view("t", [b"colourx", b"colorss"]), toy_view("s", [b"colors", b"color"])
    table, _ = _tables(view_t, view_s, max_edit_distance=0.4)
    flat = torch.zeros(1, 2)
    pairs = select_pairs(table, torch.tensor([[0, 1]]), flat, torch.tensor([[0, 1]]), flat)
    assert pairs.student_ids.tolist() == [[1, 0]]


def test_a_pair_that_both_directions_propose_counts_once(toy_view):
    view_t, view_s = toy_view("t", [b"colour"]), toy_view("s", [b"color"])
    table, _ = _tables(view_t, view_s)
    flat = torch.zeros(1, 1)
    pairs = select_pairs(table, torch.tensor([[0]]), flat, torch.tensor([[0]]), flat)
    assert pairs.mask.sum() == 1
    assert matched_mass(pairs.mask, flat).tolist() == [1.0]


def test_the_students_direction_finds_pairs_too(toy_view):
    # The teacher's token has an exact partner, which is not among the candidates; the student's has none.
    view_t, view_s = toy_view("t", [b"colour"]), toy_view("s", [b"colour", b"color"])
    table, _ = _tables(view_t, view_s)
    flat = torch.zeros(1, 1)
    pairs = select_pairs(table, torch.tensor([[0]]), flat, torch.tensor([[1]]), flat)
    assert pairs.student_ids.tolist() == [[1]]
    assert not pairs.exact.any()


def test_batch_and_history_change_nothing(rng, random_view, monkeypatch):
    view_t, view_s = random_view(rng, "t", 150), random_view(rng, "s", 150)
    table, _ = _tables(view_t, view_s)
    teacher, student = _candidates(rng, 150, 30, 40), _candidates(rng, 150, 30, 40)
    slots = select_pairs(table, *teacher, *student).student_slots
    select_pairs(table, *_candidates(rng, 150, 30, 40), *_candidates(rng, 150, 30, 40))
    assert torch.equal(select_pairs(table, *teacher, *student).student_slots, slots)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    permuted = select_pairs(table, *(x[order] for x in (*teacher, *student)))
    assert torch.equal(permuted.student_slots, slots[order])
    alone = [select_pairs(table, *(x[i : i + 1] for x in (*teacher, *student))) for i in range(30)]
    assert torch.equal(torch.cat([pairs.student_slots for pairs in alone]), slots)
    monkeypatch.setattr(contextual, "CPU_SCRATCH", 1000)
    assert torch.equal(select_pairs(table, *teacher, *student).student_slots, slots)


def test_a_list_that_is_cut_keeps_how_the_token_begins(toy_view):
    # `jel` is farthest, but is how a student that spells in pieces starts.
    view_t, view_s = toy_view("t", [b"jelly"]), toy_view("s", [b"belly", b"telly", b"jolly", b"jel"])
    table, _ = _tables(view_t, view_s, width=2)
    assert table.partner_ids.tolist() == [[3, 0], [4, 4]]


def test_no_positions_give_no_pairs(toy_view):
    view = toy_view("t", [b"x", b"y"])
    table, _ = _tables(view, view)
    ids, flat = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    assert select_pairs(table, ids, flat, ids, flat).mask.shape == (0, 2)


def test_repeated_ids_are_taken_at_their_first_slot(toy_view):
    view = toy_view("t", [b"x", b"y"])
    table, _ = _tables(view, view)
    flat = torch.zeros(1, 2)
    pairs = select_pairs(table, torch.tensor([[0, 0]]), flat, torch.tensor([[0, 0]]), flat)
    assert pairs.student_slots.tolist() == [[0, -1]]


def test_padded_logits_never_match(smollm2_view, mistral_view, smollm2_to_mistral):
    """Embeddings may have more rows than there are ids, and rows without a token may come out on top."""
    table = PairTable.from_tables(*smollm2_to_mistral)
    the_t, the_s = smollm2_view.token_bytes.index(b" the"), mistral_view.token_bytes.index(b" the")
    flat = torch.zeros(1, 4)
    teacher = torch.tensor([[-1, the_t, 49_279, smollm2_view.vocab_size]])
    student = torch.tensor([[32_127, mistral_view.vocab_size, the_s, -1]])
    pairs = select_pairs(table, teacher, flat, student, flat)
    assert pairs.student_slots.tolist() == [[-1, 2, -1, -1]]
    assert pairs.exact.tolist() == [[False, True, False, False]]


def test_matched_mass_is_the_probability_on_the_pairs():
    logprob = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert matched_mass(torch.tensor([[True, False, True]]), logprob).item() == pytest.approx(0.75)


def test_no_host_round_trip_and_one_device(rng, random_view):
    """Run on fake CUDA tensors: a CPU tensor that strays in raises, and so does a shape that needs values."""
    view_t, view_s = random_view(rng, "t", 150), random_view(rng, "s", 150)
    table, _ = _tables(view_t, view_s)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        on_cuda = PairTable(
            torch.empty(table.partner_ids.shape, dtype=torch.int64, device="cuda"),
            torch.empty(table.partner_keys.shape, dtype=torch.int32, device="cuda"),
            table.size_s,
        )
        ids = torch.empty(64, 100, dtype=torch.int64, device="cuda")
        logprob = torch.empty(64, 100, device="cuda", dtype=torch.bfloat16)
        pairs = select_pairs(on_cuda, ids, logprob, ids, logprob)
        mass = matched_mass(pairs.mask, logprob)
        for value in (pairs.student_slots, pairs.mask, pairs.exact, pairs.teacher_ids, mass):
            assert value.device.type == "cuda"
            assert mode.is_our_fake(value)
        assert pairs.student_ids.shape == (64, 100)
        assert mass.shape == (64,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_cpu_gives(rng, random_view):
    view_t, view_s = random_view(rng, "t", 500), random_view(rng, "s", 500)
    table, _ = _tables(view_t, view_s)
    inputs = (*_candidates(rng, 500, 200, 100), *_candidates(rng, 500, 200, 100))
    on_cpu = select_pairs(table, *inputs)
    on_cuda = select_pairs(table.to("cuda"), *(value.to("cuda") for value in inputs))
    assert torch.equal(on_cuda.student_slots.cpu(), on_cpu.student_slots)
    assert torch.equal(on_cuda.exact.cpu(), on_cpu.exact)


def test_more_candidates_than_ids_are_refused(toy_view):
    view_t, view_s = toy_view("t", [b"x", b"y"]), toy_view("s", [b"x", b"y", b"z"])
    table, _ = _tables(view_t, view_s)
    check_top_k(table, 2)
    with pytest.raises(BadOption, match="`top_k` is 3; give a number from 1 to 2"):
        check_top_k(table, 3)
    ids, flat = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3)
    with pytest.raises(BadOption, match="the teacher's candidates is 3"):
        select_pairs(table, ids, flat, ids, flat)


def test_a_table_of_other_tokenizers_is_refused(toy_view):
    view_t, view_s, other = (toy_view(name, [name.encode()]) for name in "tso")
    with pytest.raises(TokenizerMismatch, match="was built for o "):
        PairTable.from_tables(build_exact(view_t, view_s), build_neighbours(other, view_s))


def test_real_candidates_equal_the_twin(smollm2_view, mistral_view, smollm2_to_mistral):
    """Take as candidates the ids of real text and what is near to them, in drawn orders."""
    exact, near = smollm2_to_mistral
    table = PairTable.from_tables(exact, near)
    rule = make_pairing_rule(
        smollm2_view, mistral_view, partner_rows(exact, near)[0], max_edit_distance=0.3, match_digits=False
    )
    text = "Natalia sold 48 clips, colouring unbelievably."
    source = random.Random(1)
    rows_t, rows_s = [], []
    ids_s = mistral_view.encode(text).ids.tolist()
    for token_id in smollm2_view.encode(text).ids.tolist():
        rows_t.append(source.sample([token_id, *((token_id + i) % 49_000 for i in range(1, 60))], 60))
        partners = {x for i in rows_t[-1][:8] for x in table.partner_ids[i].tolist() if x < 32_000}
        around = [*dict.fromkeys([*sorted(partners), *ids_s, *source.sample(range(300, 5000), 60)])][:60]
        rows_s.append(source.sample(around, 60))
    teacher, student = torch.tensor(rows_t), torch.tensor(rows_s)
    flat = torch.zeros(teacher.shape)
    pairs = select_pairs(table, teacher, flat, student, flat)
    assert _as_dicts(pairs) == _reference(rule, teacher, flat, student, flat)
    assert pairs.exact.any()
    assert (pairs.mask & ~pairs.exact).any()


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
def test_the_teachers_own_candidates_equal_the_twin(
    smollm2_view, mistral_view, smollm2_to_mistral, gsm8k_rows
):
    """SmolLM2's top 100 at every position of 7 GSM8K rows; the student's are its probability moved to prefixes."""
    from cdm_toolkit.hub.models import load_model
    from cdm_toolkit.vocab_map.prefix import build_prefix

    exact, near = smollm2_to_mistral
    table = PairTable.from_tables(exact, near)
    rule = make_pairing_rule(
        smollm2_view, mistral_view, partner_rows(exact, near)[0], max_edit_distance=0.3, match_digits=False
    )
    model = load_model("smollm2")
    prefix = torch.from_numpy(build_prefix(smollm2_view, mistral_view).dense())
    to_student = torch.where(prefix >= 0, prefix, mistral_view.vocab_size)
    positions = better = 0
    for row in gsm8k_rows[:7]:
        ids = torch.from_numpy(smollm2_view.encode(f"{row['question']}\n{row['answer']}").ids).long()
        with torch.no_grad():
            logprob = model(ids[None]).logits[0, :, : smollm2_view.vocab_size].log_softmax(-1)
        moved = torch.zeros(len(ids), mistral_view.vocab_size + 1).index_add_(1, to_student, logprob.exp())
        teacher, student = logprob.topk(100), moved[:, :-1].log().topk(100)
        pairs = select_pairs(table, teacher.indices, teacher.values, student.indices, student.values)
        # the twin is slow: one position in 12, from all over each row
        columns = (teacher.indices, teacher.values, student.indices, student.values)
        twin = _reference(rule, *(column[positions % 12 :: 12] for column in columns))
        assert _as_dicts(pairs)[positions % 12 :: 12] == twin
        among_both = matched_mass(pairs.exact, teacher.values)
        contextual_mass = matched_mass(pairs.mask, teacher.values)
        assert (contextual_mass >= among_both).all()
        better += int((contextual_mass > among_both).sum())
        positions += len(ids)
    assert positions > 700
    assert better > 140
