"""Backend ``torchao``: linears and convolutions by torchao's integer kernels, through its fusions in inductor.

Static 8-bit layers become the graph that torchao's PT2E flow for x86 makes. ``torch.compile`` with frozen weights turns
this graph into oneDNN's products. Dynamic and weight-only layers become the products of torchao's tensor subclasses.
"""

from fxquant.backends.torchao.backend import TorchAO

__all__ = ["TorchAO"]
