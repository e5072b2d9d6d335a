"""Backend ``native``: kernels that make quantized models fast, on x86 CPUs and NVIDIA GPUs.

One folder for each set of kernels: ``compiled`` (C++ for AVX-512 VNNI), ``onednn`` (other x86 CPUs) and ``gpu``
(Triton). The files beside these folders are shared: patterns of ops that fuse into kernels, and how tensors are kept.
"""

from fxquant.backends.native.backend import Native

__all__ = ["Native"]
