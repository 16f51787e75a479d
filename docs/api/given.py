"""What the examples of the reference use; `tests/whole/test_docstrings.py` runs this first."""

import numpy as np
import pandas as pd

import jaxreml
from jaxreml import kernels

# Reaction times of 18 people over ten days with little sleep.
data = jaxreml.datasets.load("sleepstudy")
fit = jaxreml.fit("Reaction ~ Days + (Days | Subject)", data)
draws = fit.bootstrap(nsim=200, seed=1)

# Six workers, each on three machines: a factor to compare the levels of.
machines = jaxreml.datasets.load("machines")
scores = jaxreml.fit("score ~ Machine + (1 | Worker)", machines)

# Forty responses of the 18 people, five of which rise with the days; and counts like them.
random = np.random.default_rng(0)
genes = random.normal(size=(180, 40)) * random.uniform(0.7, 1.5, 40)
genes += random.normal(size=(18, 40)).repeat(10, axis=0)
genes[:, :5] += 0.2 * data[["Days"]].to_numpy()
genes = pd.DataFrame(genes, columns=[f"gene{k}" for k in range(1, 41)])
counts = np.round(20 * np.exp2(genes)).astype(int)
results = jaxreml.fit_many("~ Days + (1 | Subject)", data, genes, modes=True)
moderated = results.moderated()

# A calf whose sire is its mother's sire too.
tree = kernels.pedigree(["calf", "cow"], ["bull", "bull"], ["cow", None])

# A study that is planned, with parameters that are guessed.
guesses = {"(Intercept)": 250, "Days": 10}
planned = jaxreml.population("~ Days + (1 | Subject)", data, guesses, {"Subject": 600}, sigma=25)
