"""What NumPy fits does without JAX, and a command without what takes long to import."""

from __future__ import annotations

import subprocess
import sys

WITHOUT_JAX = """
import sys, jaxreml
data = jaxreml.datasets.load("sleepstudy")
fit = jaxreml.fit("Reaction ~ Days + (Days | Subject)", data)
str(fit.summary()), str(fit)
fit.coefficients("kenward-roger"), fit.anova(), fit.conf_int(), fit.random_effects
fit.predict(data.iloc[:3]), fit.emmeans("Days"), fit.variance_components
fit.conf_int(method="profile"), fit.bootstrap(50), fit.tidy(), fit.influence(by="Subject")
penicillin = jaxreml.datasets.load("penicillin")
crossed = jaxreml.fit("diameter ~ 1 + (1 | plate) + (1 | sample)", penicillin)
str(crossed.summary()), crossed.predict()
jaxreml.compare(fit, jaxreml.fit("Reaction ~ Days + (1 | Subject)", data))
responses = data[["Reaction"]].to_numpy() * [[1.0, 2.0, 3.0]]
jaxreml.fit_many("~ Days + (Days | Subject)", data, responses, df="kenward-roger", modes=True)
counts = (responses[:40] * [[1, 2, 3]]).round()
jaxreml.voom(counts, "~ Days + (1 | Subject)", data.iloc[:40]).weights
many = jaxreml.fit_many("~ Days + (1 | Subject)", data, responses)
many.moderated().top_table("Days"), many.summary(), many.variance_fractions(), many.r2(), many.icc()
assert "jax" not in sys.modules, "JAX was imported"
"""
COMMAND_LINE = """
import sys
from jaxreml.cli import app
try:
    app(["fit", "sleepstudy", "Reaction ~ Days + (Days | Subject)"])
except SystemExit as end:
    assert not end.code
slow = {"jax", "matplotlib", "scipy.interpolate", "scipy.optimize", "scipy.stats"}
assert not slow & set(sys.modules), slow & set(sys.modules)
"""
THEN_JAX = """
import jaxreml
fit = jaxreml.fit("Yield ~ 1 + (1 | Batch)", jaxreml.datasets.load("dyestuff"))
design = fit.design
import jax
with jax.enable_x64(True):
    value = float(jax.jit(jaxreml.reml_objective)(fit.parameters, design))
    assert len(jax.tree.leaves(design)) > 5
assert abs(value - fit.criterion) < 1e-8
"""


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, capture_output=True)


def test_what_numpy_fits_does_without_jax():
    run(WITHOUT_JAX)


def test_the_command_line_fits_without_what_is_slow_to_import():
    run(COMMAND_LINE)


def test_records_made_before_jax_are_known_to_it():
    run(THEN_JAX)
