"""Kernels of our own in Triton, for NVIDIA GPUs; on processors they run in its interpreter, for tests."""
