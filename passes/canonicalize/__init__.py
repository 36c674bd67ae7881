"""Exact rewrites that bring every spelling of a concept to its one canonical node."""
