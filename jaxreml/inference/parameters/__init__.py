"""Functions of the variance parameters, with standard errors."""
