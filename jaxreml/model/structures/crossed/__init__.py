"""Random terms on any number of factors: elimination level by level, then one Schur complement."""
