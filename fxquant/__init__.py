"""fxquant: a graph-rewriting compiler over torch.fx for post-training quantization of diffusion transformers."""

__version__ = "0.1.0.dev0"
