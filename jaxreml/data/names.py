"""Names of responses."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pandas as pd

from jaxreml.data.labels import shown
from jaxreml.errors import DataError


def check_names(names: Any) -> pd.Index:
    """Names of responses as an index.

    Raises:
        DataError: a name that repeats; names that are neither all strings nor all integers.
    """
    index = names if isinstance(names, pd.RangeIndex) else pd.Index(names, tupleize_cols=False)
    kind = pd.api.types.infer_dtype(index, skipna=False)
    if kind not in ("string", "integer", "empty"):
        example = next((k for k in index if not isinstance(k, str)), index[0])
        raise DataError(
            f"the names of the responses must be all strings or all integers (one is {example!r}, "
            f"they are {kind}); rename the columns"
        )
    if not index.is_unique:
        refuse_repeated(list(index[index.duplicated()]))
    return index


def matching(names: list[str], pattern: str | None) -> list[str]:
    """The names that match a glob, all if it is None; DataError if none does."""
    found = [name for name in names if pattern is None or fnmatchcase(name, pattern)]
    if names and not found:
        listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise DataError(f"no response matches the pattern {pattern!r}; the columns are: {listed}")
    return found


def refuse_repeated(repeated: list[Any]) -> None:
    """DataError if there are names in `repeated`, those that occur more than once."""
    if repeated:
        more = f" and {len(repeated) - 1} more" if len(repeated) > 1 else ""
        raise DataError(
            f"response {shown(repeated[:1])}{more} occurs more than once; names must be unique: "
            "rename or drop the columns"
        )
