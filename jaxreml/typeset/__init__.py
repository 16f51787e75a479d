"""Tables for papers and notebooks: what a table is, how numbers look in it, and its writers."""
