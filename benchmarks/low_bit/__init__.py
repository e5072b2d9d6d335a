"""Recipes in every number format, and the parts of recipes that choose: ``python -m benchmarks.low_bit``."""
