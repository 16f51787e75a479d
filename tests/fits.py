"""Fits made once by a worker for all its files; module fixtures may ask for them too."""

from __future__ import annotations

import functools

import jax
import references

import jaxreml


def fitted(name: str, method: str = "REML", structure: str | None = None) -> jaxreml.LMMResults:
    """The fit of one of R's reference models."""
    return _fitted(name, method, structure)


@functools.cache
def _fitted(name: str, method: str, structure: str | None) -> jaxreml.LMMResults:
    model = references.reference(name)
    data, weights = references.data(name), model.get("weights")
    with jax.enable_x64(True):
        return jaxreml.fit(model["formula"], data, method, weights=weights, structure=structure)


@functools.cache
def fitted_to(
    table: str, formula: str, method: str = "REML", weights: str | None = None
) -> jaxreml.LMMResults:
    """The fit of a formula to one of `references.table`."""
    with jax.enable_x64(True):
        return jaxreml.fit(formula, references.table(table), method, weights=weights)
