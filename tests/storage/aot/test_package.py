"""Models compiled ahead of time: they do what they did, whole, and only from whole files."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

import fxquant
from fxquant.backends.native import Native
from fxquant.calibration.pipeline_calls import generate
from fxquant.cli.__main__ import app
from fxquant.disk import files
from fxquant.errors import (
    AlreadyCompiledError,
    BackendError,
    CaptureError,
    CheckpointError,
    CompilerError,
    ConfigurationError,
)
from fxquant.numerics.sqnr import sqnr_db
from fxquant.runtime.model import GraphModel
from fxquant.storage.aot.export import export_folder, lifted
from fxquant.storage.aot.model import PackagedModel, signature_from_json, signature_to_json
from fxquant.storage.diffusers_io import load_pipeline, save_pipeline
from tests.support import count
from tests.tiny import calibrate, inputs, make_dit, make_pipeline, run

pytestmark = [
    pytest.mark.slow,  # Two graphs: as many runs of the C++ compiler.
]

BACKENDS = (
    # Inductor's code of its ops: tests/runtime/test_torch_compile.py.
    pytest.param("fake-quant", marks=pytest.mark.exhaustive),
    "native",
    pytest.param("onednn", marks=pytest.mark.exhaustive),
)
Made = tuple[GraphModel, Path]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A pipeline whose native transformer, calibrated with calls of two sizes, was exported on the command line."""
    folder, pipe = tmp_path_factory.mktemp("native"), make_pipeline()
    model = pipe.transformer
    pipe.transformer = fxquant.compile(
        model, recipe="htg-w4a8", calibrate=lambda: [calibrate(model)(), run(model, size=4)], measure=0
    )
    save_pipeline(pipe, folder / "quantized")
    arguments = ("export", folder / "quantized", folder / "compiled", "--aot", "--backend", "native")
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "graph 1 of 2: compiled in" in result.stderr
    assert result.stdout.startswith("compiled in ")
    return fxquant.load(folder / "quantized/transformer", backend="native"), folder / "compiled"


@pytest.fixture(scope="module")
def several(pipeline: Made) -> Made:
    """A model with graphs of two sizes."""
    quantized, folder = pipeline
    assert len(quantized.graphs) == 2
    return quantized, folder / "transformer"


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A fake-quant model that has seen calls of two sizes."""
    model, folder = make_dit(), tmp_path_factory.mktemp("fake-quant") / "package"
    quantized = fxquant.compile(model, recipe="ptq4dit-w8a8", calibrate=calibrate(model), measure=0)
    run(quantized, size=4)
    exported = fxquant.export_aot(quantized, folder)
    assert exported.folder == folder
    assert len(exported.seconds) == 2
    assert all(second > 0 for second in exported.seconds)
    assert exported.bytes == sum(path.stat().st_size for path in folder.iterdir())
    return quantized, folder


@pytest.fixture(scope="module")
def opaque(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model whose weights lie in layouts of oneDNN's, which no file keeps."""
    model, folder = make_dit(), tmp_path_factory.mktemp("onednn") / "package"
    backend = Native(kernels="onednn")
    quantized = fxquant.compile(model, recipe="rtn-w8a8", backend=backend, calibrate=calibrate(model), measure=0)
    assert any(tensor.layout is not torch.strided for tensor in quantized.tensors().values())
    fxquant.export_aot(quantized, folder)
    return quantized, folder


@pytest.fixture
def made(request: pytest.FixtureRequest, backend: str) -> Made:
    """The quantized model and the package of a backend."""
    names = {"native": "several", "onednn": "opaque", "fake-quant": "oracle"}
    found: Made = request.getfixturevalue(names[backend])
    return found


# --- what it does ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_the_models(made: Made) -> None:
    quantized, folder = made
    packaged = fxquant.load_package(folder)
    for batch in (1, 2, 3, 8):
        call = {"batch": batch, "timestep": None, "seed": batch}
        # Inductor sums in another order than ATen: rounding differs, codes do not.
        assert sqnr_db(run(quantized, **call), run(packaged, **call)) > 100.0


