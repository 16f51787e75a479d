"""Structures: how the marginal covariance V is built and factorised.

Likelihood, optimiser and standard errors use only the interface of `base.Structure`; a new way to
factorise V is one new file here and one line in `model.basis`.
"""

from jaxreml.model.structures.base import Full, Marginal, Projection, Structure
from jaxreml.model.structures.crossed.crossed import Crossed
from jaxreml.model.structures.dense import Dense
from jaxreml.model.structures.grouped import Grouped

__all__ = ["Crossed", "Dense", "Full", "Grouped", "Marginal", "Projection", "Structure"]
