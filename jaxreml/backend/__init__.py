"""How JAX is run: its settings, its devices, what is compiled and kept."""
