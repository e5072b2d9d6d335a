"""Quantization grids, ranges, weights, packing and rounding: tensor arithmetic that knows nothing of graphs."""
