"""Float8 as ModelOpt writes it: tensors, scales and the config that names the layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fxquant
from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.export.checkpoints import CONFIG_FILE, TENSORS_FILE
from fxquant.export.modelopt import export_modelopt
from tests.tiny import calibrate, make_dit, run


class Float8(nn.Module):
    """A linear as the format defines it: weight and input in float8, each with one scale."""

    def __init__(self, tensors: dict[str, Tensor], name: str) -> None:
        super().__init__()
        self.weight, self.scale, self.input, self.bias = (
            tensors.get(f"{name}.{end}") for end in ("weight", "weight_scale", "input_scale", "bias")
        )

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None and self.scale is not None and self.input is not None
        rounded = (x / self.input).clamp(-448, 448).to(torch.float8_e4m3fn).float() * self.input
        return nn.functional.linear(rounded, self.weight.float() * self.scale, self.bias)


def test_the_format_computes_the_model(tmp_path: Path) -> None:
    model = make_dit(2)
    balanced: Any = fxquant.balance(model, calibrate=calibrate(model))
    folder = export_modelopt(balanced, tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {CONFIG_FILE, TENSORS_FILE}
    config, tensors = json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / TENSORS_FILE)
    assert config["_class_name"] == "DiTTransformer2DModel" and config["num_layers"] == 2
    quantization = config["quantization_config"]
    assert (quantization["quant_method"], quantization["quant_algo"]) == ("modelopt", "FP8")
    read = make_dit(2)
    linears = [name for name, module in read.named_modules() if isinstance(module, nn.Linear)]
    coded = [name for name in linears if tensors[f"{name}.weight"].dtype is torch.float8_e4m3fn]
    assert "transformer_blocks.1.ff.net.2" in coded and "proj_out_2" in quantization["ignore"]
    assert sorted(set(linears) - set(coded)) == quantization["ignore"]
    read.load_state_dict({name: tensor for name, tensor in tensors.items() if name in read.state_dict()}, strict=True)
    for name in coded:
        for end in ("weight_scale", "input_scale"):
            assert (tensors[f"{name}.{end}"].dtype, tensors[f"{name}.{end}"].shape) == (torch.float32, ())
        owner, _, last = name.rpartition(".")
        setattr(read.get_submodule(owner), last, Float8(tensors, name))
    expected = run(model)
    assert 1e-4 < float((run(read) - expected).norm() / expected.norm()) < 0.1


def test_refusals(tmp_path: Path) -> None:
    model = make_dit(1)
    with pytest.raises(ConfigurationError, match=r"needs the ranges of activations.*fxquant\.balance"):
        export_modelopt(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    balanced = fxquant.balance(model, calibrate=calibrate(model))
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(CheckpointError, match="not empty"):
        export_modelopt(balanced, tmp_path)
