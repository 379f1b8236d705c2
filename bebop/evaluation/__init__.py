"""Measuring acceptance, and reports."""
