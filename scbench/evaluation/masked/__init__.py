"""How well a model predicts genes that were hidden from it."""
