"""Penalties by name, for `penalty=` of `fit`, `estimate`, `optimise` and the objectives."""

from jaxreml.model.penalties import Gamma as Gamma
from jaxreml.model.penalties import Wishart as Wishart
