"""Row by row: predictions, residuals, leverage, influence."""
