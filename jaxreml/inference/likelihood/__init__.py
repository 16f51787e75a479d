"""Profiles of the likelihood and comparisons of models by it."""
