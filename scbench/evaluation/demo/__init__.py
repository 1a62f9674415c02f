"""The whole path on real cells in minutes."""
