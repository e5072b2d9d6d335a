"""Calibration: calls of the model run its observed graph."""
