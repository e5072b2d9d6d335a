"""Captures one call of a model as an FX graph of ATen ops, and compares the graph with the model."""
