"""Backend ``fake-quant``: the quantized model in float arithmetic, with any bit width on any device.

It runs the reference ops unchanged and is the oracle: every other backend is tested against it. It saves memory, not
time.
"""

from fxquant.backends.fake_quant.backend import FakeQuant

__all__ = ["FakeQuant"]
