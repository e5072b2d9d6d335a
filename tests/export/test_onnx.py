"""ONNX and OpenVINO IR compute what the backend fake-quant computes; their own runtimes run them."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.errors import BackendError, CheckpointError, ConfigurationError, WriteError
from fxquant.export.compressed_tensors import export_compressed_tensors
from fxquant.export.onnx import export_onnx
from fxquant.export.openvino import export_openvino
from fxquant.runtime.model import GraphModel
from fxquant.testing import calibration, example_call, tiny_linears
from tests.export.small import Small, small_call
from tests.tiny import calibrate, inputs, make_dit

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def quantized(recipe: str, **options: Any) -> GraphModel:
    model = make_dit(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), measure=0, **options)


def error(found: Any, expected: Tensor) -> float:
    return float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("recipe", "layers"),
    [
        ("rtn-w8a8", "default"),
        pytest.param("ptq4dit-w4a8-g8", "all", marks=pytest.mark.exhaustive),
        pytest.param("smoothquant-w4a16", "default", marks=pytest.mark.exhaustive),
    ],
)
def test_onnxruntime_computes_the_same(recipe: str, layers: str, tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = quantized(recipe, layers=layers)
    (file,) = export_onnx(model, tmp_path / "out").files
    onnx.checker.check_model(onnx.load(file))
    kinds = [node.op_type for node in onnx.load(file).graph.node]
    assert kinds.count("QuantizeLinear") == (0 if "a16" in recipe else kinds.count("QuantizeLinear"))
    assert kinds.count("DequantizeLinear") >= 6
    options = runtime.SessionOptions()
    # By default, onnxruntime replaces products with stored weights by kernels that round their inputs too.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for tolerance, session in (
        (1e-5, runtime.InferenceSession(str(file), options)),
        (1e-2, runtime.InferenceSession(str(file))),
    ):
        for batch in (4, 3):
            call = inputs(batch=batch)
            (found,) = session.run(None, {name: value.numpy() for name, value in call.items()})
            with torch.no_grad():
                assert error(found, model(**call).sample) < tolerance


def test_branches_and_rotations(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = tiny_linears()
    roles = "roles=patch+final+block"
    recipe = (
        f"assign-precision{{precision=w4a8 layers=all}} ; rotate-channels{{{roles}}},"
        f"split-low-rank{{rank=2 branch=float16 {roles}}},quantize-linears"
    )
    made = fxquant.compile(model, recipe=recipe, calibrate=calibration(model), measure=0)
    targets = [node.target for node in made.graphs[0].graph.nodes]
    assert targets.count(torch.ops.fxquant.hadamard.default) and targets.count(torch.ops.fxquant.low_rank.default) == 2
    exported = export_onnx(made, tmp_path / "out")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(str(exported.files[0]), options)
    call = example_call(model, batch=3, seed=1)
    (found,) = session.run(None, {name: call[name].numpy() for name in exported.inputs[0]})
    with torch.no_grad():
        assert error(found, made(**call)) < 1e-5
    with pytest.raises(ConfigurationError, match=r"input is rotated at run time.*: first, second\n") as caught:
        export_compressed_tensors(made, tmp_path / "other")
    assert "a branch of low rank is added at run time: first, second\n" in str(caught.value)
    assert "tensor was added" not in str(caught.value)


def test_squeezes_and_copies_that_torch_writes_otherwise(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = Small()
    made = fxquant.compile(
        model, recipe="rtn-w4a8-g4", layers="all", calibrate=lambda: model(**small_call()), measure=0
    )
    exported = export_onnx(made, tmp_path / "out")
    call = small_call(batch=3, seed=1)
    session = runtime.InferenceSession(str(exported.files[0]))
    (found,) = session.run(None, {name: call[name].numpy() for name in exported.inputs[0]})
    with torch.no_grad():
        assert error(found, made(**call)) < 1e-5


@pytest.mark.slow
def test_codes_are_stored_as_bytes(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = quantized("rtn-w8a8")
    (file,) = export_onnx(model, tmp_path / "out").files
    graph = onnx.load(file).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    read = [node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"]
    weights = [tensors[name] for name in read if name in tensors]
    assert model.plan is not None
    linears = [name for name, layer in model.plan.quantized() if layer.kind == "linear"]
    assert len(weights) >= len(linears)
    assert {weight.data_type for weight in weights} == {onnx.TensorProto.UINT8}


@pytest.mark.slow
def test_openvino_computes_the_same(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model = quantized("rtn-w8a8")
    (file,) = export_openvino(model, tmp_path / "ir")
    assert {path.suffix for path in (tmp_path / "ir").iterdir()} == {".xml", ".bin"}
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    call = inputs(batch=4)
    found = next(iter(compiled({name: value.numpy() for name, value in call.items()}).values()))
    with torch.no_grad():
        expected = model(**call).sample
    # Integer kernels sum in another order, and a value at the edge of a code may be rounded to the next one.
    assert error(found, expected) < 0.02


@pytest.mark.slow
def test_openvino_leaves_nothing_if_it_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino")
    monkeypatch.setattr(openvino, "save_model", partial(fail, "no space"))
    model = Small()
    made = fxquant.compile(model, recipe="rtn-w8a8", calibrate=lambda: model(**small_call()), measure=0)
    with pytest.raises(WriteError, match=r"ir cannot be written: no space; check the disk"):
        export_openvino(made, tmp_path / "ir")
    assert not list(tmp_path.iterdir())


def fail(reason: str, *_: Any, **__: Any) -> None:
    raise RuntimeError(reason)


@pytest.mark.slow
def test_openvino_reads_bfloat16(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model = Small().bfloat16()

    def call(seed: int) -> dict[str, Tensor]:
        return {name: value.bfloat16() if name == "x" else value for name, value in small_call(seed=seed).items()}

    made = fxquant.compile(model, recipe="rtn-w8a8", calibrate=lambda: model(**call(0)), measure=0)
    (file,) = export_openvino(made, tmp_path / "ir")
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    x, time = call(1).values()
    bits = openvino.Tensor(x.view(torch.int16).numpy(), list(x.shape), openvino.Type.bf16)
    (found,) = compiled([bits, time.numpy()]).values()
    with torch.no_grad():
        expected = made(x=x, timestep=time).float()
    assert error(torch.from_numpy(found.view("int16")).view(torch.bfloat16).float().numpy(), expected) < 0.02


def test_refuses_float64(tmp_path: Path) -> None:
    model = Small().double()
    call = {name: value.double() if name == "x" else value for name, value in small_call().items()}
    made = fxquant.compile(model, recipe="rtn-w8a8", calibrate=lambda: model(**call), measure=0)
    with pytest.raises(ConfigurationError, match=r"computes in float64: .*blocks\.0.*\n.*in float32"):
        export_onnx(made, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("htg-w8a8", "range depends on the timestep: transformer_blocks.0"),
        ("dynamic-w8a8", "each token has a range of its own: transformer_blocks.0"),
    ],
)
def test_refuses_what_onnx_cannot_hold(recipe: str, message: str, tmp_path: Path) -> None:
    options = {"recipe": recipe}
    if recipe.startswith("htg"):
        options["recipe"] = str(fxquant.make_recipe(recipe).with_options("group-timesteps", groups=2))
    with pytest.raises(ConfigurationError, match=message) as caught:
        export_onnx(quantized(**options), tmp_path / "out")
    assert "smoothquant-w8a8" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_refuses_other_models_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not a DiT"):
        export_onnx(make_dit(1), tmp_path / "out")
    model = quantized("rtn-w8a8")
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(CheckpointError, match="not empty"):
        export_onnx(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    model.backend.name = "native"  # type: ignore[union-attr,misc]
    with pytest.raises(BackendError, match="backend native, whose ops ONNX does not have"):
        export_onnx(model, tmp_path / "out")
