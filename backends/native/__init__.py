"""Backend ``native``: kernels that make quantized models fast. On x86 CPUs integer matrix products of oneDNN.

Linears of 8-bit activations and of weights of up to 8 bits run as products of uint8 and int8 with 32-bit sums. What
surrounds them stays ordinary ATen ops, which ``torch.compile`` fuses.
"""

from fxquant.backends.native.backend import Native

__all__ = ["Native"]
