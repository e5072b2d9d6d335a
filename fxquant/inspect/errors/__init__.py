"""Error attribution: which layers, at which timesteps, cause the error of a quantized model's output.

:mod:`~fxquant.inspect.errors.graphs` makes the quantized graph again with the float weights beside it,
:mod:`~fxquant.inspect.errors.units` finds what one layer computes, float and quantized,
:mod:`~fxquant.inspect.errors.sweep` measures one call, and :mod:`~fxquant.inspect.errors.measure` all of them within
a budget. For time instead of errors, see :mod:`fxquant.inspect.profiling`.
"""

from fxquant.inspect.errors.measure import attribute

__all__ = ["attribute"]
