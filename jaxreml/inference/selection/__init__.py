"""Models with a term less: drop1, ranova, step."""
