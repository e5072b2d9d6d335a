"""Packages compiled ahead of time."""