def test_every_graph_is_there(several: Made) -> None:
    quantized, folder = several
    packaged = fxquant.load_package(folder)
    assert packaged.calls == [captured.call for captured in quantized.captured]
    assert sqnr_db(run(quantized, size=4), run(packaged, size=4)) > 100.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_a_drop_in(made: Made) -> None:
    quantized, folder = made
    packaged = fxquant.load_package(folder)
    assert (packaged.dtype, packaged.device, packaged.training) == (torch.float32, torch.device("cpu"), False)
    assert dict(packaged.config) == {k: v for k, v in quantized.config.items() if k != "_name_or_path"}
    assert packaged.config.num_layers == 1
    parameters = [
        [(p.name, p.kind, p.default) for p in inspect.signature(model.forward).parameters.values()]
        for model in (packaged, quantized)
    ]
    assert parameters[0] == parameters[1]
    assert isinstance(packaged(**inputs()), Transformer2DModelOutput)
    assert packaged.to("cpu") is packaged
    assert packaged.patch_size == quantized.patch_size  # An attribute of the original.
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        packaged.nothing
    x, timestep, labels = inputs().values()
    assert torch.equal(packaged(x, timestep, labels).sample, packaged(x, class_labels=labels, timestep=timestep).sample)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_may_lie_in_memory_as_they_like(made: Made) -> None:
    packaged = fxquant.load_package(made[1])
    call = inputs()
    odd = {
        "hidden_states": call["hidden_states"].to(memory_format=torch.channels_last),
        "timestep": call["timestep"][:1].expand(4),
        "class_labels": call["class_labels"].repeat_interleave(2)[::2],
    }
    assert not any(tensor.is_contiguous() for tensor in odd.values())
    with torch.no_grad():
        assert torch.equal(packaged(**odd).sample, packaged(**call).sample)


def test_signs_that_are_not_in_memory(several: Made) -> None:
    packaged, call = fxquant.load_package(several[1]), inputs()
    lazy = {**call, "hidden_states": torch._neg_view(-call["hidden_states"])}
    assert lazy["hidden_states"].is_neg()
    assert torch.equal(packaged(**lazy).sample, packaged(**call).sample)


def test_a_pipeline_takes_it(pipeline: Made) -> None:
    quantized, folder = pipeline
    expected, actual = make_pipeline(quantized), load_pipeline(folder, trust_packages=True)
    assert isinstance(actual.transformer, PackagedModel)
    actual.set_progress_bar_config(disable=True)
    images = [generate(pipe, labels=[1, 2], steps=2) for pipe in (expected, actual)]
    assert [image.tobytes() for image in images[0]] == [image.tobytes() for image in images[1]]


@pytest.mark.slow
def test_it_loads_in_a_new_process_without_tracing(pipeline: Made, tmp_path: Path) -> None:
    quantized, folder = pipeline
    code = f"""
import torch, fxquant
torch.export.export = None
model = fxquant.load_package({str(folder / "transformer")!r})
torch.save(model(**torch.load({str(tmp_path / "call.pt")!r})).sample, {str(tmp_path / "out.pt")!r})
"""
    torch.save(inputs(), tmp_path / "call.pt")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sqnr_db(run(quantized), torch.load(tmp_path / "out.pt")) > 100.0


