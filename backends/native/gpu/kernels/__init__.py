"""The Triton kernels. Import them only where they run, because Triton may not be installed."""
