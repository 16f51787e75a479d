"""What is raised and warned at the host boundary."""


class JaxremlError(ValueError):
    """Something about the data, the formula or the arguments that the caller can put right.

    Examples:
        >>> try:
        ...     jaxreml.fit("Reaction ~ Dyas + (1 | Subject)", data)
        ... except jaxreml.JaxremlError as error:
        ...     print(type(error).__name__, "-", error)
        DataError - column 'Dyas' of the formula is not in the data; did you mean ...
    """


class FormulaError(JaxremlError):
    """A formula, a hypothesis or a contrast that does not parse, or asks for what its grammar does
    not have.

    Examples:
        >>> jaxreml.fit("Reaction ~ Days + (1 | Subject", data)
        Traceback (most recent call last):
            ...
        jaxreml.errors.FormulaError: '(' is never closed in 'Reaction ~ Days + (1 | Subject'
    """


class DataError(JaxremlError):
    """What the data, the model or a fit does not have or cannot give: a column, a level or a term
    by name, a value, an optimum, a file.

    An argument that no data would make right is a plain ValueError.

    Examples:
        >>> jaxreml.fit("Reaction ~ Days + (1 | Person)", data)
        Traceback (most recent call last):
            ...
        jaxreml.errors.DataError: column 'Person' of the formula is not in the data. ...
    """


class PrecisionError(TypeError):
    """float64 is needed and JAX is set to float32.

    Examples:
        >>> import jax
        >>> design = jaxreml.design("Reaction ~ Days + (1 | Subject)", data)
        >>> with jax.enable_x64(False):
        ...     jaxreml.estimate(design)
        Traceback (most recent call last):
            ...
        jaxreml.errors.PrecisionError: likelihoods need float64 and JAX is set to ...
    """


class ConvergenceWarning(UserWarning):
    """The optimiser stopped without certifying an optimum; the status says why.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     early = jaxreml.fit("Reaction ~ Days + (Days | Subject)", data, max_iterations=1)
        >>> caught[0].category.__name__, early.converged
        ('ConvergenceWarning', False)
    """


class EstimabilityWarning(UserWarning):
    """Something asked for is not determined by the data, and is NaN.

    Examples:
        >>> import warnings
        >>> cakes = jaxreml.datasets.load("cake").query("recipe != 'C' or temp < 225")
        >>> gap = jaxreml.fit("angle ~ recipe * temperature + (1 | replicate)", cakes)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     value = gap.predict({"recipe": ["C"], "temperature": ["225"]}, re_form="~0")
        >>> caught[0].category.__name__, value.tolist()
        ('EstimabilityWarning', [nan])
    """
