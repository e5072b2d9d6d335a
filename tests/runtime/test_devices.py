"""Devices by name."""

from __future__ import annotations

import pytest
import torch

from fxquant.errors import ConfigurationError
from fxquant.runtime.devices import usable_device


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_where_tensors_can_be_made(device: str | torch.device) -> None:
    assert usable_device(device) == torch.device("cpu")


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "xla", "mps", "meta", "cpu:x", "privateuseone"])
def test_others_are_refused(device: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^device '{device}' cannot be used here: .*'cpu'") as caught:
        usable_device(device)
    assert len(str(caught.value)) < 600 and ".." not in str(caught.value)
