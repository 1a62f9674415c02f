"""Readers of raw counts, one kind of file each."""
