"""Inspect a quantized model: reports and profiles."""
