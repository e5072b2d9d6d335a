"""Products by oneDNN, with ATen ops for the rest: for any x86 processor that torch runs on."""

from fxquant.backends.native.onednn.lowering import lower, stored
from fxquant.backends.native.onednn.weights import MAX_FEATURES

__all__ = ["MAX_FEATURES", "lower", "stored"]
