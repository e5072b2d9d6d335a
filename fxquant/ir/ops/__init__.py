"""The operators of observed and quantized graphs, as PyTorch custom operators `torch.ops.fxquant.*`.

Each has one schema, one reference kernel that defines its meaning on every device, and one fake kernel for shapes.
Importing this module registers them. They stay single nodes in FX and export graphs and under `torch.compile`; a
backend replaces them or runs the reference. An operator belongs here if passes and backends have to agree on it.

What a code stands for depends on its number format (:mod:`fxquant.numerics.formats`), which operators name. A code q
of integers stands for `scale * (q - zero_point)`, see :mod:`fxquant.numerics.grids`. Codes are uint8; those of weights
are packed. Scales and zero points of activations are 0-d or broadcast to the activation with size 1 in the last axis
(the second-to-last axis for the right factor of a matrix product): `[batch, 1, 1]` is one per sample,
`[batch, tokens, 1]` one per token. Formats with blocks have a scale per block, `[..., channels / block]`.
Arithmetic is in float32. It is in float64, in which integers up to 2**53 are exact, if the float side of the operator
is float64. Autocast does not affect the operators. They are for inference and define no gradients. Results are
contiguous, and errors are :class:`~fxquant.errors.ConfigurationError` unless a description says otherwise.
"""

from fxquant.ir.ops.activations import (
    Recorder,
    block_scale,
    channel_affine,
    observe,
    quantize,
    recording,
    token_grid,
    token_scale,
)
from fxquant.ir.ops.hadamard import hadamard
from fxquant.ir.ops.layers import conv2d, dequantize_weight, linear
from fxquant.ir.ops.low_rank import low_rank
from fxquant.ir.ops.products import matmul

__all__ = [
    "Recorder",
    "block_scale",
    "channel_affine",
    "conv2d",
    "dequantize_weight",
    "hadamard",
    "linear",
    "low_rank",
    "matmul",
    "observe",
    "quantize",
    "recording",
    "token_grid",
    "token_scale",
]
