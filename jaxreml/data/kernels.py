"""``kernels={"animal": K}``: known covariances of the levels of grouping factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from jaxreml.data.grouping import GroupingTerm
from jaxreml.errors import DataError
from jaxreml.kernels.known import Inverse, Kernel, checked

SHOWN = 5  # levels that a message names


@dataclass(frozen=True, eq=False)
class KnownKernel:
    """A known covariance of the levels of a grouping factor, checked.

    Attributes:
        part: its name, where a factor has several; else "".
        labels: of the levels, L; empty for the independent levels of the data.
        matrix: (L, L); None for independent levels.
    """

    part: str
    labels: tuple[Any, ...]
    matrix: np.ndarray | None


Kernels = Mapping[str, tuple[KnownKernel, ...]]  # by grouping factor


def read_kernels(kernels: Mapping[str, Any] | None, terms: list[GroupingTerm]) -> Kernels:
    """Check the argument ``kernels`` of `jaxreml.fit`.

    Args:
        kernels: by grouping factor a kernel, or several by name: a frame, an array in the order of
            the sorted levels, a `jaxreml.kernels.Kernel` or `Inverse`, or what has a `kernel()`;
            None, among several, for independent levels.
        terms: of the formula, without kernels.

    Raises:
        DataError: factors that the formula does not have, kernels that are no covariances.
    """
    if kernels is None:
        return {}
    if not isinstance(kernels, Mapping):
        raise DataError(
            "kernels must be a dict of kernels by grouping factor, such as {'animal': A}, not "
            f"{type(kernels).__name__}"
        )
    levels = {term.name: term.levels for term in terms}
    found: dict[str, tuple[KnownKernel, ...]] = {}
    for name, given in kernels.items():
        if name not in levels:
            have = ", ".join(map(repr, levels)) or "none"
            raise DataError(
                f"kernels has {name!r}, which is no grouping factor of the formula (it has {have})"
            )
        if isinstance(given, tuple) and all(isinstance(own, KnownKernel) for own in given):
            found[name] = given  # of a frame
            continue
        if isinstance(given, Mapping):
            if not given:
                raise DataError(f"kernels[{name!r}] has no kernel")
            parts = [(str(part), own) for part, own in given.items()]
        else:
            parts = [("", given)]
        found[name] = tuple(_read(name, part, own, levels[name]) for part, own in parts)
    return found


def _read(name: str, part: str, given: Any, levels: tuple[Any, ...]) -> KnownKernel:
    what = f"the kernel {part!r} of {name!r}" if part else f"the kernel of {name!r}"
    if given is None:
        if not part:
            raise DataError(f"{what} is None: leave it out for independent levels")
        return KnownKernel(part, (), None)
    if hasattr(given, "kernel"):
        given = given.kernel()
    if isinstance(given, Kernel):
        if len(given.labels) != len(given.matrix):
            raise DataError(f"{what} has {len(given.matrix)} rows and {len(given.labels)} labels")
        given = given.covariance()
    elif isinstance(given, Inverse):
        given = given.covariance()
    elif not isinstance(given, pd.DataFrame):
        given = _of_array(what, given, levels)
    labels, matrix = checked(what, given)
    return KnownKernel(part, labels, matrix)


def _of_array(what: str, given: Any, levels: tuple[Any, ...]) -> pd.DataFrame:
    """An array whose rows are the levels of the data in order."""
    if type(given).__module__.startswith("scipy.sparse"):
        raise DataError(
            f"{what} is a sparse matrix: give jaxreml.kernels.Inverse(matrix, labels) if it is the "
            "inverse of the covariance, or a dense covariance"
        )
    try:
        matrix = np.asarray(given, float)
    except (TypeError, ValueError):
        raise DataError(f"{what} is no matrix but {type(given).__name__}") from None
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise DataError(f"{what} is not square: its shape is {matrix.shape}")
    if len(matrix) != len(levels):
        raise DataError(
            f"{what} is an array of order {len(matrix)}, and the data have {len(levels)} levels: "
            "give a frame with labels, or jaxreml.kernels.Kernel(matrix, labels)"
        )
    index = pd.Index(levels, tupleize_cols=False)
    return pd.DataFrame(matrix, index, index)


def with_kernels(terms: list[GroupingTerm], kernels: Kernels) -> list[GroupingTerm]:
    """The terms whose levels have known covariances, one for each of a factor's kernels, and the
    others as they are.

    Raises:
        DataError: levels of the data that a kernel does not have, named.
    """
    found = []
    for term in terms:
        for own in kernels.get(term.name, ()):
            found.append(_with_kernel(term, own))
        if term.name not in kernels:
            found.append(term)
    return found


def _with_kernel(term: GroupingTerm, own: KnownKernel) -> GroupingTerm:
    name = f"{term.name} ({own.part})" if own.part else term.name
    if own.matrix is None:
        return replace(term, name=name, source=term.name)
    index = pd.Index(own.labels, tupleize_cols=False)
    places = index.get_indexer(pd.Index(term.levels, tupleize_cols=False))
    if np.any(places < 0):
        lacking = [term.levels[k] for k in np.flatnonzero(places < 0)]
        shown = ", ".join(map(repr, lacking[:SHOWN])) + (", ..." if len(lacking) > SHOWN else "")
        types = {type(value).__name__ for value in (lacking[0], own.labels[0])}
        hint = f" (the types of the labels differ: {', '.join(sorted(types))})"
        raise DataError(
            f"the kernel of {name!r} has no label for {len(lacking)} of {len(term.levels)} levels "
            f"of the data: {shown}; its labels are such as {own.labels[0]!r}"
            f"{hint if len(types) > 1 else ''}"
        )
    return replace(
        term,
        name=name,
        source=term.name,
        levels=own.labels,
        codes=places[term.codes],
        kernel=own.matrix,
    )


def codes_in_kernel(term: GroupingTerm, table: pd.DataFrame) -> np.ndarray:
    """Places of the rows of a table in the term's kernel, -1 for labels that it does not have."""
    if len(term.factors) == 1:
        values = table[term.factors[0]].astype(object)
    else:
        texts = [table[name].astype(str) for name in term.factors]
        values = texts[0].str.cat(texts[1:], sep=":")
    return pd.Index(term.levels, tupleize_cols=False).get_indexer(pd.Index(values))
