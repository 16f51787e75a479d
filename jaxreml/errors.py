"""What is raised and warned at the host boundary."""


class JaxremlError(ValueError):
    """Something about the data, the formula or the arguments that the caller can put right."""


class FormulaError(JaxremlError):
    """The formula does not parse or asks for something lme4's grammar does not have."""


class DataError(JaxremlError):
    """A column, level or value makes the model impossible to fit."""


class PrecisionError(TypeError):
    """float64 is needed and JAX is set to float32."""


class ConvergenceWarning(UserWarning):
    """The optimiser stopped without certifying an optimum; the status says why."""
