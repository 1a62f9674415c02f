"""Many benchmarks as one: a list of data sets, any models, one table."""
