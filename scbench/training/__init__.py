"""Pretraining under DeepSpeed."""
