"""Expression models: embedding, encoder, heads, and how they are saved."""
