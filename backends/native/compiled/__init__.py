"""fxquant's own kernels in C++ for AVX-512 with VNNI, compiled on first use."""

from fxquant.backends.native.compiled.lowering import Options, fits, lower, stored
from fxquant.backends.native.compiled.weights import MAX_FEATURES, in_halves, sums_groups

__all__ = ["MAX_FEATURES", "Options", "fits", "in_halves", "lower", "stored", "sums_groups"]
