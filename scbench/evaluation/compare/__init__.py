"""Comparison of structures: train many models alike, judge them alike, tell effects apart from chance."""
