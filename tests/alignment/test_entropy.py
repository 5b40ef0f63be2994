from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm_toolkit.alignment.dtw_reference import entropy_weights
from cdm_toolkit.alignment.entropy import uniform_weights, weights
from cdm_toolkit.errors import BadOption


@given(st.lists(st.floats(0, 20), max_size=30))
def test_weights_are_those_of_the_paper(entropy):
    assert weights(np.array(entropy)).tolist() == entropy_weights(entropy)


def test_the_most_uncertain_token_weighs_most():
    assert weights(np.array([0.0, 5.0, 10.0])).tolist() == [3, 4, 5]


@pytest.mark.parametrize("length", [0, 1, 7])
def test_equal_entropies_weigh_the_same(length):
    assert weights(np.full(length, 2.5)).tolist() == uniform_weights(length).tolist() == [3] * length


@given(st.lists(st.floats(0, 20), min_size=1, max_size=30))
def test_the_unit_of_entropy_is_free(entropy):
    assert (
        weights(np.array(entropy)).tolist() == weights(2 * np.array(entropy) + 1).tolist()
        or np.ptp(entropy) < 1e-9
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_entropy_that_is_not_finite_is_refused(value):
    with pytest.raises(BadOption, match="finite entropies"):
        weights(np.array([1.0, value]))
