"""Benchmark: predict what a perturbation does to the mean expression of cells that were held out."""
