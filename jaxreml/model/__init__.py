"""The likelihood: cross-products, covariances, structures, objectives. Arrays only."""
