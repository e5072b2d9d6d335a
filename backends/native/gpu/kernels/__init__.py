"""The kernels themselves, in Triton. Import them where they run only: Triton need not be installed."""
