"""What grid and scale of 4-bit formats cost, on plain numbers: ``python -m benchmarks.low_bit.grids``, in seconds.

Prints the SQNR in dB of values rounded in blocks of 32: normal values, the weights of the digits model, and inputs of
its linears. ``mxfp4`` differs from integers in two things, the grid (e2m1) and the scale (a power of two). Each is
exchanged alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from examples.digits.generator import load_pipeline
from fxquant.numerics.formats.elements import SmallFloat
from fxquant.numerics.grids import affine_parameters, fake_quantize
from fxquant.numerics.sqnr import sqnr_db

BLOCK = 32

_E2M1 = SmallFloat(2, 1)
_TINY = 1e-30


def _float(x: Tensor, scale: Tensor) -> Tensor:
    return _E2M1.decode(_E2M1.encode(x / scale), torch.float32) * scale


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax(dim=-1, keepdim=True).clamp_min(_TINY)


def _down(x: Tensor) -> Tensor:
    return torch.exp2(torch.floor(torch.log2(_largest(x))) - 2)


def _up(x: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(_largest(x) / _E2M1.largest)))


def _better(x: Tensor) -> Tensor:
    low, high = _float(x, _down(x)), _float(x, 2 * _down(x))
    errors = [(rounded - x).square().sum(dim=-1, keepdim=True) for rounded in (low, high)]
    return torch.where(errors[0] <= errors[1], low, high)


def _integer(x: Tensor, zero_point: bool) -> Tensor:
    low, high = (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)) if zero_point else (-_largest(x), _largest(x))
    return fake_quantize(x, *affine_parameters(low, high, 4, symmetric=not zero_point), 4)


def _integer_power(x: Tensor) -> Tensor:
    scale = torch.exp2(torch.ceil(torch.log2(_largest(x) / 7)))
    return (x / scale).round().clamp(-7, 7) * scale


GRIDS: dict[str, Callable[[Tensor], Tensor]] = {
    "e2m1, power of two, rounded down (`mxfp4`)": lambda x: _float(x, _down(x)),
    "e2m1, power of two, rounded up: nothing saturates": lambda x: _float(x, _up(x)),
    "e2m1, the better of both": _better,
    "e2m1, float32 scale": lambda x: _float(x, _largest(x) / _E2M1.largest),
    "integers without zero point, power of two": _integer_power,
    "integers without zero point, float32 scale": lambda x: _integer(x, zero_point=False),
    "integers with zero point, float32 scale (`w4a4-g32`)": lambda x: _integer(x, zero_point=True),
}
"""Grids and scales, and how each rounds blocks ``[n, 32]``."""


def inputs(model: nn.Module, name: str) -> Tensor:
    """Inputs of the linears of all blocks with a name, ``[tokens, width]``, each layer scaled to variance 1."""
    seen: dict[str, list[Tensor]] = {}

    def record(layer: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, arguments: seen.setdefault(layer, []).append(arguments[0].flatten(0, -2))

    hooks = [
        module.register_forward_pre_hook(record(layer))
        for layer, module in model.named_modules()
        if layer.startswith("transformer_blocks") and layer.endswith(name)
    ]
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            for step in (999, 500, 100):
                model(torch.randn(8, 4, 8, 8), torch.full((8,), step), class_labels=torch.arange(8))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([torch.cat(each) / torch.cat(each).std() for each in seen.values()])


def values() -> dict[str, Tensor]:
    """The numbers that are rounded, by the title of their column, in blocks ``[n, 32]``."""
    model = load_pipeline().transformer
    weights = [
        weight.detach() / weight.detach().std()
        for name, weight in model.transformer_blocks.named_parameters()
        if weight.ndim == 2 and (".attn" in name or ".ff." in name)
    ]
    torch.manual_seed(0)
    found = {
        "normal values": torch.randn(4096, 128),
        "weights": torch.cat([weight.reshape(-1, 128) for weight in weights]),
        "inputs of q, k, v": inputs(model, "attn1.to_q"),
        "inputs behind GELU": inputs(model, "ff.net.2"),
    }
    return {name: x.reshape(-1, BLOCK) for name, x in found.items()}


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    columns = values()
    rows = [[title, *(f"{sqnr_db(x, grid(x)):.1f}" for x in columns.values())] for title, grid in GRIDS.items()]
    align = ["left"] + ["right"] * len(columns)
    print(tabulate(rows, ["grid and scale", *columns], tablefmt="github", disable_numparse=True, colalign=align))


if __name__ == "__main__":
    main()
