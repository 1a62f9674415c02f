"""Benchmark: which class a cell is of, from its embedding."""
