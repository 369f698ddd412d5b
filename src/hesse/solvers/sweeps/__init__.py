"""Loops over the weights of one matrix in which each decision depends on those before it: compiled, or on a GPU."""
