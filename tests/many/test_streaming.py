"""Streams to a file: the same numbers, resuming, foreign and corrupt parts, several processes."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import watchdog

import jaxreml
from jaxreml import DataError, fit_many
from jaxreml.results.streamed import Parts

FORMULA = "~ Days + (1 | Subject)"
# The study as code, so that processes of its own can make it too.
STUDY = textwrap.dedent("""
    import jaxreml, numpy as np
    FORMULA = "~ Days + (1 | Subject)"
    data = jaxreml.datasets.load("sleepstudy")
    values = data["Reaction"].to_numpy()[:, None] + 30 * np.random.default_rng(2).normal(
        size=(180, 24)
    )
    values[:, 5] = 1.0
    values[:, 17] = np.nan

    def blocks(stop=None, leave=None):
        for k in range(0, 24, 6):
            if k == stop:
                leave()
            yield [f"gene_{j}" for j in range(k, k + 6)], values[:, k : k + 6]
""")
study: dict = {}
exec(STUDY, study)
data, values, blocks = study["data"], study["values"], study["blocks"]


@pytest.fixture(scope="module")
def expected():
    with jax.enable_x64(True):
        return fit_many(FORMULA, data, values, batch_size=6)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The folder of an interrupted run, with two of four parts, and the file of a whole run."""
    folder = tmp_path_factory.mktemp("parts")
    with jax.enable_x64(True):
        whole = fit_many(FORMULA, data, values, output=folder / "whole.parquet", batch_size=6)
        assert whole.n_failed == 2

        class Interrupted(Exception):
            pass

        keep = Parts.write

        def write(self, k, *arguments):
            if k == 2:
                raise Interrupted
            keep(self, k, *arguments)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(Parts, "write", write)
            fit_many(FORMULA, data, values, output=folder / "out.parquet", batch_size=6)
    return folder


@pytest.fixture
def interrupted(parts, tmp_path):
    """A copy of that folder to spoil; gives the output's path."""
    shutil.copytree(parts / "out.parquet.parts", tmp_path / "out.parquet.parts")
    names = sorted(path.name for path in (tmp_path / "out.parquet.parts").iterdir())
    assert names == ["manifest.json", "part-000000.parquet", "part-000001.parquet"]
    return tmp_path / "out.parquet"


def resume(path, responses=values, formula=FORMULA, **options):
    return fit_many(formula, data, responses, output=path, **{"batch_size": 6, **options})


def assert_equal(found, expected, tolerance=0.0):
    for name in ("beta", "se", "theta", "sigma", "parameters", "parameters_se", "criterion"):
        left, right = getattr(found.fits, name), getattr(expected.fits, name)
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance, err_msg=name)
    for name in ("status", "nobs", "n_missing", "is_singular"):
        left, right = getattr(found.fits, name), getattr(expected.fits, name)
        np.testing.assert_array_equal(left, right, err_msg=name)


def test_file_holds_what_memory_holds(parts, expected):
    path = parts / "whole.parquet"
    found = jaxreml.BatchResults.read_parquet(path)
    assert_equal(found, expected)
    assert found.responses.tolist() == list(range(24))
    assert found.model == expected.model
    assert pq.ParquetFile(path).metadata.num_row_groups == 4
    assert not (parts / "whole.parquet.parts").exists()


def test_sources_stream_alike(parts, tmp_path, expected):
    np.save(tmp_path / "values.npy", values)
    names = [f"gene_{k}" for k in range(24)]
    pq.write_table(pa.table(list(values.T), names=names), tmp_path / "values.parquet")
    outputs = []
    for k, responses in enumerate([tmp_path / "values.npy", tmp_path / "values.parquet", blocks()]):
        streamed = resume(tmp_path / f"{k}.parquet", responses)
        assert (streamed.n_responses, streamed.n_failed) == (24, 2)
        assert_equal(streamed.read(), expected)
        outputs.append(streamed.path.read_bytes())
    assert outputs[0] == (parts / "whole.parquet").read_bytes()
    assert outputs[1] == outputs[2]


def test_resumed_is_undisturbed(parts, interrupted, monkeypatch):
    from jaxreml.many.engine import BatchFitter

    fitted = []
    fit = BatchFitter.fit
    monkeypatch.setattr(
        BatchFitter, "fit", lambda self, values: fitted.append(values) or fit(self, values)
    )
    streamed = resume(interrupted)
    np.testing.assert_array_equal(np.concatenate(fitted, axis=1), values[:, 12:])
    assert streamed.n_failed == 2
    assert "perfect" not in repr(streamed)
    assert interrupted.read_bytes() == (parts / "whole.parquet").read_bytes()
    assert [path.name for path in interrupted.parent.iterdir()] == ["out.parquet"]


