"""Maps from parameters to the covariance of the random effects."""
