"""The fits of R's reference models, made once by a worker for all its files."""

from __future__ import annotations

import functools

import jax
import references

import jaxreml


def fitted(name: str, method: str = "REML", structure: str | None = None) -> jaxreml.LMMResults:
    """The fit of one model; module fixtures may ask for it too."""
    return _fit(name, method, structure)


@functools.cache
def _fit(name: str, method: str, structure: str | None) -> jaxreml.LMMResults:
    model = references.reference(name)
    data, weights = references.data(name), model.get("weights")
    with jax.enable_x64(True):
        return jaxreml.fit(model["formula"], data, method, weights=weights, structure=structure)
