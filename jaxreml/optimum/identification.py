"""Whether a design determines its variance parameters, before anything is estimated.

They are determined locally where the expected information tr(P V_i P V_j) / 2 is regular
(Rothenberg 1971, Econometrica 39:577). Its rank is the same at nearly all points: one that has
nothing special will do. Random effects and residuals can say the same: compound symmetry is a
random intercept.
"""

from __future__ import annotations

import numpy as np

from jaxreml.errors import DataError
from jaxreml.model.covariance import natural
from jaxreml.model.design import Design
from jaxreml.model.information import of_relative

LIKE = 0.4  # correlation of the residuals, and relative variance of random effects, near the point
AWAY = 0.25  # standard deviation of what makes the point one without symmetries
SINGULAR = 1e-9  # eigenvalues of the scaled information that are zero
INVOLVED = 0.1  # entries of a null vector, relative to the largest, that count
SHOWN = 6  # parameters that a message names


def require_determined(design: Design, residual: str, *, reml: bool) -> None:
    """Refuse a covariance of residuals and random effects beside it that mean the same.

    Args:
        design: with names.
        residual: what the covariance of residuals is called.
        reml: whether the fit is by REML.

    Raises:
        DataError: some of the variance parameters are not determined: named.
    """
    places = undetermined(design, reml=reml)
    if not places:
        return
    names = [design.parameter_names[k] for k in places]
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    factors = _factors(design, places)
    text = f"the data do not determine residual={residual!r}"
    advice = "Take one of fewer parameters"
    if factors:
        others = " and ".join(map(repr, factors))
        text = f"the data cannot tell residual={residual!r} from the random effects on {others}"
        advice = "Leave these random effects out, or take a residual of fewer parameters"
    raise DataError(
        f"{text}: {shown} can change together so that the likelihood stays the same. {advice}"
    )


def _factors(design: Design, places: list[int]) -> list[str]:
    """Grouping factors of the random effects that parameters belong to."""
    covariance, found, start = design.covariance, [], 0
    for block, (name, effects) in zip(covariance.blocks, design.names, strict=True):
        stop = start + len(block.parameter_names(name, effects))
        if not block.residual and any(start <= place < stop for place in places):
            found.append(name)
        start = stop
    return list(dict.fromkeys(found))


def undetermined(design: Design, *, reml: bool) -> list[int]:
    """Which parameters, by their places, are in the combination that the data say least of, if they
    do not determine it; as a rule none. On the host."""
    information = expected_information(design, reml=reml)
    scale = np.sqrt(np.maximum(np.diagonal(information), 0.0))
    unit = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    if not np.isfinite(information).all():
        return []
    values, vectors = np.linalg.eigh(information * unit[:, None] * unit)
    if values[0] > SINGULAR * values[-1]:
        return []
    least = np.abs(vectors[:, 0])
    return np.flatnonzero(least > INVOLVED * least.max()).tolist()


def expected_information(design: Design, *, reml: bool) -> np.ndarray:
    """tr(P V_i P V_j) of the parameters (k + 1, k + 1), at a point without symmetries."""
    covariance = design.covariance
    starts = []
    for block in covariance.blocks:
        own = np.equal(*natural.triangle(block.size)).astype(float)
        starts.append(LIKE * (1 - own) if block.residual else LIKE * own)
    whole, design = np.concatenate(starts), design.first_order
    if hasattr(design.structure, "linear"):  # the scale of times is its own
        whole[-1:] = design.structure.start()[-1:]  # pyright: ignore
    chart = covariance.start(whole, LIKE)
    chart = chart + AWAY * np.random.default_rng(0).standard_normal(len(chart))
    chart = covariance.canonical(chart)
    omega = covariance.omega(chart)
    with np.errstate(all="ignore"):
        _, inside = of_relative(omega, design.blank(), reml=reml)
    parameters = covariance.report(chart, np.zeros(())).finite
    none = np.zeros((len(omega) + 1, len(omega) + 1))
    jacobian, _ = covariance.in_parameters(parameters, none[0], none)
    return jacobian.T @ inside @ jacobian
