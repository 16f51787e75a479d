"""Results of a stream of responses, kept block by block, so that an interrupted run can go on.

Beside the output file stands a folder, ``out.parquet.parts``: a manifest that says of which run,
and one parquet file for each block fitted. A file gets its name when it is complete. The parts are
put together at the end and removed. Nothing in them depends on when or in how many runs they were
written.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxreml import __version__
from jaxreml.data.frame import ModelFrame
from jaxreml.data.sources import import_parquet
from jaxreml.errors import DataError
from jaxreml.many.fitted import BatchModel, false_discovery_rates
from jaxreml.many.numbers import count_failures
from jaxreml.results import batch_tables, displays, parquet
from jaxreml.results.batch import BatchResults
from jaxreml.results.made_by import made_by
from jaxreml.status import Status

MARK = b"jaxreml.part"  # key of a part's schema metadata


@made_by("`jaxreml.fit_many` with output=")
@dataclass(frozen=True, repr=False)
class StreamedResults:
    """What `fit_many` wrote to a file.

    Attributes:
        path: the parquet file.
        model: what the responses share.
        n_responses: how many there are.
        failures: how many have no optimum, by reason.
        failed: the names of the first of these, by reason.

    Examples:
        >>> written = jaxreml.fit_many(
        ...     "~ Days + (1 | Subject)", data, genes, output="genes.parquet", overwrite=True
        ... )
        >>> written
        <StreamedResults 'genes.parquet', '~ Days + (1 | Subject)', 40 responses, 0 ...
        >>> written.n_responses, written.failures
        (40, {})
    """

    path: Path
    model: BatchModel
    n_responses: int
    failures: dict[str, int]
    failed: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def n_failed(self) -> int:
        """Responses without an optimum.

        Examples:
            >>> written = jaxreml.fit_many(
            ...     "~ Days + (1 | Subject)", data, genes, output="genes.parquet", overwrite=True
            ... )
            >>> written.n_failed
            0
        """
        return sum(self.failures.values())

    def __repr__(self) -> str:
        return (
            f"<StreamedResults {str(self.path)!r}, {self.model.formula!r}, {self.n_responses} "
            f"responses, {self.n_failed} without an optimum>"
        )

    def _repr_html_(self) -> str:
        return displays.of_stream(self)

    def read(self) -> BatchResults:
        """The results, in memory.

        Examples:
            >>> written = jaxreml.fit_many(
            ...     "~ Days + (1 | Subject)", data, genes, output="genes.parquet", overwrite=True
            ... )
            >>> written.read().top_table("Days", 1)["estimate"].round(2).to_dict()
            {'gene5': 0.23}
        """
        return BatchResults.read_parquet(self.path)


def frequent_failures(status: np.ndarray) -> dict[str, int]:
    """`count_failures`, the most frequent first."""
    return dict(sorted(count_failures(status).items(), key=lambda item: -item[1]))


def first_failed(names: Any, status: np.ndarray, most: int = 5) -> dict[str, list[Any]]:
    """The names of the first responses without an optimum, by sentence."""
    found = {}
    for code in np.unique(status[status != Status.CONVERGED]):
        places = np.flatnonzero(status == code)[:most]
        found[Status(int(code)).sentence] = pd.Index(names[places]).tolist()
    return found


def check_output(path: str | Path, overwrite: bool) -> Path:
    """The path of an output file; DataError, before any work, if it cannot be written."""
    path = Path(path)
    if path.suffix != ".parquet":
        raise ValueError(f"output {str(path)!r}: the file's name must end in .parquet")
    import_parquet("output to parquet")
    return parquet.check_new(path, overwrite)


def describe_run(
    frame: ModelFrame,
    names: pd.Index | None,
    method: str,
    structure: str,
    max_iterations: int,
    block: int,
    tests: tuple[str, list[str], np.ndarray],
    modes: bool,
) -> dict[str, Any]:
    """The manifest of a run: equal for runs that write the same parts, if the responses are equal.

    The values of the responses are not in it: each part holds a checksum of its own.
    """
    parts: list[Any] = [frame.X, frame.rows, frame.weights, frame.offset]
    parts += [frame.fixed_names, frame.aliased]
    for term in frame.terms:
        parts += [term.codes, term.effects, term.name, term.levels, term.effect_names]
        parts += [] if term.kernel is None else [term.kernel]
    return {
        "jaxreml": __version__,
        "formula": frame.formula.text,
        "method": method,
        "structure": structure,
        "max_iterations": max_iterations,
        "df": tests[0],
        "contrasts": _digest([*tests[1:]]) if tests[1] else None,
        "modes": modes,
        "data": _digest(parts),
        "responses": None if names is None else _digest_names(names),
        "block size": block,
    }


class Parts:
    """The folder of parts of one output file.

    Args:
        output: the file that they will become.
        manifest: `describe_run`.
    """

    def __init__(self, output: Path, manifest: dict[str, Any]):
        self.output, self.manifest = output, manifest
        self.folder = output.with_name(f"{output.name}.parts")
        self.run = _digest([json.dumps(manifest, sort_keys=True)])
        self._pq = import_parquet("output to parquet")

    def check(self) -> None:
        """See that the folder, if there is one, is of this run.

        Raises:
            DataError: a manifest that cannot be read, is of another run, or is not there.
        """
        path = self.folder / "manifest.json"
        if not path.exists():
            if any(self.folder.glob("part-*.parquet")):
                raise self._wrong(path, "is missing, but there are parts")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self._wrong(path, "cannot be read")
        keys = [*self.manifest, *(key for key in found if key not in self.manifest)]
        differ = [key for key in keys if found.get(key) != self.manifest.get(key)]
        if differ:
            raise self._wrong(path, f"is of another run ({', '.join(differ)} differ)")

    def start(self) -> None:
        """Make the folder, with its manifest."""
        self.folder.mkdir(exist_ok=True)
        text = json.dumps(self.manifest, indent=2)
        parquet.write_whole(
            self.folder / "manifest.json", lambda path: path.write_text(text, encoding="utf-8")
        )

    def discard(self) -> None:
        """Remove the folder; files in it that are none of ours stay, and the folder with them."""
        for pattern in ("part-*.parquet*", "manifest.json*", "assembled*"):
            for path in self.folder.glob(pattern):
                path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def status(self, k: int, names: pd.Index, *arrays: np.ndarray) -> np.ndarray | None:
        """Status codes of block `k` if an earlier run fitted it, else None.

        Raises:
            DataError: the part cannot be read, or is of another model or of other responses.
        """
        path = self._path(k)
        if not path.exists():
            return None
        table = self._read(k, ["status"])
        mark = self._mark(k, names, arrays)
        found = table.schema.metadata or {}
        if found.get(MARK) != mark:
            raise self._wrong(path, "is of another model or of other responses")
        return table.column("status").to_numpy()

    def write(self, k: int, results: BatchResults, *arrays: np.ndarray) -> None:
        """Keep the results of block `k`, made of these values, and weights if there are any."""
        table = parquet.to_table(results, adjusted=False)
        metadata = {**(table.schema.metadata or {}), MARK: self._mark(k, results.responses, arrays)}
        table = table.replace_schema_metadata(metadata)
        parquet.write_whole(
            self._path(k),
            lambda path: self._pq.write_table(table, path, write_page_checksum=True),
        )

    def assemble(self, count: int, model: BatchModel) -> None:
        """Make one file of parts 0..count-1, a row group each, and remove the parts.

        p-values adjusted over the responses are added, which only all parts together have: a number
        per response and test in memory.

        Raises:
            DataError: a part that is missing, cannot be read, or is of another run.
        """
        expected = {self._path(k) for k in range(count)}
        for path in self.folder.glob("part-*.parquet"):
            if path not in expected:
                raise self._wrong(path, f"is none of the {count} blocks of these responses")

        groups = batch_tables.p_value_columns(model)

        def write(path: Path) -> None:
            schema = self._read(0).schema
            metadata = {**schema.metadata}
            metadata.pop(MARK)
            adjusted = self._adjusted(count, [name for names, _ in groups for name in names])
            start = 0
            with ExitStack() as files:
                writer = None
                for k in range(count):
                    table = self._read(k)
                    if not table.schema.equals(schema):
                        raise self._wrong(self._path(k), "has other columns than the first part")
                    part = iter(adjusted[start : start + len(table)].T)
                    start += len(table)
                    for names, new in groups:
                        places = [table.schema.get_field_index(name) for name in names]
                        for i, name in enumerate(new):
                            table = table.add_column(places[-1] + 1 + i, name, [next(part)])
                    table = table.replace_schema_metadata(metadata)
                    if writer is None:
                        writer = self._pq.ParquetWriter(path, table.schema)
                        files.enter_context(writer)
                    writer.write_table(table, len(table))

        parquet.write_whole(self.output, write, self.folder / "assembled")
        self.discard()

    def _adjusted(self, count: int, names: list[str]) -> np.ndarray:
        """The p-values in some columns of all parts, adjusted, (B, len(names))."""
        values = []
        for k in range(count):
            table = self._read(k, names or ["status"])
            columns = [table.column(name).to_numpy() for name in names]
            values.append(np.stack(columns, axis=1) if names else np.zeros((len(table), 0)))
        return false_discovery_rates(np.concatenate(values))

    def _path(self, k: int) -> Path:
        return self.folder / f"part-{k:06d}.parquet"

    def _mark(self, k: int, names: pd.Index, arrays: tuple[np.ndarray, ...]) -> bytes:
        """What a part says about itself."""
        checksum = 0
        for own in arrays:
            flat = np.ascontiguousarray(own).reshape(-1).view(np.uint8)
            checksum = zlib.crc32(flat.data, checksum)
        mark = {"run": self.run, "block": k, "names": _digest_names(names), "values": checksum}
        return json.dumps(mark).encode()

    def _read(self, k: int, columns: list[str] | None = None) -> Any:
        """A part as a table, its checksums verified."""
        from pyarrow import ArrowException

        path = self._path(k)
        if not path.exists():
            raise DataError(
                f"{str(path)!r} is missing: a process did not write it. Several processes need a "
                "filesystem that they share"
            )
        try:
            with self._pq.ParquetFile(path, page_checksum_verification=True) as file:
                return file.read(columns=columns)
        except (ArrowException, OSError, KeyError) as error:
            said = " ".join(str(error).split())
            raise self._wrong(path, f"cannot be read ({said})") from None

    def _wrong(self, path: Path, what: str) -> DataError:
        part = path.name.startswith("part-")
        remedy = "that file" if part else f"the folder {str(self.folder)!r}"
        return DataError(
            f"{str(path)!r} {what}, so the run cannot be resumed: delete {remedy}"
            f"{' to fit its block again' if part else ''}, or pass overwrite=True to start anew"
        )


def _digest_names(names: pd.Index) -> str:
    if isinstance(names, pd.RangeIndex):
        return _digest([names.start, names.stop])
    return _digest([json.dumps(names.tolist())])


def _digest(parts: list[Any]) -> str:
    """SHA-256 of arrays and of things with a repr."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(repr((part.dtype.str, part.shape)).encode())
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        else:
            digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()
