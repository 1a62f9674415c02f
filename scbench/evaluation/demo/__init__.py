"""A tour of the verbs on cells that come with scanpy."""
