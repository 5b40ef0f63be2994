"""Verdicts: paired t-tests over seeds, their intervals, Holm's correction, and the sentences."""

from __future__ import annotations

from math import isclose, sqrt
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cdm_toolkit.compare.verdicts import Verdict, compare, holm, verdicts


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


EXACT = by_seed(0.40, 0.44, 0.36)
AHEAD = by_seed(0.40 + 0.029, 0.44 + 0.031, 0.36 + 0.033)


def test_a_method_beats_another_by_paired_differences() -> None:
    found = compare("spelling", AHEAD, "exact", EXACT)
    assert found.text == "spelling beats exact: +0.031 [0.026, 0.036], 3 seeds, p = 0.0014"
    assert found.ahead
    assert not found.behind
    assert compare("exact", EXACT, "spelling", AHEAD).text.startswith(
        "exact is behind spelling: -0.031 [-0.036"
    )


def test_what_is_not_significant_is_said_with_its_interval() -> None:
    level = compare("spelling", by_seed(0.30, 0.34, 0.32), "exact", by_seed(0.31, 0.31, 0.33))
    assert level.text == "spelling and exact, no difference shown: +0.003 [-0.054, 0.061], 3 seeds"
    assert not level.ahead
    assert not level.behind


def test_luck_of_a_seed_that_all_methods_share_cancels_out() -> None:
    assert compare("a", by_seed(0.11, 0.41, 0.91), "b", by_seed(0.10, 0.40, 0.901)).ahead


def test_one_seed_tests_nothing() -> None:
    found = compare("spelling", by_seed(0.4), "exact", by_seed(0.3))
    assert found.text == "spelling and exact, no difference shown: +0.100, 1 seed"
    assert (found.interval, found.p_value) == (None, None)
    other = compare("a", {0: 0.5, 1: 0.7}, "b", {2: 0.1, 3: 0.2, 4: 0.3})
    assert other.text == "a and b, no difference shown: +0.400, no seed in common"


def test_only_common_seeds_count() -> None:
    found = compare("a", AHEAD | {7: 9.0}, "b", EXACT | {8: -9.0})
    assert (found.difference, found.seeds) == (pytest.approx(0.031), 3)


def test_equal_runs_show_nothing_and_a_constant_lead_all() -> None:
    assert not compare("a", by_seed(0.5, 0.25), "b", by_seed(0.5, 0.25)).is_significant
    lead = compare("a", by_seed(0.75, 0.5), "b", by_seed(0.5, 0.25))
    assert (lead.interval, lead.p_value, lead.ahead) == ((0.25, 0.25), 0.0, True)


SEEDS = st.lists(st.tuples(st.integers(-20, 20), st.integers(-20, 20)), min_size=2, max_size=6)


@given(SEEDS)
def test_it_is_student_s_t_of_the_differences(pairs: list[tuple[int, int]]) -> None:
    """Follow the textbook: t = mean / (s / √n) with n − 1 degrees of freedom."""
    a, b = (by_seed(*values) for values in zip(*pairs, strict=True))
    found = compare("a", a, "b", b)
    differences = [x - y for x, y in pairs]
    error, t = stdev(differences) / sqrt(len(pairs)), stats.t(len(pairs) - 1)
    assert found.difference == pytest.approx(fmean(differences))
    if error == 0:
        assert found.interval == (differences[0], differences[0])
        assert found.p_value == (1.0 if differences[0] == 0 else 0.0)
        return
    assert found.p_value == pytest.approx(2 * t.sf(abs(fmean(differences)) / error))
    half = t.ppf(0.975) * error
    assert found.interval == pytest.approx((fmean(differences) - half, fmean(differences) + half))


@given(SEEDS)
def test_turning_a_comparison_round_turns_its_sign(pairs: list[tuple[int, int]]) -> None:
    a, b = (by_seed(*values) for values in zip(*pairs, strict=True))
    there, back = compare("a", a, "b", b), compare("b", b, "a", a)
    assert isclose(there.difference, -back.difference)
    assert there.p_value == pytest.approx(back.p_value)
    assert (there.ahead, there.behind) == (back.behind, back.ahead)


@pytest.mark.parametrize(("statistic", "freedom"), [(12.7062, 1), (4.3027, 2), (2.7764, 4), (2.2281, 10)])
def test_p_value_is_that_of_the_tables(statistic: float, freedom: int) -> None:
    seeds = freedom + 1
    spread = by_seed(*range(seeds))
    error = stdev(spread.values()) / sqrt(seeds)
    for sign in (1, -1):
        lead = {
            seed: value - fmean(spread.values()) + sign * statistic * error for seed, value in spread.items()
        }
        found = compare("a", lead, "b", dict.fromkeys(spread, 0.0))
        assert found.p_value == pytest.approx(0.05, abs=1e-5)
        assert found.interval is not None
        assert min(map(abs, found.interval)) == pytest.approx(0.0, abs=1e-3)


P_VALUES = st.lists(st.integers(0, 100).map(lambda n: n / 100), max_size=8)


@given(P_VALUES)
def test_holm_rejects_what_its_steps_reject(values: list[float]) -> None:
    """Follow the definition: while the smallest of k that are left is at most 0.05 / k, reject it."""
    left, rejected = sorted(values), 0
    while left and left[0] * len(left) <= 0.05:
        left.pop(0)
        rejected += 1
    assert sum(corrected <= 0.05 for corrected in holm(values)) == rejected


@given(P_VALUES)
def test_holm_keeps_the_order_and_is_never_bolder(values: list[float]) -> None:
    corrected = holm(values)
    assert all(p <= c <= 1 for p, c in zip(values, corrected, strict=True))
    pairs = sorted(zip(values, corrected, strict=True))
    assert [c for _, c in pairs] == sorted(corrected)


def test_what_one_comparison_shows_several_need_not() -> None:
    near = by_seed(0.40 + 0.001, 0.44 + 0.012, 0.36 + 0.021)
    scores = {"spelling": AHEAD, "exact": EXACT, "uld": EXACT, "one": by_seed(0.4), "near": near}
    found = {verdict.other: verdict for verdict in verdicts("spelling", scores)}
    assert list(found) == ["exact", "uld", "one", "near"]
    assert found["one"].p_value is None
    assert found["exact"].p_value == pytest.approx(3 * compare("spelling", AHEAD, "exact", EXACT).p_value)
    assert compare("spelling", AHEAD, "near", near).interval == found["near"].interval
    weak = by_seed(0.40 + 0.010, 0.44 + 0.018, 0.36 + 0.004)
    alone = compare("spelling", AHEAD, "weak", weak)
    assert alone.p_value is not None
    among = {v.other: v for v in verdicts("spelling", scores | {"weak": weak, "more": weak, "most": weak})}
    assert isinstance(among["weak"], Verdict)
    assert alone.p_value < 0.05 < among["weak"].p_value


@pytest.mark.filterwarnings("error::RuntimeWarning")  # scipy's
def test_differences_that_hardly_vary_are_no_warning() -> None:
    found = compare("a", by_seed(0.3, 0.4, 0.5), "b", by_seed(0.2, 0.3, 0.4))
    assert (found.ahead, found.sign) == (True, "▲")
