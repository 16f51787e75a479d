"""`MixedRegressor` in scikit-learn's own machinery."""

from __future__ import annotations

import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator
from sklearn.utils.validation import _num_samples

import jaxreml
from jaxreml.sklearn import MixedRegressor

SLEEP = jaxreml.datasets.load("sleepstudy")
X, Y, SUBJECT = SLEEP[["Days", "Subject"]], SLEEP["Reaction"], SLEEP["Subject"].to_numpy()
FIT = jaxreml.fit("Reaction ~ Days + (Days | Subject)", SLEEP)

PERFECT = "the responses are an exact function of X: the likelihood has no maximum, a DataError"
EXPECTED = {
    "check_sample_weights_shape": PERFECT,
    "check_sample_weights_not_overwritten": PERFECT,
    "check_regressors_no_decision_function": PERFECT,
    "check_sample_weight_equivalence_on_dense_data": (
        "weights are those of variances, as lme4's: a weight of 2 is not two rows"
    ),
}


class GroupsByRow(MixedRegressor):
    """scikit-learn's checks know of no groups: row i belongs to group i % 5."""

    def fit(self, X, y, sample_weight=None):
        return super().fit(X, y, sample_weight, groups=np.arange(_num_samples(X)) % 5)


@pytest.mark.parametrize(
    "estimator, check",
    [
        pytest.param(estimator, check, id=check.func.__name__)
        for estimator, check in estimator_checks_generator(GroupsByRow())
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_checks_of_sklearn(estimator, check):
    if check.func.__name__ in EXPECTED:
        with pytest.raises(jaxreml.DataError, match="perfectly"):
            check(estimator)
    else:
        check(estimator)


class TestModel:
    def test_formula_columns_and_groups_beside_are_one_model(self):
        models = [
            MixedRegressor("~ Days + (Days | Subject)").fit(X, Y),
            MixedRegressor(groups="Subject", slopes=["Days"]).fit(X, Y),
            MixedRegressor(slopes=["Days"]).fit(X[["Days"]], Y, groups=SUBJECT),
            MixedRegressor("~ x0 + (x0 | groups)").fit(
                X[["Days"]].to_numpy(), Y.to_numpy(), groups=SUBJECT
            ),
            MixedRegressor("~ x0 + (x0 | x1)").fit(X.to_numpy(object), Y),
            MixedRegressor("~ Days + (Days | Subject)").fit(pl.from_pandas(X), Y),
        ]
        for model in models:
            assert abs(model.results_.criterion - FIT.criterion) < 1e-8
            np.testing.assert_allclose([model.intercept_, *model.coef_], FIT.beta, rtol=1e-8)
        assert list(models[0].coef_names_) == ["Days"]
        assert list(models[0].feature_names_in_) == ["Days", "Subject"]
        assert isinstance(models[0].results_, jaxreml.LMMResults)

    def test_known_groups_by_their_effects_new_ones_by_the_population(self):
        new = pd.DataFrame({"Days": [3.0, 3.0, 4.0], "Subject": ["308", "new", "309"]})
        model = MixedRegressor("~ Days + (Days | Subject)").fit(X, Y)
        expected = FIT.predict(new, allow_new_levels=True)
        np.testing.assert_allclose(model.predict(new), expected, rtol=1e-8)

        beside = MixedRegressor(slopes=["Days"]).fit(X[["Days"]], Y, groups=SUBJECT)
        found = beside.predict(new[["Days"]], groups=new["Subject"])
        np.testing.assert_allclose(found, expected, rtol=1e-7)
        population = FIT.predict(new, re_form="~0")
        np.testing.assert_allclose(beside.predict(new[["Days"]]), population, rtol=1e-7)

        mean, sd = beside.predict(new[["Days"]], groups=new["Subject"], return_std=True)
        own = FIT.predict(new, allow_new_levels=True, interval="prediction")
        np.testing.assert_allclose(mean, own["prediction"], rtol=1e-7)
        np.testing.assert_allclose(sd, own["std_error"], rtol=1e-6)

    def test_terms_on_columns_stay_where_groups_are_left_out(self):
        data = jaxreml.datasets.load("penicillin")
        model = MixedRegressor("~ 1 + (1 | sample) + (1 | groups)")
        model.fit(data[["sample"]], data["diameter"], groups=data["plate"])
        fit = jaxreml.fit("diameter ~ 1 + (1 | sample) + (1 | plate)", data)
        expected = fit.predict(data, re_form="~ (1 | sample)")
        np.testing.assert_allclose(model.predict(data[["sample"]]), expected, rtol=1e-6)

    def test_weights_are_prior_weights_and_zeros_leave_rows_out(self):
        weights = np.random.default_rng(0).integers(0, 3, len(X)).astype(float)
        model = MixedRegressor("~ Days + (1 | Subject)").fit(X, Y, sample_weight=weights)
        kept = weights > 0
        fit = jaxreml.fit("Reaction ~ Days + (1 | Subject)", SLEEP[kept], weights=weights[kept])
        np.testing.assert_allclose([model.intercept_, *model.coef_], fit.beta, rtol=1e-9)
        sd = model.predict(X.iloc[:2], return_std=True)[1]
        own = fit.predict(X.iloc[:2], interval="prediction", weights=[1, 1])["std_error"]
        np.testing.assert_allclose(sd, own, rtol=1e-7)

    @pytest.mark.parametrize(
        "model, groups, message",
        [
            (MixedRegressor(), None, "needs groups"),
            (MixedRegressor(groups="Subjekt"), None, "Subjekt.*did you mean 'Subject'"),
            (MixedRegressor(groups="Subject"), SUBJECT, "the groups are the column 'Subject'"),
            (MixedRegressor("~ Days + (1 | Subject)"), SUBJECT, r"no random term on them"),
            (MixedRegressor("y ~ Days + (1 | Subject)"), None, "start it with ~"),
            (MixedRegressor("~ Days + (1 | Subject)", groups="Subject"), None, "not both"),
        ],
    )
    def test_what_it_refuses(self, model, groups, message):
        with pytest.raises(ValueError, match=message):
            model.fit(X, Y, groups=groups)

    def test_groups_beside_a_model_of_columns_are_refused(self):
        model = MixedRegressor("~ Days + (1 | Subject)").fit(X, Y)
        with pytest.raises(ValueError, match="column of X"):
            model.predict(X, groups=SUBJECT)


class TestMachinery:
    def test_parameters_and_clones(self):
        model = MixedRegressor("~ Days + (1 | Subject)", method="ML")
        assert model.get_params()["method"] == "ML"
        copy = clone(model).set_params(method="REML")
        assert copy.fit(X, Y).results_.method == "REML"
        assert not hasattr(model, "results_")

    def test_cross_validation_over_groups_of_a_column(self):
        scores = cross_val_score(
            MixedRegressor("~ Days + (Days | Subject)"), X, Y, groups=SUBJECT, cv=GroupKFold(3)
        )
        for (train, test), score in zip(GroupKFold(3).split(X, Y, SUBJECT), scores, strict=True):
            fit = jaxreml.fit("Reaction ~ Days + (Days | Subject)", SLEEP.iloc[train])
            predicted = fit.predict(SLEEP.iloc[test], re_form="~0")
            total = np.sum((Y.iloc[test] - Y.iloc[test].mean()) ** 2)
            by_hand = 1 - np.sum((Y.iloc[test] - predicted) ** 2) / total
            assert abs(score - by_hand) < 1e-8

    def test_groups_are_routed_to_fit_predict_and_score(self):
        with sklearn.config_context(enable_metadata_routing=True):
            model = MixedRegressor(slopes=["Days"])
            model.set_fit_request(groups=True).set_score_request(groups=True)
            model.set_predict_request(groups=True)
            given = {"groups": SUBJECT}
            own = cross_val_score(model, X[["Days"]], Y, cv=3, params=given)
            column = cross_val_score(MixedRegressor(groups="Subject", slopes=["Days"]), X, Y, cv=3)
            np.testing.assert_allclose(own, column, rtol=1e-7)
            grouped = cross_val_score(model, X[["Days"]], Y, cv=GroupKFold(3), params=given)
            assert len(grouped) == 3
            out = cross_val_predict(model, X[["Days"]], Y, cv=GroupKFold(3), params=given)
            assert out.shape == Y.shape

    def test_pipelines_hand_columns_on(self):
        scale = ColumnTransformer(
            [("scale", StandardScaler(), ["Days"])],
            remainder="passthrough",
            verbose_feature_names_out=False,
        )
        as_frame = make_pipeline(
            scale.set_output(transform="pandas"), MixedRegressor("~ Days + (Days | Subject)")
        ).fit(X, Y)
        assert list(as_frame[-1].feature_names_in_) == ["Days", "Subject"]
        np.testing.assert_allclose(as_frame.predict(X), FIT.fitted, rtol=1e-6)
        as_array = make_pipeline(
            clone(scale).set_output(transform="default"),
            MixedRegressor(groups="x1", slopes=["x0"]),
        ).fit(X, Y)
        np.testing.assert_allclose(as_array.predict(X), FIT.fitted, rtol=1e-6)

    def test_formulas_are_searched(self):
        formulas = ["~ Days + (1 | Subject)", "~ 1 + (1 | Subject)"]
        search = GridSearchCV(MixedRegressor(), {"formula": formulas}, cv=GroupKFold(3))
        search.fit(X, Y, groups=SUBJECT)
        assert search.best_params_ == {"formula": formulas[0]}