def test_loading_compiles_nothing(several: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("traced or compiled while a package was loaded")

    for owner, name in ((torch.export, "export"), (torch, "compile"), (torch._inductor, "aoti_compile_and_package")):
        monkeypatch.setattr(owner, name, refused)
    assert len(fxquant.load_package(several[1]).calls) == len(several[0].graphs)


# --- what it refuses ------------------------------------------------------------------------------------------------


def test_it_is_no_float_model(several: Made) -> None:
    packaged = fxquant.load_package(several[1])
    with pytest.raises(AlreadyCompiledError, match="made by fxquant; give the original float model"):
        fxquant.trace(packaged)


def test_it_has_no_training_mode(several: Made) -> None:
    packaged = fxquant.load_package(several[1])
    with pytest.raises(ConfigurationError, match="no training mode"):
        packaged.train()
    assert packaged.eval() is packaged


def test_a_call_that_was_not_packaged(several: Made) -> None:
    packaged = fxquant.load_package(several[1])
    with pytest.raises(CaptureError) as caught:
        run(packaged, size=16)
    message = str(caught.value)
    assert "float32[4, 4, 16, 16]" in message
    assert "float32[batch, 4, 8, 8]" in message
    assert "float32[batch, 4, 4, 4]" in message
    with pytest.raises(CaptureError):
        packaged(**{name: t.double() if t.is_floating_point() else t for name, t in inputs().items()})
    with pytest.raises(TypeError):
        packaged(unknown=1)


def test_other_dtypes_and_devices(several: Made) -> None:
    packaged = fxquant.load_package(several[1])
    for move in (lambda: packaged.to(torch.bfloat16), lambda: packaged.to("meta")):
        with pytest.raises(ConfigurationError, match="for which it was compiled"):
            move()


@pytest.mark.parametrize(
    ("move", "found"),
    [
        (lambda tensor: tensor.to("meta"), "on meta"),
        (lambda tensor: tensor.to_sparse(), r"torch\.sparse_coo"),
        (lambda tensor: FakeTensorMode().from_tensor(tensor), "fake"),
    ],
    ids=["meta", "sparse", "fake"],
)
def test_memory_that_compiled_code_cannot_read(several: Made, move: Callable[[Tensor], Tensor], found: str) -> None:
    """It would read it all the same, and end the process."""
    packaged, call = fxquant.load_package(several[1]), inputs()
    with pytest.raises(ConfigurationError, match=f"input 'hidden_states' is {found}; .* dense tensors on the CPU"):
        packaged(**{**call, "hidden_states": move(call["hidden_states"])})


def test_it_is_not_saved(several: Made, tmp_path: Path) -> None:
    packaged = fxquant.load_package(several[1])
    for save in (
        lambda: fxquant.save(packaged, tmp_path / "a"),
        lambda: packaged.save_pretrained(tmp_path / "a"),
        lambda: torch.save(packaged.state_dict(), tmp_path / "a"),
    ):
        with pytest.raises(ConfigurationError):
            save()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
def test_it_is_not_pickled(several: Made, write: Callable[[Any], Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot be pickled.*fxquant\.load_package\(folder\)"):
        write(fxquant.load_package(several[1]))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies_run_the_same_code(several: Made, duplicate: Callable[[Any], Any]) -> None:
    packaged = fxquant.load_package(several[1])
    twin = duplicate(packaged)
    expected = run(packaged)
    del packaged
    assert twin.config.num_layers == 1
    assert torch.equal(run(twin), expected)


def test_a_pipeline_does_not_leave_it_out(several: Made, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not saved but copied"):
        make_pipeline(fxquant.load_package(several[1])).save_pretrained(tmp_path)


def test_what_is_read_is_not_replaced(several: Made, tmp_path: Path) -> None:
    quantized, _ = several
    save_pipeline(make_pipeline(quantized), tmp_path / "a" / "q")
    for target, said in (("a/q", "is the input"), ("a", "or contains it"), ("a/q/compiled", "outside of it")):
        with pytest.raises(ConfigurationError, match=said):
            export_folder(tmp_path / "a" / "q", tmp_path / target, overwrite=True)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "graph-0.pt2", "graph-1.pt2", "package.json"])
@pytest.mark.parametrize("harm", [damage, Path.unlink], ids=["damaged", "missing"])
def test_files_that_are_not_whole(several: Made, tmp_path: Path, name: str, harm: Callable[[Path], Any]) -> None:
    folder = shutil.copytree(several[1], tmp_path / "package")
    harm(folder / name)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        fxquant.load_package(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"machine": {"torch": "1.0", "system": "Linux", "processor": "x86_64", "has": []}}, "compiled for torch 1.0"),
        ({"has": ["amx_fp8"]}, "a processor with amx_fp8, which this one lacks"),
        ({"machine": None}, "package.json"),
        ({"signature": [{"name": "x"}]}, "package.json"),
        ({"graphs": [{"call": {}}]}, "package.json"),
    ],
)
def test_a_package_for_another_machine_or_of_another_format(
    several: Made, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(several[1], tmp_path / "package")
    info = json.loads((folder / "package.json").read_text())
    info["machine"] |= {"has": change.pop("has")} if "has" in change else {}
    info |= change
    info["digest"] = files.digest_of(info)
    (folder / "package.json").write_text(json.dumps(info, indent=1) + "\n")
    with pytest.raises(CheckpointError, match=message):
        fxquant.load_package(folder)


def test_a_description_that_is_not_whole(several: Made, tmp_path: Path) -> None:
    folder = shutil.copytree(several[1], tmp_path / "package")
    info = json.loads((folder / "package.json").read_text())
    del info["packed"]
    info["digest"] = files.digest_of(info)
    (folder / "package.json").write_text(json.dumps(info, indent=1) + "\n")
    with pytest.raises(CheckpointError, match=r"package\.json.* at 'packed': field required"):
        fxquant.load_package(folder)


def test_a_graph_without_a_digest(several: Made, tmp_path: Path) -> None:
    folder = shutil.copytree(several[1], tmp_path / "package")
    info = json.loads((folder / "package.json").read_text())
    del info["files"]["graph-1.pt2"]
    info["digest"] = files.digest_of(info)
    (folder / "package.json").write_text(json.dumps(info, indent=1) + "\n")
    with pytest.raises(CheckpointError, match=r"graph-1\.pt2 is damaged"):
        fxquant.load_package(folder)


def test_folders_of_the_other_kind(several: Made, tmp_path: Path) -> None:
    quantized, folder = several
    with pytest.raises(CheckpointError, match=r"fxquant\.load_package reads it"):
        fxquant.load(folder)
    fxquant.save(quantized, tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="is not an fxquant package"):
        fxquant.load_package(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="there is no folder"):
        fxquant.load_package(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="exists"):
        fxquant.export_aot(quantized, folder)
    with pytest.raises(CheckpointError, match="more than a checkpoint"):
        fxquant.export_aot(quantized, tmp_path / "checkpoint", overwrite=True)


def test_what_cannot_be_exported(several: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, _ = several
    with pytest.raises(ConfigurationError, match=r"fxquant\.compile made"):
        fxquant.export_aot(make_dit(), tmp_path / "a")
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(CompilerError, match="g\\+\\+"),
    ):
        fxquant.export_aot(quantized, tmp_path / "a")
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_, **__: 1 / 0)
    with pytest.raises(CompilerError, match="cannot be compiled ahead of time: division by zero"):
        fxquant.export_aot(quantized, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_is_wrong(several: Made, tmp_path: Path) -> None:
    for arguments, message in (
        (("export", tmp_path / "nothing", tmp_path / "out", "--aot"), "there is no folder"),
        (("export", several[1], tmp_path / "out", "--aot"), "load_package reads it"),
        (("export", several[1], tmp_path / "out"), "pass --aot"),
    ):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 2
        assert message in result.stderr.replace("\n", " ")


# --- parts ----------------------------------------------------------------------------------------------------------


def test_lifted_graphs_hold_no_tensors_and_say_the_same(several: Made) -> None:
    quantized, _ = several
    captured = quantized.captured[0]
    module = lifted(captured.module)
    assert not [node for node in module.graph.nodes if node.op == "get_attr"]
    assert count(module, torch.ops.fxquant.convolution.default) == 1
    call = captured.inputs([*inputs().values(), None, True])
    with torch.no_grad():
        assert torch.equal(module(*call, *fxquant.ir.tensors.read_tensors(captured.module).values())[0], run(quantized))


def test_signatures_are_written_and_read() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor, /, y: float = 2.5, *, z: Any = object, **others: Any) -> None: ...

    signature = inspect.signature(Odd().forward)
    again = signature_from_json(json.loads(json.dumps(signature_to_json(signature))))
    assert str(again) == "(x, /, y=2.5, *, z=None, **others)"


def test_ops_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    native = fxquant.pipeline.backend.resolve_backend("native")
    native.make_ready(["fxquant::quantize", "fxquant_native::linear", "fxquant_native::quantize"])
    with pytest.raises(BackendError, match="fxquant_native::unheard_of has no kernel here"):
        native.make_ready(["fxquant_native::unheard_of"])
    monkeypatch.setattr("fxquant.backends.native.machine.missing_kernels", lambda: "there is no compiler")
    with pytest.raises(BackendError, match="there are none here: there is no compiler"):
        native.make_ready(["fxquant_native::vnni_linear"])


def test_layouts_that_no_backend_writes() -> None:
    class Backend(fxquant.pipeline.backend.Backend):
        name = "none"

    with pytest.raises(BackendError, match="does not define how"):
        Backend.to_plain(Backend, torch.ones(2, 2).to_mkldnn())
