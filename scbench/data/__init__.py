"""From files of cells to batches: sources, vocabulary, shard store, sample order, loader."""
