"""Benchmark: one half of each cell's counts from the other half."""
