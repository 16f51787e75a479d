"""The optimum of a likelihood: search, rivals, status, certificate, standard errors."""
