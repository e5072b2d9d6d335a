"""Checkpoints: ``config.json``, ``plan.json`` and safetensors. No pickle, no float weights, no torch version.

``plan.json`` holds the digest of every other file and of itself, so that a damaged checkpoint is refused, not run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant.capture.rebuilding import config_text
from fxquant.disk.files import (
    blaming,
    check_digests,
    digest,
    digest_of,
    dtype_name,
    refuse_to_replace,
)
from fxquant.disk.folders import whole_folder
from fxquant.errors import BackendError, CalibrationError, CaptureError, CheckpointError
from fxquant.memory.mappings import trim
from fxquant.pipeline.backend import Backend, resolve_backend
from fxquant.planning.attribution import ATTRIBUTION_FILE
from fxquant.planning.plan import PLAN_FILE, VECTORS_FILE, Plan
from fxquant.runtime.converting import converted
from fxquant.runtime.given import quantized_model
from fxquant.runtime.model import GraphModel
from fxquant.runtime.parts import is_savable, quantized_parts
from fxquant.runtime.replay import bind_all, lower_all, model_from_plan
from fxquant.schemas.common import LARGEST_FILE, check
from fxquant.schemas.config import Config
from fxquant.schemas.plan import CheckpointFile
from fxquant.storage.adapters import ADAPTERS_FILE, read_adapters, write_adapters
from fxquant.storage.agreement import (
    check_factors,
    check_finite,
    check_grids,
    check_headers,
    infinite_in,
)
from fxquant.storage.aot.model import CONFIG_FILE
from fxquant.storage.card import CARD_FILE, is_own_card, model_card
from fxquant.storage.load_options import place_and_device
from fxquant.storage.part_names import parts_in
from fxquant.storage.same_model import compare_graphs, other_dtypes, versions, why_not_rebuilt
from fxquant.storage.skeleton import QUANT_METHOD, QUANTIZATION, description_of, read_plan
from fxquant.storage.weights import (
    SHARD_SIZE,
    is_weights_file,
    load_weights,
    variant_of,
    weight_names,
    write_weights,
)

_DIGESTED = (CONFIG_FILE, VECTORS_FILE)  # And the files of tensors.
_FILES = (PLAN_FILE, *_DIGESTED, ATTRIBUTION_FILE, ADAPTERS_FILE)
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def is_checkpoint_file(path: Path) -> bool:
    """Whether a file belongs to a checkpoint, by its name. A model card does if nobody edited it."""
    return path.name in _FILES or is_weights_file(path.name) or (path.name == CARD_FILE and is_own_card(path))


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    overwrite: bool = False,
    needs_model: bool = False,
    variant: str | None = None,
    max_shard_size: int | str = SHARD_SIZE,
) -> None:
    """Write a quantized model to a folder, either completely or not at all.

    A checkpoint holds no code: :func:`load` builds the model from its class and its config. Before anything is written,
    this function checks that loading gives the same graphs. Your own models whose class has no ``from_config`` are
    always loaded with ``model=``.

    Args:
        model: What :func:`fxquant.compile` or :func:`fxquant.compile_parts` returned.
        folder: The folder to write; it is created, with its parents.
        overwrite: Replace a checkpoint that is already there. Folders with anything else in them are never replaced.
        needs_model: Write the model even if its class and config do not give the model that was compiled. Reading it
            then needs the float model, made as it was for compilation: ``load(folder, model=...)``.
        variant: Part of the names of the files of tensors, such as ``fp16``, as in diffusers. A folder holds one.
        max_shard_size: The most bytes of one file of tensors, or a text such as ``"5GB"``. More tensors are written to
            several files with an index.

    Raises:
        ConfigurationError: If the model is not quantized, or ``variant`` or ``max_shard_size`` cannot be used.
        CheckpointError: If the folder exists and ``overwrite`` is not given, or holds other files; or if loading would
            build another model. Then the message says what differs.
        WriteError: If the disk is full, the folder cannot be written, or another process wrote there in the meantime;
            existing files stay.
    """
    if quantized_parts(model) or is_savable(model):
        from fxquant.storage.parts import save_model  # It writes checkpoints of the parts.

        save_model(model, folder, overwrite=overwrite, variant=variant, max_shard_size=max_shard_size)
        return
    model, plan = quantized_model(model, "save")
    with whole_folder(Path(folder).resolve(), lambda path: refuse_existing(path, overwrite, variant)) as written:
        difference = why_not_rebuilt(model)
        if difference is not None and not needs_model:
            raise CheckpointError(
                f"loading would not build this {type(model.architecture.skeleton).__name__} again from its class and "
                f"config: {difference}. Undo that before fxquant.compile, or write it with fxquant.save(model, folder, "
                "needs_model=True) and read it with fxquant.load(folder, model=...), passing the float model"
            )
        _write(model, plan, written, difference, variant, max_shard_size)


def refuse_existing(folder: Path, overwrite: bool, variant: str | None = None) -> None:
    """Refuse to write a checkpoint over something that must stay.

    Raises:
        CheckpointError: If the path is a file, a folder that is not empty while ``overwrite`` is not given, or a folder
            that holds anything other than a checkpoint, or a checkpoint of another variant.
    """
    refuse_to_replace(folder, overwrite, is_checkpoint_file, PLAN_FILE)
    held = [path.name for path in folder.iterdir() if is_weights_file(path.name)] if folder.is_dir() else []
    if held and variant_of(held) != variant:
        raise CheckpointError(
            f"{folder} holds the variant {variant_of(held)!r}, and the variant {variant!r} would replace it, because "
            "a folder holds one plan; choose another folder for each variant"
        )


def _write(
    model: GraphModel, plan: Plan, folder: Path, difference: str | None, variant: str | None, max_shard_size: int | str
) -> None:
    (folder / CONFIG_FILE).write_text(_config_text(model, plan), encoding="utf-8")
    tensors = model.stored_tensors()
    check_finite(tensors, None)  # Loading would refuse NaN.
    weights = write_weights(tensors, folder, plan.model_class, variant, max_shard_size)
    adapters = write_adapters(model, folder)
    plan.save(folder)
    data = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
    data["dtype"] = dtype_name(model.dtype)
    data["dtypes"] = {name: dtype_name(dtype) for name, dtype in other_dtypes(model).items()}
    data["infinite"] = infinite_in(tensors)
    data["digests"] = [captured.digest for captured in model.lasting]
    data["made_with"] = versions()
    if difference is not None:
        data["needs_model"] = difference
    written = [*_DIGESTED, *weights]
    if adapters is not None:
        data["adapters"] = adapters
        written.append(ADAPTERS_FILE)
    data["files"] = {name: digest(folder / name) for name in sorted(written)}
    data["digest"] = digest_of(data)
    text = _plan_text(data)
    check(CheckpointFile, data, "what would be saved")
    if difference is None:
        check(Config, json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")), "the model's config")
    if len(text.encode()) > LARGEST_FILE:
        raise CheckpointError(f"the plan takes more than {LARGEST_FILE} bytes, which fxquant.load would not read")
    (folder / PLAN_FILE).write_text(text, encoding="utf-8")
    card = model_card(plan, data["dtype"], {"fxquant": version("fxquant"), **data["made_with"]}, data["files"])
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _config_text(model: GraphModel, plan: Plan) -> str:
    """The content of ``config.json``, with the entry from which diffusers knows who reads the tensors."""
    config = json.loads(config_text(model.architecture.skeleton))
    config[QUANTIZATION] = {
        "quant_method": QUANT_METHOD,
        "backend": plan.backend,
        "dtype": dtype_name(model.dtype),
        "recipe": plan.recipe,
        "version": version("fxquant"),
    }
    return json.dumps(config, indent=2) + "\n"


def load(
    folder: str | Path,
    *,
    backend: str | Backend | None = None,
    device: str | torch.device = "cpu",
    model: nn.Module | type[nn.Module] | None = None,
    variant: str | None = None,
    **options: Any,
) -> Any:
    """Read a quantized model back. Float weights are neither needed nor made.

    Args:
        folder: What :func:`save` wrote.
        backend: A backend other than the one that the model was compiled for.
        device: The device for the tensors.
        model: For a model that is not from diffusers: its class (with ``from_config``), or an instance of it.
        variant: The variant that the files must have, such as ``fp16``; by default the one that they have.
        options: Options of ``from_pretrained`` in diffusers, which mean the same: ``subfolder``, ``torch_dtype`` or
            ``dtype``, ``device_map``, ``low_cpu_mem_usage`` and ``use_safetensors``. A dtype other than that of the
            checkpoint converts the model as ``.to(dtype)`` does. See
            :func:`fxquant.storage.load_options.place_and_device`.

    Returns:
        A :class:`~fxquant.runtime.model.GraphModel`; for a VAE an object of its class with quantized parts.

    Raises:
        CheckpointError: If a file is missing, damaged, unsafe, of a newer format or from another model.
        UnknownNameError: If there is no such backend.
        BackendError: If the backend cannot run the model.
        ConfigurationError: If ``model`` is neither a class with ``from_config`` nor a model in evaluation mode, went
            through ``torch.compile`` or has hooks; or if there is no such device here.
        AlreadyCompiledError: If fxquant made ``model``.
    """
    folder, device, wanted = place_and_device(folder, device, options)
    if parts_in(folder):
        from fxquant.storage.parts import load_model  # It reads checkpoints of the parts.

        return load_model(folder, device=device, backend=backend, model=model, variant=variant, dtype=wanted)
    runner = None if backend is None else resolve_backend(backend)
    data = read_plan(folder)
    _refuse_pickles(folder)
    with blaming(folder / PLAN_FILE):
        weights = [folder / name for name in weight_names(data.get("files") or (), variant)]
    indices = [name for name in data["files"] if is_weights_file(name)]
    check_digests(folder, sorted({*_DIGESTED, *indices}), data["files"], PLAN_FILE)
    found = description_of(folder, data)
    plan, dtype = found.plan, found.dtype
    with blaming(folder / PLAN_FILE):
        runner = resolve_backend(plan.backend) if runner is None else runner
        check_headers(plan, found.headers)
        check_factors(plan)
    runner = runner.on(device)
    runner.check_device(device)
    plan.backend = runner.name
    _check_runs(runner, plan, device, folder)
    architecture = found.build(model)
    with blaming(folder / PLAN_FILE):
        try:
            quantized = model_from_plan(architecture, plan, runner, dtype, device)
        except CalibrationError as error:
            raise CheckpointError(f"{error.reason}. {_other_model(plan, model)}") from error
        except CaptureError as error:
            raise CheckpointError(
                f"a recorded call cannot be traced: {error.reason}. {_other_model(plan, model)}"
            ) from error
        compare_graphs(quantized, data, model)
    tensors = load_weights(weights, device)
    with blaming(weights[0]):
        check_finite(tensors, data.get("infinite"))
        for captured in quantized.captured:
            check_grids(captured.module, tensors)
        bind_all(quantized, tensors)
    if wanted not in (None, dtype):
        quantized = converted(quantized, wanted, device, tensors)
    else:
        tensors.clear()  # Frees each tensor as soon as the backend has converted it.
        lower_all(quantized)
    if data.get("adapters") is not None:
        check_digests(folder, [ADAPTERS_FILE], data["files"], PLAN_FILE)
        read_adapters(quantized, folder, data["adapters"])
    trim()
    return quantized


def _check_runs(runner: Backend, plan: Plan, device: torch.device, folder: Path) -> None:
    """Refuse a checkpoint that the backend cannot run on the device.

    Raises:
        BackendError: Lists the layers, and says with which backend and where the checkpoint can be loaded.
    """
    try:
        runner.check(plan)
    except BackendError as error:
        others = sorted((runner.devices or frozenset()) - {device.type})
        elsewhere = f", or on a device that has their products (device={' or '.join(map(repr, others))})"
        raise BackendError(
            f"{error}\nOn {device.type}, load the checkpoint with fxquant.load({str(folder)!r}, backend='fake-quant'), "
            f"whose reference ops run all layers, slowly{elsewhere if others else ''}"
        ) from None


def _other_model(plan: Plan, model: Any) -> str:
    """Why a checkpoint and the model that it is loaded into may differ, and what to do."""
    if model is not None:
        return "model= is another model than the one that was quantized; pass the one that was quantized"
    return (
        "Either the checkpoint was edited, or modules of the model were replaced or shared after it was built, or "
        f"the installed diffusers builds a {plan.model_class.partition(':')[2]} differently from the version that it "
        "was quantized with. Pass a model that is built as it was then: fxquant.load(folder, model=...)"
    )


def _refuse_pickles(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _PICKLES:
            raise CheckpointError(
                f"{path} is a pickle, which can run code when read; fxquant writes none. "
                "Remove it if you trust the rest"
            )


def _plan_text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1) + "\n"
