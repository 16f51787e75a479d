"""From a model frame to a fit: numbers with labels, certified."""
