"""Simulated responses: bootstrap, likelihood-ratio distributions, power."""
