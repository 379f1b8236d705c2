"""Rollouts: the file format, sampling them from the backbone, and batching them."""
