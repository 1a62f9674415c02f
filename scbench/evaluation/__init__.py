"""What a model is worth: embeddings, downstream benchmarks, reports."""
