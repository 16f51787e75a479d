"""Plots of the draws of a bootstrap."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from jaxreml.errors import DataError
from jaxreml.inference.resampling.bootstrap import Bootstrap
from jaxreml.results.plots.canvas import BLUE, legend_above, new_axes

PLACES = 200


def bootstrap_density_data(bootstrap: Bootstrap, statistic: str | None = None) -> pd.DataFrame:
    """Kernel density estimate of the finite draws of one statistic, the first if left out.

    Returns:
        Columns value and density, 200 rows.

    Raises:
        DataError: no such statistic, or one whose draws do not vary.

    Examples:
        >>> jaxreml.plots.bootstrap_density_data(draws, "sigma").shape
        (200, 2)
    """
    from scipy.stats import gaussian_kde  # takes half a second to import

    draws = _draws(bootstrap, statistic)
    values = np.linspace(draws.min(), draws.max(), PLACES)
    return pd.DataFrame({"value": values, "density": gaussian_kde(draws)(values)})


def bootstrap_density(
    bootstrap: Bootstrap,
    statistic: str | None = None,
    *,
    conf_level: float = 0.95,
    method: str = "percentile",
    ax: Any = None,
) -> Any:
    """Density of the draws of one statistic, with the estimate and an interval of `method`.

    Args:
        bootstrap: of `LMMResults.bootstrap`.
        statistic: its name; the first if left out.
        conf_level, method: of the interval, as for `Bootstrap.conf_int`.
        ax: the Axes to draw on.

    Examples:
        >>> axes = jaxreml.plots.bootstrap_density(draws, "sigma", method="basic")
    """
    name = _statistic(bootstrap, statistic)
    frame = bootstrap_density_data(bootstrap, name)
    ax = new_axes(ax)
    ax.plot(frame["value"], frame["density"], color=BLUE, linewidth=1.8)
    ax.axvline(bootstrap.estimate[name], color="black", linewidth=1, label="estimate")
    low, high = bootstrap.conf_int(conf_level, method).loc[name, ["lower", "upper"]]
    if np.isfinite([low, high]).all():
        inside = np.linspace(low, high, PLACES)
        density = np.interp(inside, frame["value"], frame["density"], 0.0, 0.0)
        ax.fill_between(inside, density, color=BLUE, alpha=0.25, linewidth=0,
                        label=f"{conf_level:.0%} {method} interval")  # fmt: skip
    lost = len(bootstrap.draws) - len(_draws(bootstrap, name))
    note = f" ({lost} draws are not finite)" if lost else ""
    ax.set(xlabel=f"{name}{note}", ylabel="density", ylim=(0, None))
    legend_above(ax)
    return ax


def _statistic(bootstrap: Bootstrap, name: str | None) -> str:
    known = [str(label) for label in bootstrap.estimate.index]
    name = known[0] if name is None else name
    if name not in known:
        raise DataError(f"there is no statistic {name!r}: {', '.join(known)}")
    return name


def _draws(bootstrap: Bootstrap, statistic: str | None) -> np.ndarray:
    draws = bootstrap.draws[_statistic(bootstrap, statistic)].to_numpy()
    draws = draws[np.isfinite(draws)]
    if np.ptp(draws) == 0 if draws.size else True:
        raise DataError("the draws do not vary: there is no density to draw")
    return draws
