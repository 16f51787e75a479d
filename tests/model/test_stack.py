"""`stack`: designs side by side for `vmap`, and what cannot stand side by side."""

from __future__ import annotations

import numpy as np
import pytest

from jaxreml import DataError, Design, Term, stack

CODES = np.repeat(np.arange(6), 5)


def design(seed=0, name="g", effects=None, p=1, **options):
    rng = np.random.default_rng(seed)
    effects = None if effects is None else rng.normal(size=(30, effects))
    X = np.column_stack([np.ones(30), rng.normal(size=(30, p - 1))])
    return Design.from_arrays(rng.normal(size=30), X, [Term(CODES, effects, name=name)], **options)


def test_iterators_and_names():
    designs = [design(k) for k in range(3)]
    stacked = stack(designs)
    assert stacked.names == designs[0].names and stacked.beta_ols.shape == (3, 1)
    np.testing.assert_array_equal(stack(iter(designs)).beta_ols, stacked.beta_ols)
    renamed = stack(design(k, name) for k, name in enumerate("abc"))
    assert renamed.names == designs[0].without_names().names
    np.testing.assert_array_equal(renamed.structure.factors, stacked.structure.factors)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], "there are no designs to stack"),
        ([design(), 3], "stack takes designs, not int"),
        ([design(), design(p=2)], "different numbers of fixed effects cannot be stacked: 1 and 2"),
        (
            [design(), design(effects=2)],
            r"of effects per term cannot be stacked: \(1,\) and \(2,\)",
        ),
        ([design(), design(structure="dense")], "different structures .*: grouped and dense"),
    ],
)
def test_what_cannot_be_stacked(others, message):
    with pytest.raises(DataError, match=message):
        stack(others)
