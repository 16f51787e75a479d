"""Responses in sparse matrices, HDF5, Zarr, AnnData and folders of files."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import jaxreml
from jaxreml import DataError, fit_many
from jaxreml.data.responses import Responses

FORMULA = "~ x + (1 | g)"
N, B = 40, 11


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    columns = {"x": rng.normal(size=N), "g": np.repeat(list("abcdefgh"), 5)}
    return pd.DataFrame(columns, [f"s{k}" for k in range(N)])


@pytest.fixture(scope="module")
def table():
    """Half of it zeros."""
    rng = np.random.default_rng(1)
    values = rng.poisson(1, (N, B)) * rng.normal(size=(N, B))
    return pd.DataFrame(values, [f"s{k}" for k in range(N)], [f"v{k}" for k in range(B)])


def read(responses, data, size=4, **options):
    """Values and names of all blocks."""
    blocks = list(Responses(responses, data, np.ones(N, bool), **options).blocks(size))
    values = [block.read() for block in blocks]
    assert all(own.dtype == float and own.flags.c_contiguous for own in values)
    names = [name for block in blocks for name in block.names]
    return np.concatenate(values, axis=1), names


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "lil", "bsr", "csr_matrix", "float32"])
def test_sparse_matrices(data, table, kind):
    single = kind == "float32"
    make = getattr(sp, "csr_array" if single else kind if "_" in kind else f"{kind}_array")
    matrix = make(table.to_numpy(np.float32 if single else float))
    values, names = read(matrix, data)
    np.testing.assert_array_equal(values, matrix.toarray())
    assert names == list(range(B))
    stream = ((table.columns[k : k + 5], matrix.tocsr()[:, k : k + 5]) for k in (0, 5, 10))
    values, names = read(stream, data)
    np.testing.assert_array_equal(values, matrix.toarray())
    assert names == list(table.columns)


def test_sparse_matrices_that_do_not_fit(data, table):
    with pytest.raises(DataError, match="data have 40 rows and the responses 39"):
        fit_many(FORMULA, data, sp.csr_array(table.to_numpy()[1:]))
    with pytest.raises(DataError, match="row per response; transpose"):
        fit_many(FORMULA, data, sp.csr_array(table.to_numpy().T))
    with pytest.raises(DataError, match="complex128, which is not numeric"):
        fit_many(FORMULA, data, sp.csr_array(table.to_numpy() * 1j))
    with pytest.raises(DataError, match=r"must be an \(n, B\) array"):
        fit_many(FORMULA, data, sp.coo_array(table["v0"].to_numpy()))
    with pytest.raises(ValueError, match="layer='raw' needs an AnnData object"):
        fit_many(FORMULA, data, table, layer="raw")


@pytest.mark.parametrize("package", ["h5py", "zarr"])
def test_arrays_in_files(data, table, tmp_path, package):
    module = pytest.importorskip(package)
    if package == "h5py":
        file = module.File(tmp_path / "values.h5", "w")
        array = file.create_dataset("values", data=table.to_numpy(), chunks=(16, 3))
    else:
        array = module.create_array(
            tmp_path / "values.zarr", shape=(N, B), chunks=(16, 3), dtype=float
        )
        array[:] = table.to_numpy()
    values, names = read(array, data)
    np.testing.assert_array_equal(values, table)
    assert names == list(range(B))
    results = fit_many(FORMULA, data, array, batch_size=4)
    np.testing.assert_array_equal(results.params, fit_many(FORMULA, data, table).params)


def test_feather_files_and_folders(data, table, tmp_path):
    pytest.importorskip("pyarrow")
    indexed = table.rename_axis("sample")
    indexed.reset_index().to_feather(tmp_path / "values.feather")
    for folder, write in (("parquet", "to_parquet"), ("feather", "to_feather")):
        (tmp_path / folder / "more").mkdir(parents=True)
        for k, name in enumerate(["a", "b", "more/c"]):
            part = indexed.iloc[15 * k : 15 * k + 15]
            part = part if folder == "parquet" else part.reset_index(drop=True)
            getattr(part, write)(tmp_path / folder / f"{name}.{folder}")
    (tmp_path / "parquet" / "_SUCCESS").touch()
    for responses, options in (
        ("values.feather", {"id": "sample"}),
        ("parquet", {}),
        ("parquet", {"id": "sample"}),
        ("feather", {}),
    ):
        values, names = read(tmp_path / responses, data.rename_axis("sample"), **options)
        np.testing.assert_array_equal(values, table)
        assert names == list(table.columns)
    with pytest.raises(DataError, match="same row labels in different orders"):
        read(tmp_path / "parquet", data.iloc[::-1])
    import pyarrow.dataset as ds

    np.testing.assert_array_equal(
        read(ds.dataset(tmp_path / "feather", format="feather"), data)[0], table
    )


def test_folders_that_are_no_data_set(data, table, tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=r"has no .parquet or .feather files"):
        read(tmp_path, data)
    table.iloc[:, :6].to_parquet(tmp_path / "a.parquet")
    table.iloc[:, 5:].to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet' has other columns than the first.*iterator"):
        read(tmp_path, data)
    (tmp_path / "b.parquet").rename(tmp_path / "b.feather")
    with pytest.raises(DataError, match="has files of several kinds"):
        read(tmp_path, data)
    with pytest.raises(DataError, match=r"b.feather' cannot be read"):
        read(tmp_path / "b.feather", data)
    (tmp_path / "a.parquet").rename(tmp_path / "a.b")
    table.assign(s="a").to_feather(tmp_path / "b.feather")
    with pytest.raises(DataError, match="not numeric: 's'"):
        read(tmp_path, data)


@pytest.fixture
def adata(data, table):
    anndata = pytest.importorskip("anndata")
    layers = {"scaled": table.to_numpy() * 2, "sparse": sp.csr_matrix(table)}
    return anndata.AnnData(
        sp.csr_matrix(table), data, pd.DataFrame(index=table.columns), layers=layers
    )


def test_anndata(adata, table):
    for options, factor in (({}, 1), ({"layer": "scaled"}, 2), ({"layer": "sparse"}, 1)):
        values, names = read(adata, adata.obs, **options)
        np.testing.assert_array_equal(values, table * factor)
        assert names == list(table.columns)
    part = adata[:, ["v3", "v1"]]  # a view
    values, names = read(part, part.obs)
    np.testing.assert_array_equal(values, table[["v3", "v1"]])
    shuffled = adata[::-1]
    values, _ = read(shuffled, adata.obs.rename_axis("sample"), id="sample")
    np.testing.assert_array_equal(values, table)


@pytest.mark.parametrize("kind", ["dense", "csr_matrix", "csc_matrix"])
def test_backed_anndata(adata, table, tmp_path, kind):
    import anndata

    adata.X = table.to_numpy() if kind == "dense" else getattr(sp, kind)(table)
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    np.testing.assert_array_equal(read(backed, backed.obs)[0], table)
    np.testing.assert_array_equal(read(backed, backed.obs, layer="scaled")[0], 2 * table)


def test_anndata_that_does_not_fit(adata, table, data):
    with pytest.raises(DataError, match=r"no layer 'scale'; did you mean 'scaled'.*The layers are"):
        fit_many(FORMULA, adata.obs, adata, layer="scale")
    with pytest.raises(DataError, match="column 'age' of the formula is not in the data"):
        fit_many("~ age + (1 | g)", adata.obs, adata)
    with pytest.raises(DataError, match="same row labels in different orders"):
        fit_many(FORMULA, data.iloc[::-1], adata)
    with pytest.raises(DataError, match="row labels differ: 1 only in the data"):
        fit_many(FORMULA, data.rename(index={"s3": "t3"}), adata)
    with pytest.raises(
        DataError, match=r"data have 40 rows and the responses 39.*1 only in the data"
    ):
        fit_many(FORMULA, data, adata[1:])
    with pytest.raises(DataError, match="data is an AnnData object; pass its obs"):
        fit_many(FORMULA, adata, adata)
    with pytest.raises(DataError, match="block 0 of the responses is an AnnData object"):
        fit_many(FORMULA, data, iter([adata]))
    adata.var_names = ["v0", "v0", *table.columns[2:]]
    with pytest.raises(DataError, match="var_names_make_unique"):
        fit_many(FORMULA, data, adata)
    adata.X = None
    with pytest.raises(DataError, match=r"has no X: name a layer. The layers are: scaled, sparse"):
        fit_many(FORMULA, data, adata)


def test_results_into_anndata(adata, tmp_path):
    import anndata

    results = fit_many(FORMULA, adata.obs, adata)
    results.to_anndata(adata)
    np.testing.assert_array_equal(adata.varm["jaxreml"]["beta[x]"], results.params["x"])
    part = fit_many(FORMULA, adata.obs, adata[:, ["v7", "v2"]])
    part.to_anndata(adata, "part")
    assert adata.varm["part"].loc["v7", "beta[x]"] == pytest.approx(results.params.loc["v7", "x"])
    assert adata.varm["part"]["beta[x]"].notna().sum() == 2
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = anndata.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(again.varm["jaxreml"]["p[x]"], results.pvalues["x"])
    assert again.varm["part"]["converged"].sum() == 2
    assert again.uns["jaxreml"]["formula"] == FORMULA
    with pytest.raises(DataError, match=r"9 responses are no variables .* such as 'v0'"):
        results.to_anndata(adata[:, ["v7", "v2"]].copy())


class StandIn:
    """What is used of AnnData, whose releases do not install beside every pandas."""

    __module__ = "anndata"

    def __init__(self, table, obs):
        self.X, self.layers = sp.csr_matrix(table), {"doubled": 2 * table.to_numpy()}
        self.obs, self.obs_names, self.var_names = obs, obs.index, table.columns
        self.n_vars, self.varm, self.uns = table.shape[1], {}, {}


def test_without_anndata(data, table):
    adata = StandIn(table, data)
    np.testing.assert_array_equal(read(adata, adata.obs)[0], table)
    np.testing.assert_array_equal(read(adata, adata.obs, layer="doubled")[0], 2 * table)
    with pytest.raises(DataError, match="has no layer 'X'"):
        fit_many(FORMULA, adata.obs, adata, layer="X")
    with pytest.raises(DataError, match="same row labels in different orders"):
        fit_many(FORMULA, data.iloc[::-1], adata)
    results = fit_many(FORMULA, adata.obs, StandIn(table[["v7", "v2"]], data))
    results.to_anndata(adata)
    found = adata.varm["jaxreml"]
    assert list(found.index) == list(table.columns) and found["converged"].sum() == 2
    assert found.loc["v2", "beta[x]"] == results.params.loc["v2", "x"]


def test_voom_of_anndata(adata, table, data):
    pytest.importorskip("statsmodels")
    adata.layers["counts"] = sp.csr_matrix(
        np.abs(table.to_numpy() * 9).round() + np.arange(1, B + 1)
    )
    found = jaxreml.voom(adata, FORMULA, adata.obs, layer="counts")
    expected = jaxreml.voom(adata.layers["counts"].toarray(), FORMULA, data)
    np.testing.assert_array_equal(found.weights, expected.weights)
    assert list(found.values.columns) == list(table.columns)
