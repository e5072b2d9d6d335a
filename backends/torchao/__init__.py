"""Backend ``torchao``: linears and convolutions as torchao's integer kernels, found by its fusions in inductor.

Static 8-bit layers become the graph that torchao's PT2E flow for x86 makes, which ``torch.compile`` with frozen weights
turns into oneDNN's products; dynamic ones and weight-only ones become the products of torchao's tensor subclasses.
"""

from fxquant.backends.torchao.backend import TorchAO

__all__ = ["TorchAO"]
