"""Backend ``fake-quant``: the quantized model in float arithmetic, with any bit width on any device.

It runs the reference ops as they are and is the oracle that every other backend is tested against. It saves memory,
not time.
"""

from fxquant.backends.fake_quant.backend import FakeQuant

__all__ = ["FakeQuant"]