def test_modes_are_streamed(tmp_path):
    memory = fit_many(FORMULA, data, values, modes=True)
    out = tmp_path / "modes.parquet"
    fit_many(FORMULA, data, blocks(), modes=True, output=out, batch_size=6)
    read = jaxreml.BatchResults.read_parquet(out)
    found, expected = (own.random_effects["Subject"].to_numpy() for own in (read, memory))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    plain = tmp_path / "plain.parquet"
    fit_many(FORMULA, data, blocks(), output=plain, batch_size=6)
    assert jaxreml.BatchResults.read_parquet(plain).fits.modes is None


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_and_resumed_is_undisturbed(tmp_path):
    """A stream that kills its process after two blocks; the next process finishes the file."""
    code = STUDY + textwrap.dedent("""
        import os, signal, sys
        kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
        stop = 12 if sys.argv[2] == "killed" else None
        jaxreml.fit_many(FORMULA, data, blocks(stop, kill), output=sys.argv[1], batch_size=6)
    """)
    path = tmp_path / "out.parquet"
    killed = watchdog.run(code, path, "killed")
    assert killed.returncode == -9
    names = {part.name for part in (tmp_path / "out.parquet.parts").glob("part-*.parquet")}
    # The second may have been on its way to the disk.
    assert {"part-000000.parquet"} <= names <= {"part-000000.parquet", "part-000001.parquet"}
    # What a process killed while it writes leaves behind is no part.
    (tmp_path / "out.parquet.parts" / "part-000002.parquet.tmp-1").write_bytes(b"PAR1")
    resume(path, blocks())
    resume(tmp_path / "undisturbed.parquet", blocks())
    assert path.read_bytes() == (tmp_path / "undisturbed.parquet").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.parquet", "undisturbed.parquet"]


@pytest.mark.parametrize(
    ("options", "differ"),
    [
        ({"formula": "~ 1 + (1 | Subject)"}, "formula, data"),
        ({"method": "ML"}, "method"),
        ({"batch_size": 5}, "block size"),
        ({"max_iterations": 50}, "max_iterations"),
        ({"weights": np.linspace(1, 2, 180)}, "data"),
        ({"responses": values[:, :20]}, "responses"),
        ({"responses": blocks()}, "responses"),
    ],
)
def test_foreign_manifest(interrupted, options, differ):
    with pytest.raises(DataError, match=rf"manifest.json' is of another run \({differ} differ\)"):
        resume(interrupted, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "cannot be read.*delete the folder"),
        (b"\xff\x00", "cannot be read"),
        (b"[]", "cannot be read"),
        (b"{}", r"is of another run \(jaxreml, formula"),
        (None, "is missing, but there are parts"),
    ],
)
def test_corrupt_manifest(interrupted, text, message):
    manifest = interrupted.with_name("out.parquet.parts") / "manifest.json"
    if text is None:
        manifest.unlink()
    else:
        manifest.write_bytes(text)
    with pytest.raises(DataError, match=f"manifest.json' {message}"):
        resume(interrupted)


def test_manifest_says_what_the_run_is(interrupted):
    manifest = json.loads(
        (interrupted.with_name("out.parquet.parts") / "manifest.json").read_text()
    )
    assert manifest["formula"] == FORMULA
    assert manifest["jaxreml"] == jaxreml.__version__


def test_other_responses_of_the_same_shape(interrupted):
    changed = values.copy()
    changed[3, 8] += 1e-9
    with pytest.raises(DataError, match=r"part-000001.parquet' is of another model or of other"):
        resume(interrupted, changed)


def test_other_names_in_a_stream(tmp_path):
    def leave():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path / "out.parquet", blocks(12, leave))
    renamed = (([f"x{name}" for name in names], y) for names, y in blocks())
    with pytest.raises(DataError, match=r"part-000000.parquet' is of another model"):
        resume(tmp_path / "out.parquet", renamed)
    first = (pair for pair, _ in zip(blocks(), range(1), strict=False))
    with pytest.raises(DataError, match=r"part-000001.parquet' is none of the 1 blocks"):
        resume(tmp_path / "out.parquet", first)


@pytest.mark.parametrize("spoil", ["truncated", "empty", "text", "swapped", "flipped"])
def test_corrupt_part(interrupted, spoil):
    """Each is found; without the file, the run goes on."""
    part = interrupted.with_name("out.parquet.parts") / "part-000001.parquet"
    content = part.read_bytes()
    flipped = bytearray(content)
    for k in range(400, 2000, 16):  # in the data, not in the footer
        flipped[k] ^= 1
    spoilt = {
        "truncated": content[:-100],
        "empty": b"",
        "text": b"response,beta\n",
        "swapped": part.with_name("part-000000.parquet").read_bytes(),
        "flipped": bytes(flipped),
    }
    part.write_bytes(spoilt[spoil])
    what = "is of another model" if spoil == "swapped" else "cannot be read"
    with pytest.raises(DataError, match=f"part-000001.parquet' {what}.*delete that file"):
        resume(interrupted)
    assert not interrupted.exists()
    part.unlink()
    assert resume(interrupted).n_responses == 24


