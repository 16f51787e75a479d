"""Tables in, labelled arrays out: columns, formulas, model matrices, rows, hypotheses in words.

Nothing here imports JAX.
"""
