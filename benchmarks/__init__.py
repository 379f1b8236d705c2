"""Measurements behind the numbers in the documentation: python -m benchmarks.NAME."""
