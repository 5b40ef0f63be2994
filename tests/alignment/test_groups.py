from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from cdm_toolkit.alignment.groups import KINDS, Alignment, Group, in_order
from cdm_toolkit.alignment.kernels import product_links

from .invariants import invariant_violations, transposed


def made(*rows, n_t, n_s):
    groups = np.array(rows, np.int64).reshape(-1, 4)
    return Alignment(
        groups.astype(np.int32), np.ones(len(groups), bool), product_links(groups), "bytes", n_t, n_s
    )


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [((1, 1), "1-1"), ((1, 3), "1-n"), ((2, 1), "n-1"), ((2, 4), "n-m"),
     ((1, 0), "1-0"), ((2, 0), "n-0"), ((0, 1), "0-1"), ((0, 5), "0-n")],
)  # fmt: skip
def test_kinds(sizes, kind):
    t, s = sizes
    assert Group(3, 3 + t, 5, 5 + s, exact=True).kind == kind
    assert made((0, t, 0, s), n_t=t, n_s=s).kind_counts() == {name: int(name == kind) for name in KINDS}


def test_iteration_gives_plain_groups():
    alignment = made((0, 1, 0, 2), (1, 2, 2, 2), n_t=2, n_s=2)
    assert list(alignment) == [Group(0, 1, 0, 2, True), Group(1, 2, 2, 2, True)]
    assert len(alignment) == 2
    assert invariant_violations(alignment) == []


def test_links_are_all_pairs_of_a_group():
    assert made((0, 1, 0, 2), (1, 2, 2, 2), (2, 4, 2, 4), n_t=4, n_s=4).links.tolist() == [
        [0, 0], [0, 1], [2, 2], [2, 3], [3, 2], [3, 3],
    ]  # fmt: skip


def test_transpose_swaps_and_keeps_the_teachers_unmatched_tokens_first():
    alignment = made((0, 1, 0, 0), (1, 1, 0, 2), (1, 3, 2, 4), n_t=3, n_s=4)
    back = transposed(alignment)
    assert back.groups.tolist() == [[0, 2, 0, 0], [2, 2, 0, 1], [2, 4, 1, 3]]
    assert back.links.tolist() == [[2, 1], [2, 2], [3, 1], [3, 2]]
    assert (back.n_t, back.n_s) == (4, 3)
    assert invariant_violations(back) == []
    assert np.array_equal(transposed(back).groups, alignment.groups)


def test_order_within_a_run_of_unmatched_tokens():
    groups = np.array([[0, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 2], [1, 2, 2, 3]])
    assert in_order(groups, np.zeros(4, bool))[0].tolist() == [
        [0, 1, 0, 0],
        [1, 1, 0, 1],
        [1, 1, 1, 2],
        [1, 2, 2, 3],
    ]


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([(0, 1, 0, 1)], "the groups end at"),
        ([(0, 1, 0, 1), (2, 3, 1, 2)], "does not follow"),
        ([(0, 2, 0, 1), (1, 3, 1, 2)], "does not follow"),
        ([(0, 3, 0, 2), (3, 3, 2, 2)], "is empty"),
    ],
)
def test_violations_are_found(rows, fault):
    assert any(fault in found for found in invariant_violations(made(*rows, n_t=3, n_s=2)))


def test_a_group_that_can_be_split_is_a_violation(write):
    spans = write(b"ab").token(0, 1).token(1, 2).spans()
    assert "can be cut" in invariant_violations(made((0, 2, 0, 2), n_t=2, n_s=2), spans, spans)[0]


def test_importing_groups_does_not_load_numba():
    imports = "cdm_toolkit.alignment.groups, cdm_toolkit.alignment.aligners, cdm_toolkit.alignment.segments"
    code = f"import sys, {imports}; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
