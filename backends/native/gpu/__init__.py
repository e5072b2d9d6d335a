"""fxquant's Triton kernels for NVIDIA GPUs. On CPUs they run in Triton's interpreter, for tests."""

from fxquant.backends.native.gpu.lowering import Options, kernel, lower, refuse, stored, weight_only_kernel

__all__ = ["Options", "kernel", "lower", "refuse", "stored", "weight_only_kernel"]
