"""Checkpoints, pipeline folders and ahead-of-time packages."""
