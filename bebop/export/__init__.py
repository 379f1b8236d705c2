"""Directories that engines load, and the commands that serve them."""
