from __future__ import annotations

import numpy as np

from cdm_toolkit.vocab_map.exact import build_exact
from cdm_toolkit.vocab_map.min_ed import build_min_ed
from cdm_toolkit.vocab_map.neighbours import build_neighbours
from cdm_toolkit.vocab_map.prefix import build_prefix
from cdm_toolkit.vocab_map.stats import (
    Coverage,
    coverage_by_class,
    coverage_by_frequency,
    coverage_by_ids,
    matchable_by_strategy,
    pairable_ids,
)


def test_coverage_by_ids_frequency_and_class(toy_view):
    tokens = [b"the", "да".encode(), b" 12", b"\n", b"?", b"", b"hat"]
    view_t = toy_view("t", tokens, {5: "eos"})
    mapping = build_exact(view_t, toy_view("s", [b"the", b" 12", b"hat"]))
    assert coverage_by_ids(mapping) == Coverage(3, 7)
    assert coverage_by_frequency(mapping, np.array([10, 5, 0, 20, 1, 0, 4])) == Coverage(14, 40)
    by_class = coverage_by_class(mapping, view_t)
    assert by_class == {
        "letters: Latin": Coverage(2, 2),
        "letters: Cyrillic": Coverage(0, 1),
        "digits": Coverage(1, 1),
        "blanks": Coverage(0, 1),
        "punctuation": Coverage(0, 1),
        "special": Coverage(0, 1),
    }
    assert Coverage(0, 0).share == 0


def test_mass_by_strategy_never_falls_below_the_exact_mass(smollm2_view, mistral_view, smollm2_to_mistral):
    exact, table = smollm2_to_mistral
    reachable = matchable_by_strategy(
        exact, build_min_ed(smollm2_view, mistral_view), build_prefix(smollm2_view, mistral_view), table
    )
    assert list(reachable) == ["exact", "+min-ed", "+contextual", "+prefix"]
    for mask in reachable.values():
        assert (mask >= exact.matched).all()
    logits = np.random.default_rng(0).standard_normal((4, smollm2_view.vocab_size + 128))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    mass = {name: probabilities[:, : len(mask)][:, mask].sum(1) for name, mask in reachable.items()}
    assert (mass["+prefix"] > mass["+contextual"]).all()
    assert (mass["+contextual"] > mass["exact"]).all()


def test_pairable_ids_count_both_directions(toy_view):
    # `colour` has an exact partner; the student's `color` has none and names it as its neighbour.
    view_t, view_s = toy_view("t", [b"colour", b"zz"]), toy_view("s", [b"colour", b"color"])
    exact, table = build_exact(view_t, view_s), build_neighbours(view_t, view_s)
    assert table.s_to_t.row(1)[0][0] == 0
    assert pairable_ids(exact, table).tolist() == [True, False]
