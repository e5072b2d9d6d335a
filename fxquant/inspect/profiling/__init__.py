"""Where the time of a quantized model goes, layer by layer, beside float and beside what the machine can do."""

from fxquant.inspect.profiling.measure import profile
from fxquant.inspect.profiling.results import Profile

__all__ = ["Profile", "profile"]
