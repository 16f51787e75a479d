"""What is raised and warned at the host boundary."""


class JaxremlError(ValueError):
    """Something about the data, the formula or the arguments that the caller can put right."""


class FormulaError(JaxremlError):
    """A formula, a hypothesis or a contrast that does not parse, or asks for what its grammar does
    not have."""


class DataError(JaxremlError):
    """What the data, the model or a fit does not have or cannot give: a column, a level or a term
    by name, a value, an optimum, a file.

    An argument that no data would make right is a plain ValueError.
    """


class PrecisionError(TypeError):
    """float64 is needed and JAX is set to float32."""


class ConvergenceWarning(UserWarning):
    """The optimiser stopped without certifying an optimum; the status says why."""


class EstimabilityWarning(UserWarning):
    """Something asked for is not determined by the data, and is NaN."""
