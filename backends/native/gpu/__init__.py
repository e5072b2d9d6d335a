"""Kernels of our own in Triton, for NVIDIA GPUs; on processors they run in its interpreter, for tests."""

from fxquant.backends.native.gpu.lowering import Options, kernel, lower, refuse, stored, weight_only_kernel

__all__ = ["Options", "kernel", "lower", "refuse", "stored", "weight_only_kernel"]
