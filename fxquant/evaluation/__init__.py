"""Evaluation: makes images with a pipeline, and measures their quality by the metrics of the field."""
