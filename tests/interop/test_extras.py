"""Without the packages that they are for, modules say what to install."""

from __future__ import annotations

import watchdog

CODE = """
import sys
for package in ("sklearn", "marginaleffects", "maketables"):
    sys.modules[package] = None
    try:
        __import__(f"jaxreml.{package}")
    except ImportError as error:
        assert f"pip install 'jaxreml[{package}]'" in str(error), error
    else:
        raise AssertionError(package)
import jaxreml
data = jaxreml.datasets.load("sleepstudy")
fit = jaxreml.fit("Reaction ~ Days + (1 | Subject)", data)
calls = {
    "xarray": lambda: fit.bootstrap(60).to_xarray(),
    "arviz": lambda: fit.bootstrap(60).to_inference_data(),
    "polars": lambda: fit.tidy(output="polars"),
    "pyarrow": lambda: fit.tidy(output="pyarrow"),
}
for package, call in calls.items():
    sys.modules[package] = None
    try:
        call()
    except jaxreml.DataError as error:
        assert "pip install" in str(error) and package in str(error), error
    else:
        raise AssertionError(package)
"""


def test_what_to_install_is_said():
    watchdog.run(CODE, check=True)
