"""Quantization grids, ranges, weights, packing and rounding: tensor arithmetic that does not depend on graphs."""
