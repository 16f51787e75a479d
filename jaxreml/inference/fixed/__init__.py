"""Tests, contrasts and means of the fixed effects."""
