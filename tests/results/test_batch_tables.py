"""Frames, xarray and parquet of many fits: every number where its label says."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jaxreml
from jaxreml import BatchResults, DataError, Status
from jaxreml.many.fitted import BatchModel
from jaxreml.many.numbers import Fits
from jaxreml.model.covariance import natural
from jaxreml.results.parquet import from_table, to_table

# Names of columns and responses that need care wherever they become part of a label.
FORMULA = "~ `time, days` + (`time, days` | `donor id`)"
FIXED = ["(Intercept)", "time, days"]
COMPONENTS = ["donor id, (Intercept)", "donor id, time, days", "Residual"]
PAIR = "donor id, (Intercept), time, days"
NAMES = ["plain", 'weird "β", with [brackets]\n', "flat", ""]
FLAT, SINGULAR = 2, 3


@pytest.fixture(scope="module")
def data():
    names = {"Days": "time, days", "Subject": "donor id"}
    return jaxreml.datasets.load("sleepstudy").rename(columns=names)


@pytest.fixture(scope="module")
def responses(data):
    rng = np.random.default_rng(4)
    values = data["Reaction"].to_numpy()[:, None] + rng.normal(scale=10, size=(180, 4))
    values[:, FLAT] = 2.5
    values[:, SINGULAR] = rng.normal(size=180)  # nothing varies between subjects
    return pd.DataFrame(values, columns=NAMES)


@pytest.fixture(scope="module")
def results(data, responses):
    results = jaxreml.fit_many(FORMULA, data, responses, modes=True)
    assert list(results.is_singular) == [False, False, False, True]
    assert list(results.status) == [0, 0, Status.CONSTANT, 0]
    return results


@pytest.fixture(scope="module")
def singles(data, responses):
    values = responses.to_numpy()
    return {i: jaxreml.fit(f"y {FORMULA}", data.assign(y=values[:, i])) for i in (0, 1, SINGULAR)}


@pytest.fixture(scope="module")
def many_terms():
    """Six responses of a model with five effects in two terms of one factor; random numbers."""
    rng = np.random.default_rng(7)
    data = pd.DataFrame(rng.normal(size=(60, 4)), columns=list("abcd"))
    data = data.assign(g=np.arange(60) % 12, y=rng.normal(size=60))
    formula = "~ 1 + (1 + a + b + c | g) + (0 + d | g)"
    groups = (("g", ("(Intercept)", "a", "b", "c")), ("g", ("d",)))
    levels = (tuple(range(12)),) * 2
    model = BatchModel(formula, "ML", "grouped", ("(Intercept)",), ("twice",), groups, levels, 3)
    assert model.parameter_names == jaxreml.design(f"y {formula}", data).parameter_names
    theta = rng.normal(size=(6, natural.count_theta(model.sizes)))
    theta[5, 0] = 0.0  # no variance, no correlations with it
    counts = np.arange(6)
    fits = Fits(
        beta=rng.normal(size=(6, 1)),
        se=rng.uniform(size=(6, 1)),
        df=rng.uniform(5, 50, size=(6, 1)),
        sigma=rng.uniform(size=6),
        residual_df=rng.uniform(40, 59, size=6),
        theta=theta,
        parameters=rng.normal(size=(6, theta.shape[1] + 1)),
        parameters_se=rng.uniform(size=(6, theta.shape[1] + 1)),
        criterion=rng.normal(size=6),
        gradient_norm=rng.uniform(size=6),
        n_iter=counts + 5,
        nobs=60 - counts,
        n_missing=counts,
        rank=np.ones(6, int),
        mean=rng.normal(size=6),
        contributions=rng.uniform(size=(6, 2)),
        contributions_cov=rng.uniform(size=(6, 4)),
        is_singular=counts == 5,
        status=np.zeros(6, int),
        contrast=rng.normal(size=(6, 0)),
        contrast_se=rng.normal(size=(6, 0)),
        contrast_df=rng.normal(size=(6, 0)),
        modes=tuple(rng.normal(size=(6, 12, q)) for q in model.sizes),
    )
    return BatchResults(model, pd.RangeIndex(6), fits)


# Frames


def test_tidy_is_that_of_single_fits(data, responses, results, singles):
    together = results.tidy(conf_int=True, conf_level=0.8)
    assert together["response"].drop_duplicates().tolist() == NAMES
    assert len(together) == 4 * (2 + 4)  # two coefficients, two SDs, a correlation, the residual
    for i, fit in singles.items():
        own = together[together["response"] == NAMES[i]]
        own = own.drop(columns=["response", "p_adjusted"])
        single = fit.tidy(("fixed", "ran_pars"), conf_int=True, conf_level=0.8)
        assert set(own) == set(single)
        own, single = (table.fillna({"group": ""}) for table in (own, single[list(own)]))
        pd.testing.assert_frame_equal(
            own.reset_index(drop=True), single, check_dtype=False, rtol=1e-6, atol=1e-9
        )
    own = together[(together["response"] == "") & (together["effect"] == "ran_pars")]
    assert own["std_error"].isna().any() and own["estimate"].notna().any()  # of the boundary
    failed = together[together["response"] == "flat"]
    assert failed.iloc[:, 4:].isna().all(axis=None)
    assert failed.drop(columns="group").iloc[:, :3].notna().all(axis=None)
    with pytest.raises(DataError, match="constant"):
        jaxreml.fit(f"flat {FORMULA}", data.assign(flat=responses["flat"]))


def test_tidy_of_some_effects(results):
    whole = results.tidy(("ran_pars", "fixed"))
    for effect, names in (("fixed", 10), ("ran_pars", 6)):
        part = results.tidy(effect)
        assert part.shape[1] == names  # tests are for coefficients only
        expected = whole[whole["effect"] == effect][list(part)].reset_index(drop=True)
        columns = part.columns.drop("group")
        pd.testing.assert_frame_equal(part[columns], expected[columns])
        assert part["group"].fillna("").tolist() == expected["group"].fillna("").tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"effects": "ran_vals"}, "not 'ran_vals'"),
        ({"effects": ()}, "not nothing"),
        ({"conf_level": 1.0}, "between 0 and 1"),
        ({"conf_level": np.nan}, "between 0 and 1"),
    ],
)
def test_tidy_refuses(results, options, message):
    with pytest.raises(ValueError, match=message):
        results.tidy(**options)


def test_glance_is_that_of_single_fits(results, singles, many_terms):
    glance = results.glance()
    assert glance["response"].tolist() == NAMES
    for i, fit in singles.items():
        single = fit.glance()
        assert set(glance) - set(single) == {"response", "n_missing", "status", "message"}
        pd.testing.assert_frame_equal(
            glance.loc[[i], single.columns].reset_index(drop=True), single, rtol=1e-9
        )
    assert glance["message"][FLAT] == Status.CONSTANT.sentence
    assert glance.loc[FLAT, ["sigma", "log_lik", "aic", "bic", "reml_crit"]].isna().all()
    by_ml = many_terms.glance()
    assert by_ml["deviance"].equals(-2 * by_ml["log_lik"]) and "reml_crit" not in by_ml
    assert by_ml["n_missing"].tolist() == [0, 1, 2, 3, 4, 5]
    assert by_ml["n_dropped"].tolist() == [3, 4, 5, 6, 7, 8]  # 3 rows for all responses
    assert by_ml["df_residual"][0] == 60 - 1 - 11 - 1


def test_text_says_what_was_fitted_and_how_it_went(results):
    expected = "REML, 4 responses, 1 without an optimum, 1 singular>"
    assert str(results) == f"<BatchResults {FORMULA!r}, {expected}"


def test_frame_and_xarray_hold_every_number_of_single_fits(results, singles):
    frame, cube = results.to_frame(), results.to_xarray()
    assert frame["response"].tolist() == list(cube["response"].values) == NAMES
    assert {name: cube[name].values.tolist() for name in ("term", "component", "pair")} == {
        "term": FIXED,
        "component": COMPONENTS,
        "pair": [PAIR],
    }
    assert cube["component_group"].values.tolist() == ["donor id", "donor id", "Residual"]
    assert cube["component_term"].values.tolist() == [*FIXED, "Residual"]
    for i, fit in singles.items():
        components = fit.variance_components
        # Per variable: its coordinate, the labels, what the single fit has.
        expected = {
            "beta": ("term", FIXED, fit.params),
            "se": ("term", FIXED, fit.bse),
            "t": ("term", FIXED, fit.tvalues),
            "df": ("term", FIXED, fit.df_satterthwaite),
            "p": ("term", FIXED, fit.pvalues),
            "variance": ("component", COMPONENTS, components["variance"]),
            "log_variance": ("component", COMPONENTS, components["log_variance"]),
            "log_variance_se": ("component", COMPONENTS, components["log_variance_se"]),
            "correlation": ("pair", [PAIR], fit.correlations["correlation"]),
            "z": ("pair", [PAIR], fit.parameters[[2]]),
            "z_se": ("pair", [PAIR], np.sqrt(fit.parameters_vcov_array[[2], [2]])),
            "theta": ("factor", [COMPONENTS[0], PAIR, COMPONENTS[1]], fit.theta),
        }
        for name, (dimension, labels, values) in expected.items():
            wide = [frame[f"{name}[{label}]"][i] for label in labels]
            np.testing.assert_allclose(wide, values, rtol=2e-6, atol=1e-8, err_msg=name)
            long = cube[name].sel({dimension: labels})[i]
            np.testing.assert_array_equal(long, wide, err_msg=name)
        for name in ("sigma", "criterion", "nobs", "is_singular", "converged", "status"):
            assert frame[name][i] == pytest.approx(getattr(fit, name), rel=1e-9)
            assert cube[name][i] == frame[name][i]
    dimensions = {"response": 4, "term": 2, "component": 3, "pair": 1, "factor": 3, "part": 3}
    assert cube.sizes == dimensions | {"level_donor id": 18, "effect_donor id": 2}
    assert cube.attrs["formula"] == FORMULA and cube.attrs["method"] == "REML"


def test_modes_are_those_of_single_fits(results, singles):
    cube = results.to_xarray()["modes_donor id"]
    assert cube.dims == ("response", "level_donor id", "effect_donor id")
    for i, fit in singles.items():
        expected = fit.random_effects["donor id"]
        tolerance = 1e-6 * np.abs(expected.to_numpy()).max()
        modes = results.random_effects["donor id"].loc[NAMES[i]]
        pd.testing.assert_frame_equal(modes, expected, rtol=1e-6, atol=tolerance)
        np.testing.assert_array_equal(cube[i].to_pandas(), modes)
        assert cube["level_donor id"].values.tolist() == list(modes.index)
    assert results.random_effects["donor id"].loc[NAMES[FLAT]].isna().all(axis=None)


def test_labels_of_many_terms(many_terms):
    """In a model with several orders of its parameters, one label is one number everywhere."""
    model, fits = many_terms.model, many_terms.fits
    frame, cube, tidy = many_terms.to_frame(), many_terms.to_xarray(), many_terms.tidy("ran_pars")
    for k, name in enumerate(model.parameter_names):
        np.testing.assert_array_equal(frame[name], fits.parameters[:, k])
        error = name.replace("z[", "z_se[").replace("log_variance[", "log_variance_se[")
        np.testing.assert_array_equal(frame[error], fits.parameters_se[:, k])
    np.testing.assert_array_equal(frame["n_missing"], fits.n_missing)
    np.testing.assert_array_equal(cube["n_missing"], fits.n_missing)
    for name in (
        "variance",
        "log_variance",
        "log_variance_se",
        "correlation",
        "z",
        "z_se",
        "theta",
    ):
        (dimension,) = set(cube[name].dims) - {"response"}
        labels = cube[dimension].values
        assert len(labels) == {"component": 6, "pair": 6, "factor": 11}[dimension]
        for label in labels:
            np.testing.assert_array_equal(
                cube[name].sel({dimension: label}), frame[f"{name}[{label}]"]
            )
    # Covariances from the labels of theta alone.
    _, effects = model.groups[0]
    factor = np.zeros((6, 4, 4))
    for j, first in enumerate(effects):
        factor[:, j, j] = frame[f"theta[g, {first}]"]
        for i in range(j + 1, 4):
            factor[:, i, j] = frame[f"theta[g, {first}, {effects[i]}]"]
    matrix = frame["sigma"].to_numpy()[:, None, None] ** 2 * factor @ factor.transpose(0, 2, 1)
    estimates = tidy.pivot(index="response", columns="term", values="estimate")
    order = [f"sd__{x}" for x in effects]
    order += [f"cor__{x}.{y}" for x, y in combinations(effects, 2)]
    order += ["sd__d", "sd__Observation"]
    assert tidy["term"].tolist() == order * 6
    for j, first in enumerate(effects):
        np.testing.assert_allclose(frame[f"variance[g, {first}]"], matrix[:, j, j])
        np.testing.assert_allclose(estimates[f"sd__{first}"] ** 2, matrix[:, j, j])
        for i in range(j + 1, 4):
            with np.errstate(invalid="ignore"):
                expected = matrix[:, i, j] / np.sqrt(matrix[:, i, i] * matrix[:, j, j])
            name = f"{first}, {effects[i]}"
            np.testing.assert_allclose(frame[f"correlation[g, {name}]"], expected)
            np.testing.assert_array_equal(
                estimates[f"cor__{first}.{effects[i]}"], frame[f"correlation[g, {name}]"]
            )
    assert np.isnan(frame.loc[5, "correlation[g, (Intercept), c]"])
    joined = np.concatenate(fits.modes, axis=2)
    np.testing.assert_array_equal(cube["modes_g"], joined)
    assert cube["effect_g"].values.tolist() == [*effects, "d"]
    pd.testing.assert_frame_equal(
        many_terms.random_effects["g"].loc[many_terms.responses[2]],
        pd.DataFrame(joined[2], pd.RangeIndex(12, name="g"), [*effects, "d"]),
        check_index_type=False,
    )


def test_one_effect_and_no_modes(many_terms):
    fits = many_terms.fits
    fits = fits._replace(
        theta=fits.theta[:, :1],
        parameters=fits.parameters[:, :2],
        parameters_se=fits.parameters_se[:, :2],
        modes=None,
    )
    changes = {"groups": (("g", ("(Intercept)",)),), "levels": many_terms.model.levels[:1]}
    model = BatchModel(**(vars(many_terms.model) | changes))
    results = BatchResults(model, many_terms.responses, fits)
    assert results.tidy("ran_pars")["term"].tolist() == ["sd__(Intercept)", "sd__Observation"] * 6
    cube = results.to_xarray()
    assert cube.sizes["pair"] == 0 and cube["pair"].dtype.kind == "U"  # text, as in other models
    assert not [name for name in cube if name.startswith("modes")]
    assert from_table(to_table(results)).fits.modes is None
    with pytest.raises(DataError, match=r"fit_many\(\.\.\., modes=True\)"):
        results.random_effects  # noqa: B018


def test_labels_that_coincide_are_refused(many_terms):
    groups = (("g", ("(Intercept)", "a", "b", "a, b")), ("g", ("d",)))
    model = BatchModel(**(vars(many_terms.model) | {"groups": groups}))
    with pytest.raises(DataError, match=r"two columns would be 'theta\[g, a, b\]': rename"):
        BatchResults(model, many_terms.responses, many_terms.fits).to_frame()


# Files


@pytest.mark.parametrize("fixture", ["results", "many_terms"])
def test_parquet_gives_back_the_same(request, fixture, tmp_path):
    results, path = request.getfixturevalue(fixture), tmp_path / "fits.parquet"
    results.to_parquet(path)
    again = BatchResults.read_parquet(path)
    assert again.model == results.model
    pd.testing.assert_index_equal(again.responses, results.responses, exact="equiv")
    for name in results.fits._fields[:-1]:
        found, expected = getattr(again.fits, name), getattr(results.fits, name)
        np.testing.assert_array_equal(found, expected, strict=True, err_msg=name)
    for found, expected in zip(again.fits.modes, results.fits.modes, strict=True):
        np.testing.assert_array_equal(found, expected, strict=True)
    pd.testing.assert_frame_equal(again.tidy(), results.tidy())
    with pytest.raises(DataError, match="not at hand"):
        again.estimate(0)


def test_parquet_holds_the_frame_for_other_readers(results, tmp_path):
    results.to_parquet(tmp_path / "fits.parquet")
    found = pd.read_parquet(tmp_path / "fits.parquet")
    frame = results.to_frame()
    pd.testing.assert_frame_equal(found[frame.columns], frame, check_categorical=False)
    modes = found["modes[donor id, time, days]"]
    np.testing.assert_array_equal(
        modes[0], results.random_effects["donor id"].loc[NAMES[0], "time, days"]
    )


def test_tables_may_be_cut_and_joined(many_terms):
    table = to_table(many_terms)
    order = [4, 5, 0, 1, 2]
    again = from_table(pa.concat_tables([table.slice(4), table.slice(0, 3)]), BatchResults)
    assert again.responses.tolist() == order
    np.testing.assert_array_equal(again.fits.theta, many_terms.fits.theta[order])
    np.testing.assert_array_equal(again.fits.modes[1], many_terms.fits.modes[1][order])
    none = from_table(table.slice(0, 0), BatchResults)
    assert (len(none), len(none.tidy()), none.fits.modes[0].shape) == (0, 0, (0, 12, 4))
    assert none.to_xarray().sizes["response"] == 0


def test_first_version_counts_what_has_an_estimate(many_terms):
    """Files without the rank of X: what could not be estimated was not fitted then."""
    fits = many_terms.fits._replace(beta=np.array([[1.0], [np.nan], *[[2.0]] * 4]))
    later = ["residual_df", "mean", "random_variance[g]", "fixed_variance"]
    later += [f"variance_cov[{of}]" for of in ("g, g", "Residual, g", "Residual, Residual")]
    later += ["variance_cov[Fixed effects]"]
    table = to_table(replace(many_terms, fits=fits)).drop_columns(["rank", *later])
    first = from_table(record(table, version=1)).fits
    assert first.rank.tolist() == [1, 0, 1, 1, 1, 1]
    assert np.isnan([first.residual_df, first.mean, *first.contributions.T]).all()
    with pytest.raises(DataError, match="no column 'rank'"):
        from_table(record(table, version=2))
    with pytest.raises(DataError, match="no column 'residual_df', 'rank', 'mean', 'random"):
        from_table(table)


def test_file_is_replaced_only_on_request_and_as_a_whole(many_terms, tmp_path, monkeypatch):
    path = tmp_path / "fits.parquet"
    path.write_text("precious")
    with pytest.raises(DataError, match=r"fits.parquet' exists; pass overwrite=True"):
        many_terms.to_parquet(path)

    def fail(table, target):
        target.write_text("half a fi")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(pq, "write_table", fail)
        many_terms.to_parquet(path, overwrite=True)
    assert path.read_text() == "precious" and list(tmp_path.iterdir()) == [path]
    many_terms.to_parquet(path, overwrite=True)
    assert len(BatchResults.read_parquet(path)) == 6


def test_paths_that_cannot_be(many_terms, tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        many_terms.to_parquet(tmp_path / "nowhere" / "fits.parquet")
    with pytest.raises(DataError, match="is a folder"):
        many_terms.to_parquet(tmp_path, overwrite=True)
    with pytest.raises(FileNotFoundError):
        BatchResults.read_parquet(tmp_path / "fits.parquet")
    (tmp_path / "text.parquet").write_text("response,beta\n")
    with pytest.raises(DataError, match=r"text.parquet' cannot be read"):
        BatchResults.read_parquet(tmp_path / "text.parquet")


def record(table, **changes):
    """A table whose metadata are changed."""
    changed = json.loads(table.schema.metadata[b"jaxreml"]) | changes
    return table.replace_schema_metadata({b"jaxreml": json.dumps(changed)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.replace_schema_metadata(None), "does not hold results of fit_many"),
        (lambda t: t.replace_schema_metadata({b"jaxreml": b"{"}), "does not hold results of"),
        (lambda t: record(t, format="jaxreml.LMMResults"), "does not hold results of fit_many"),
        (lambda t: record(t, version=4), "written by a later version of jaxreml"),
        (lambda t: record(t, version=None), "incomplete: it does not say of which version"),
        (lambda t: record(t, model={"method": "ML"}), "incomplete: formula, structure, fixed_"),
        (lambda t: record(t, model=None), "incomplete: formula, method, structure"),
        (lambda t: t.drop_columns(["sigma", "z[g, a, b]"]), r"no column 'sigma', 'z\[g, a, b\]'"),
        (lambda t: t.drop_columns(["modes[g, b]"]), r"no column 'modes\[g, b\]'"),
        (
            lambda t: t.drop_columns(["sigma"]).append_column("sigma", pa.array(["a"] * 6)),
            "column 'sigma' holds string, not numbers",
        ),
    ],
)
def test_foreign_and_damaged_tables(many_terms, spoil, message, tmp_path):
    table = spoil(to_table(many_terms))
    with pytest.raises(DataError, match=message):
        from_table(table)
    pq.write_table(table, tmp_path / "fits.parquet")
    with pytest.raises(DataError, match=message):
        BatchResults.read_parquet(tmp_path / "fits.parquet")


def test_names_of_responses_that_a_file_cannot_hold(many_terms):
    mixed = BatchResults(many_terms.model, pd.Index([1, "a", 2, 3, 4, 5]), many_terms.fits)
    with pytest.raises(DataError, match="all strings or all integers, they are mixed-integer"):
        to_table(mixed)


def test_packages_that_are_missing_are_named(many_terms, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install 'jaxreml\[xarray\]'"):
        many_terms.to_xarray()
    with pytest.raises(DataError, match=r"pip install 'jaxreml\[arrow\]'"):
        many_terms.to_parquet(tmp_path / "fits.parquet")
