"""Packages read contiguous tensors from a file, so they are compiled for contiguous tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.storage.aot.export import _arguments
from tests.support import captured


class Transposed(nn.Module):
    """A linear whose weight is stored transposed, as tied weights may be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4).t())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def test_a_package_is_compiled_for_the_strides_that_its_file_has() -> None:
    model = Transposed()
    found = captured(model, torch.randn(2, 6))
    assert not model.weight.is_contiguous()
    _, weight = _arguments(found)[0]
    assert torch.equal(weight, model.weight) and weight.is_contiguous()
