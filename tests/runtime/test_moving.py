"""Moving and offloading a model, its memory, and what of it is refused before anything changes."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import fxquant
from fxquant.errors import ConfigurationError
from fxquant.planning.plan import tensor_bytes
from fxquant.runtime.model import GraphModel
from tests.runtime import second_device
from tests.tiny import calibrate, make_dit, make_pipeline, run

pytestmark = pytest.mark.usefixtures("torchao_on_any_processor")
CPU = torch.device("cpu")
CHECKS = [name.removeprefix("check_") for name in vars(second_device) if name.startswith("check_")]
SLOW = {"accelerate_offload", "every_recipe", "loras", "pipelines"}
BACKENDS = ("fake-quant", "native", "native{kernels=onednn}", "torchao")


@pytest.fixture(scope="module")
def quantized() -> GraphModel:
    model = make_dit()
    return fxquant.compile(model, recipe="ptq4dit-w4a8", calibrate=calibrate(model), measure=0)


# --- a second device ---


def outcomes(names: list[str]) -> dict[str, str | None]:
    """The errors of checks that run in a process with a second device."""
    command = [sys.executable, "-m", "tests.runtime.second_device", *names]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def quick() -> dict[str, str | None]:
    return outcomes([name for name in CHECKS if name not in SLOW])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHECKS if name not in SLOW])
def test_on_a_second_device(name: str, quick: dict[str, str | None]) -> None:
    assert quick[name] is None, quick[name]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", sorted(SLOW))
def test_slowly_on_a_second_device(name: str) -> None:
    found = outcomes([name])
    assert found[name] is None, found[name]


# --- offloading on one device ---


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_offloaded(backend: str) -> None:
    model = make_dit()
    ours = fxquant.compile(model, recipe="rtn-w8a8", backend=backend, calibrate=calibrate(model), measure=0)
    expected, other = run(ours), run(copy.deepcopy(ours), size=4)
    ours.enable_group_offload("cpu", offload_type="leaf_level")
    assert torch.equal(run(ours), expected)
    assert torch.equal(run(ours, size=4), other)
    ours.disable_group_offload()
    accelerate.cpu_offload(ours, CPU)
    assert torch.equal(run(ours), expected)
    accelerate.hooks.remove_hook_from_module(ours, recurse=True)
    _, hook = accelerate.cpu_offload_with_hook(ours, CPU)
    assert torch.equal(run(ours), expected)
    hook.remove()
    assert torch.equal(run(ours), expected)
    assert ours.state_dict().keys() == copy.deepcopy(ours).state_dict().keys()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_stream": True}, "use_stream=True does not work"),
        ({"record_stream": True}, "record_stream=True"),
        ({"offload_to_disk_path": "somewhere"}, "offload_to_disk_path='somewhere'"),
        ({"exclude_kwargs": "mask"}, "exclude_kwargs='mask'"),
        ({"offload_type": "rows"}, "offload_type='rows' is not known"),
        ({"offload_device": "cuda"}, "offloaded to the CPU, not to cuda"),
        ({"onload_device": "abacus"}, "device 'abacus' cannot be used here"),
    ],
)
def test_options_of_group_offload(quantized: GraphModel, options: dict[str, Any], said: str) -> None:
    expected = run(quantized)
    with pytest.raises(ConfigurationError, match=said):
        quantized.enable_group_offload(**{"onload_device": "cpu", **options})
    assert torch.equal(run(quantized), expected)


def test_offload_to_files_is_refused_and_changes_nothing(quantized: GraphModel, tmp_path: Path) -> None:
    expected = run(quantized)
    with pytest.raises(ConfigurationError, match=r"offloaded to files.*accelerate\.cpu_offload"):
        accelerate.disk_offload(quantized, tmp_path, CPU)
    accelerate.hooks.remove_hook_from_module(quantized, recurse=True)
    assert torch.equal(run(quantized), expected)
    assert not any(tensor.is_meta for tensor in quantized.tensors().values())


def test_a_device_map_with_several_devices_is_refused(quantized: GraphModel) -> None:
    expected = run(quantized)
    names = list(quantized.state_dict())
    where = {name: "cpu" if number else "disk" for number, name in enumerate(names)}
    with pytest.raises(ConfigurationError, match="a device map with several cannot spread it"):
        accelerate.dispatch_model(quantized, where, offload_index={names[0]: {}})
    accelerate.hooks.remove_hook_from_module(quantized, recurse=True)
    accelerate.dispatch_model(quantized, {"": "cpu"})
    assert torch.equal(run(quantized), expected)


def test_a_pipeline_runs_on_after_a_refusal(quantized: GraphModel) -> None:
    pipe = make_pipeline(quantized)

    def image() -> Any:
        return pipe(class_labels=[1], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]

    expected = image()
    with pytest.raises(ConfigurationError, match="use_stream"):
        pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level", use_stream=True)
    assert image() == expected
    pipe.to(torch.float32)
    assert image() == expected


# --- memory ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_float_weight_stays(backend: str) -> None:
    model = make_dit(layers=2)
    before = model.get_memory_footprint()
    ours = fxquant.compile(model, recipe="rtn-w4a8", backend=backend, calibrate=calibrate(model), measure=2)
    assert ours.plan is not None
    weights = dict(model.named_parameters())
    quantized = {f"{name}.weight" for name, layer in ours.plan.layers.items() if layer.weight_bits is not None}
    held = [StorageWeakRef(weights[name].untyped_storage()) for name in quantized & weights.keys()]  # No later uses.
    assert len(held) > 16 and not any(ref.expired() for ref in held)
    del model, weights
    gc.collect()
    assert all(ref.expired() for ref in held)
    assert ours.get_memory_footprint() < before / 2


def test_the_size_is_that_of_the_quantized_model(quantized: GraphModel) -> None:
    model = make_dit()
    assert quantized.num_parameters() == model.num_parameters()
    assert quantized.get_memory_footprint() == tensor_bytes(quantized.tensors())
    assert quantized.get_memory_footprint() < model.get_memory_footprint() / 2
    assert quantized.get_memory_footprint(return_buffers=False) <= quantized.get_memory_footprint()


def test_shared_memory(quantized: GraphModel) -> None:
    ours = copy.deepcopy(quantized)
    assert ours.share_memory() is ours
    assert all(tensor.is_shared() for tensor in ours.tensors().values())
    assert torch.equal(run(ours), run(quantized))
    model = make_dit()
    opaque = fxquant.compile(
        model, recipe="rtn-w8a8", backend="native{kernels=onednn}", calibrate=calibrate(model), measure=0
    )
    with pytest.raises(ConfigurationError, match="is in the layout of a kernel and cannot be in shared memory"):
        opaque.share_memory()
    assert not any(t.is_shared() for t in opaque.tensors().values() if t.layout is torch.strided)
