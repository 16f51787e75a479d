"""Tables that the command line names: files, bundled data sets, standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

COMPRESSED = (".gz", ".xz", ".bz2", ".zip", ".zst")


class Dialect(NamedTuple):
    """How text files are written.

    Attributes:
        sep: what separates columns; by the suffix if None.
        na_values: text for missing values, besides pandas' own.
        encoding: of the characters.
    """

    sep: str | None = None
    na_values: tuple[str, ...] = ()
    encoding: str = "utf-8"

    @classmethod
    def of(cls, sep: str | None, na_values: list[str] | None, encoding: str) -> Dialect:
        """From the options of a command."""
        texts = [text for given in na_values or [] for text in given.split(",")]
        return cls(sep, tuple(texts), encoding)

    def options(self, suffix: str) -> dict[str, Any]:
        """Arguments of `pandas.read_csv` for a file of that suffix."""
        sep = self.sep or ("\t" if suffix == ".tsv" else ",")
        sep = {"\\t": "\t", "tab": "\t"}.get(sep, sep)
        options: dict[str, Any] = {"sep": sep, "encoding": self.encoding}
        if len(sep) > 1:
            options["engine"] = "python"  # a regular expression
        return options


def read_responses(
    responses: str, id: str | None, pattern: str | None, dialect: Dialect | None = None
) -> Any:
    """What `fit_many` takes for the argument RESPONSES; files that can stay on disk do."""
    from jaxreml.data.names import matching
    from jaxreml.data.sources import Parquet
    from jaxreml.errors import DataError

    path = Path(responses)
    if not path.is_file():
        raise DataError(f"there is no file {responses!r}")
    if path.suffix == ".npy":
        if pattern is not None:
            raise DataError("--responses chooses columns by name, and a .npy file has no names")
        return path
    if path.suffix == ".parquet":
        return Parquet(path, id, pattern)
    table = read_table(responses, dialect, labelled=True)
    names = matching([name for name in table.columns if name != id], pattern)
    return table[names if id is None or id not in table else [id, *names]]


def read_table(
    data: str, dialect: Dialect | None = None, *, labelled: bool = False
) -> pd.DataFrame:
    """The table behind the argument DATA.

    Args:
        data: a bundled name, a file, or "-" for standard input.
        dialect: of text.
        labelled: whether a first column of text without a name holds labels of rows, as R and
            pandas write them.

    Raises:
        DataError: no such file, or one that cannot be read.
    """
    import pandas as pd

    from jaxreml.datasets import load, names
    from jaxreml.errors import DataError

    dialect = dialect or Dialect()
    if data in names() and not Path(data).exists():
        return load(data)
    path = Path(data)
    suffix = next((s for s in reversed(path.suffixes) if s not in COMPRESSED), "")
    binary: dict[str, Any] = {".parquet": pd.read_parquet, ".feather": pd.read_feather}
    is_text = suffix in (".csv", ".tsv") or data == "-" or (dialect.sep and suffix not in binary)
    if not is_text and suffix not in binary:
        hint = "; with --sep any text file is read" if path.is_file() else ""
        raise DataError(
            f"{data!r} is neither a file ending in .csv, .tsv, {', '.join(binary)} nor a bundled "
            f"data set ({', '.join(names())}){hint}"
        )
    if data != "-" and not path.is_file():
        raise DataError(f"there is no file {data!r}")
    try:
        if not is_text:
            return binary[suffix](path)
        options = dialect.options(suffix)
        source: Any = path
        if data == "-":
            source = getattr(sys.stdin, "buffer", sys.stdin)
        table = pd.read_csv(source, na_values=list(dialect.na_values), **options)
        if data != "-":
            _refuse_repeated_header(path, options)
    except pd.errors.EmptyDataError:
        raise DataError(f"{data!r} is empty") from None
    except pd.errors.ParserError as error:
        raise DataError(f"{data!r} cannot be read: {error}") from None
    except ImportError:
        raise DataError(
            f"reading {suffix} files needs pyarrow: pip install 'jaxreml[arrow]'"
        ) from None
    except LookupError:
        raise DataError(f"--encoding {dialect.encoding!r} is not one that Python knows") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{data!r} is not text in {dialect.encoding} ({error.reason} at byte {error.start}): "
            "give --encoding, for example latin-1"
        ) from None
    except ValueError as error:
        raise DataError(f"{data!r} cannot be read: {error}") from None
    return _with_labels(table) if labelled else table


def _with_labels(table: pd.DataFrame) -> pd.DataFrame:
    """A first column without a name as labels of the rows; one that only counts them is dropped."""
    import numpy as np

    if not len(table.columns) or table.columns[0] != "Unnamed: 0":
        return table
    labels = table.iloc[:, 0]
    rest = table.iloc[:, 1:]
    for first in (0, 1):
        if np.array_equal(labels.to_numpy(), np.arange(len(labels)) + first):
            return rest
    return rest.set_axis(labels.rename(None), axis=0)


def _refuse_repeated_header(path: Path, options: dict[str, Any]) -> None:
    """pandas renames repeated columns silently (x, x.1); a formula would take the first."""
    import pandas as pd

    from jaxreml.errors import DataError

    header = pd.read_csv(path, header=None, nrows=1, dtype=str, **options).iloc[0]
    repeated = header[header.duplicated()].dropna()
    if len(repeated):
        raise DataError(f"column {repeated.iloc[0]!r} occurs more than once in {str(path)!r}")
