"""Cells' labels from a network that is trained for them."""
