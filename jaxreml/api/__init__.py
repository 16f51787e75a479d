"""What people call with a table: `fit` for one response, `fit_many` for many."""