def test_overwrite(parts, interrupted):
    (interrupted.with_name("out.parquet.parts") / "manifest.json").write_text("{")
    interrupted.write_text("old")
    with pytest.raises(DataError, match=r"out.parquet' exists; pass overwrite=True"):
        resume(interrupted)
    resume(interrupted, overwrite=True)
    assert interrupted.read_bytes() == (parts / "whole.parquet").read_bytes()
    assert not interrupted.with_name("out.parquet.parts").exists()


def test_overwrite_leaves_files_that_are_not_ours(interrupted):
    note = interrupted.with_name("out.parquet.parts") / "note.txt"
    note.write_text("keep me")
    resume(interrupted, overwrite=True)
    assert note.read_text() == "keep me"


def test_bad_outputs(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .parquet"):
        resume(tmp_path / "out.csv")
    with pytest.raises(DataError, match="there is no folder"):
        resume(tmp_path / "nowhere" / "out.parquet")


def test_memory_map_is_not_kept_in_memory(tmp_path):
    """A map of 400 MB, read by blocks, adds less than half of that to the process."""
    code = textwrap.dedent("""
        import resource, sys
        import numpy as np
        from jaxreml.data.responses import Responses
        values = np.lib.format.open_memmap(sys.argv[1], "w+", float, (500, 100_000))
        del values
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        source = Responses(sys.argv[1], {}, np.ones(500, bool))
        before = peak()
        for block in source.blocks(10_000):
            assert not block.read().any()
        print((peak() - before) // 1024)
    """)
    process = watchdog.run(code, tmp_path / "values.npy", check=True, stdout=subprocess.PIPE)
    grown = int(process.stdout)
    assert grown < 200  # MB; a block is 40 MB


PROCESS = STUDY + textwrap.dedent("""
    import pickle, sys
    import jax
    index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    # Three blocks, so that the shares are unequal; then one, so that a process has none.
    memory = jaxreml.fit_many(FORMULA, data, values[:, :18], batch_size=6, modes=True)
    few = jaxreml.fit_many(FORMULA, data, blocks(), batch_size=100)
    file = jaxreml.fit_many(FORMULA, data, blocks(), output=f"{folder}/out.parquet", batch_size=6)
    again = jaxreml.fit_many(
        FORMULA, data, values, output=f"{folder}/new.parquet", batch_size=6, overwrite=True
    )
    try:
        jaxreml.fit_many(FORMULA, data, values, output=f"{folder}/bad.parquet", batch_size=6)
    except jaxreml.JaxremlError as error:
        message = str(error)
    with open(f"{folder}/{index}.pickle", "wb") as target:
        names = few.responses.tolist()
        pickle.dump((memory.fits, few.fits, names, file.n_failed, message), target)
    assert jax.config.jax_enable_x64 is False
""")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_processes(folder):
    """Run PROCESS twice; if one fails, the other does not wait for it."""
    port = free_port()
    logs = [folder / f"{index}.log" for index in range(2)]
    processes = []
    for index, log in enumerate(logs):
        command = watchdog.command(PROCESS, index, port, folder)
        with log.open("w") as stderr:
            processes.append(subprocess.Popen(command, stderr=stderr))
    end = time.monotonic() + 200
    try:
        while any(process.poll() is None for process in processes):
            assert time.monotonic() < end, [log.read_text() for log in logs]
            assert not any(process.poll() for process in processes), [x.read_text() for x in logs]
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], [x.read_text() for x in logs]


def test_two_processes(parts, interrupted, tmp_path, expected):
    """Both get everything, files are those of one process, and one goes on from another's parts."""
    left = tmp_path / "out.parquet.parts"
    (tmp_path / "new.parquet").write_text("old")
    shutil.copytree(left, tmp_path / "new.parquet.parts")
    left.rename(tmp_path / "bad.parquet.parts")
    (tmp_path / "bad.parquet.parts" / "part-000001.parquet").write_text("of process 1")

    def leave():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # one process leaves two parts of four
        resume(tmp_path / "out.parquet", blocks(12, leave))
    run_processes(tmp_path)
    for index, trouble in enumerate(["process 1 failed", "part-000001.parquet' cannot be read"]):
        saved = pickle.loads((tmp_path / f"{index}.pickle").read_bytes())
        memory, few, names, failed, message = saved
        first = SimpleNamespace(fits=jax.tree.map(lambda array: array[:18], expected.fits))
        assert_equal(SimpleNamespace(fits=memory), first, 1e-10)
        assert_equal(SimpleNamespace(fits=few), expected, 1e-10)
        assert names == [f"gene_{k}" for k in range(24)]
        assert failed == 2
        assert memory.modes[0].shape == (18, 18, 1)
        assert (np.isfinite(memory.modes[0]).all(axis=(1, 2)) == (memory.status == 0)).all()
        assert trouble in message
    assert (tmp_path / "new.parquet").read_bytes() == (parts / "whole.parquet").read_bytes()
    resume(tmp_path / "one.parquet", blocks())
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()
    assert [path.name for path in tmp_path.glob("*.parts")] == ["bad.parquet.parts"]
