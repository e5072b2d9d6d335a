"""Measure the time of a quantized model, layer by layer, compared with float and with the peaks of the machine."""

from fxquant.inspect.profiling.measure import profile
from fxquant.inspect.profiling.results import Profile

__all__ = ["Profile", "profile"]
