"""Encoders: packed token states in, packed token states out."""
