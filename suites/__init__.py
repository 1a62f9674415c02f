"""Suites of benchmarks, and the schema of their results; `scbench benchmark suite aaai2025` names one of them."""
