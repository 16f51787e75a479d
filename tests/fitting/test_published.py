"""Figures that books, SAS and other programs published are ours."""

from __future__ import annotations

import published
import pytest


@pytest.mark.parametrize("case", published.CASES, ids=lambda case: case["id"])
def test_published_figures_are_ours(case):
    found = published.compared(case)
    assert len(found) and case["source"]
    wrong = found[~(found["deviation"] <= found["allowed"])]
    assert wrong.empty, f"\n{wrong}"


def test_the_precision_of_printed_figures():
    assert published.half_unit("62.3958") == pytest.approx(5e-5)
    assert published.half_unit("83") == 0.5 and published.half_unit(17.5) == 0
