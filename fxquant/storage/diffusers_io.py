"""Read and write the folders of whole diffusers pipelines.

A quantized pipeline is an ordinary diffusers folder. The part that was quantized, usually ``transformer/``, holds an
fxquant checkpoint. ``model_index.json`` still names the original class.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant.capture.rebuilding import LIBRARIES
from fxquant.disk.files import dtype_name, share
from fxquant.disk.folders import mention_leftovers, no_folder, whole_folder
from fxquant.errors import CheckpointError, ConfigurationError, FxquantError
from fxquant.memory.bound import place_weights
from fxquant.planning.plan import PLAN_FILE
from fxquant.runtime.devices import usable_device
from fxquant.runtime.drop_in import DropIn
from fxquant.runtime.model import GraphModel
from fxquant.runtime.parts import is_savable, quantized_models, quantized_parts
from fxquant.runtime.wrappers import unwrapped
from fxquant.storage.aot.model import PACKAGE_FILE, PackagedModel
from fxquant.storage.aot.package import load_package
from fxquant.storage.card import CARD_FILE, pipeline_card
from fxquant.storage.checkpoint import load, save
from fxquant.storage.float_weights import check_numbers, check_shards, mapped_parts
from fxquant.storage.load_options import check_dtypes, default_dtype, device_of_map, dtype_for, dtype_option
from fxquant.storage.part_names import dtype_in
from fxquant.storage.pipeline_folders import INDEX_FILE, parts_of, read_index, refuse_existing
from fxquant.storage.weights import other_variants, variant_of
from fxquant.text import printable


def load_pipeline(
    source: str | Path, *, device: str | torch.device = "cpu", trust_packages: bool = False, **options: Any
) -> Any:
    """Read a diffusers pipeline, quantized or not.

    Only parts that ``model_index.json`` names are read.

    Args:
        source: A folder that diffusers, :func:`save_pipeline` or ``fxquant export`` wrote, or a name on the Hugging
            Face Hub. A quantized pipeline is read from a folder; its float weights are neither needed nor made.
        device: The device to run on. Quantized parts are read directly to it, because kernels differ between devices.
        trust_packages: Load packages. They are programs and run as soon as they are loaded. Checkpoints hold no code.
        options: Passed to ``from_pretrained`` of the pipeline: for example ``torch_dtype`` or ``dtype``, by default the
            dtype of the quantized part, which is converted to another one as ``.to(dtype)`` does; ``variant``;
            ``device_map``, which names one device; or a part by its name, which is then not read from ``source`` and
            may be quantized.

    Returns:
        The ``DiffusionPipeline``, in evaluation mode.

    Raises:
        CheckpointError: If there is no such pipeline, a part of it is damaged, or a part is a package and
            ``trust_packages`` is not given.
        ConfigurationError: If there is no such device here, a package runs on another device, a quantized part that is
            given has another dtype than the requested one, no quantized part computes in that dtype, or ``device_map``
            spreads the parts over devices. Nothing is read before this is checked.
        BackendError: If the backend of a quantized part does not run on the device.
    """
    mapped = device_of_map(options.pop("device_map", None))
    folder, device = Path(source), usable_device(device if mapped is None else mapped)
    if not folder.is_dir():
        if folder.exists() or not _like_hub_name(str(source)):
            missing = no_folder(folder)
            raise CheckpointError(f"{missing}; give a folder of a diffusers pipeline, or a name on the hub, owner/name")
    elif not (folder / INDEX_FILE).is_file():
        raise CheckpointError(f"{folder} is not a pipeline, because it has no {INDEX_FILE}: {_what_it_is(folder)}")
    mention_leftovers(folder)
    names = [name for name in parts_of(folder) if name not in options] if folder.is_dir() else []
    packages = [name for name in names if (folder / name / PACKAGE_FILE).is_file()]
    checkpoints = [name for name in names if (folder / name / PLAN_FILE).is_file()]
    kind = _pipeline_class(folder)
    if not options.get("trust_remote_code"):  # Pipeline code from others may take parts that are not known here.
        _refuse_no_parts(folder, {*packages, *checkpoints}, kind)
    if packages and not trust_packages:
        raise CheckpointError(
            f"{folder / packages[0]} is a package, a program that would run here as soon as it is loaded. If you trust "
            "its author, pass trust_packages=True, or --allow-packages to fxquant generate"
        )
    if packages and device.type != "cpu":
        raise ConfigurationError(f"{folder} holds a package compiled for the CPU; give device 'cpu', not '{device}'")
    read: dict[str, GraphModel | PackagedModel] = {
        name: options.pop(name) for name, part in [*options.items()] if isinstance(part, (GraphModel, PackagedModel))
    }
    held = {name: dtype for name in names if (dtype := dtype_in(folder / name)) is not None}
    check_dtypes([*checkpoints, *held], read, options)
    read |= {name: _read_part(folder, name, device, options) for name in checkpoints}
    read |= {name: load_package(folder / name) for name in packages}
    if options.get("dtype") is None and options.get("torch_dtype") is None:
        options |= default_dtype({name: model.dtype for name, model in read.items()}, held)
    # diffusers accepts only classes that it knows, so it gets the originals without weights. Their config is the same.
    index = read_index(folder) if folder.is_dir() else {}
    stand_ins = {name: _stand_in(model, index.get(name)) for name, model in read.items()}
    others = [name for name in names if name not in read]
    for name in others:
        check_shards(folder / name)
        check_numbers(folder / name)
    try:
        with mapped_parts(folder, others, options) as ready:
            pipe = kind.from_pretrained(source, **{**_absent_parts(folder, kind), **stand_ins, **ready, **options})
    except FxquantError:
        raise
    except Exception as error:
        reason = _first_line(error) + other_variants(folder, options.get("variant"))
        raise CheckpointError(f"diffusers cannot read a pipeline from {source}: {reason}") from error
    for name, model in read.items():
        setattr(pipe, name, model)
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and not isinstance(part, DropIn):
            place_weights(part, torch.device("cpu"))
    return pipe if device.type == "cpu" else pipe.to(device)


def _read_part(pipeline: Path, name: str, device: torch.device, options: Mapping[str, Any]) -> GraphModel:
    """Read a checkpoint. Parts of a pipeline that have no variant are read without it, as in diffusers."""
    folder = pipeline / name
    held = variant_of(path.name for path in folder.iterdir())
    variant = None if held is None else options.get("variant")
    return load(folder, device=device, variant=variant, dtype=dtype_for(name, dtype_option(options)))


def _pipeline_class(folder: Path) -> Any:
    """The class of a pipeline.

    ``DiffusionPipeline`` also finds it, but reads optional parts of that class again although they are passed to it.
    """
    import diffusers

    name = read_index(folder).get("_class_name") if folder.is_dir() else None
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    is_pipeline = isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)
    return found if is_pipeline else diffusers.DiffusionPipeline


def _refuse_no_parts(folder: Path, names: Collection[str], kind: Any) -> None:
    """Refuse quantized parts that a pipeline of this class does not take.

    Parts are passed to ``from_pretrained`` by their names: a part named ``trust_remote_code`` would let code run.
    """
    known = inspect.signature(kind.__init__).parameters
    for name in sorted(names):
        if name == "self" or name not in known:
            wanted = read_index(folder).get("_class_name")
            raise CheckpointError(
                f"{folder / INDEX_FILE} says that a {printable(str(wanted), 100)} has a part {printable(name, 100)!r}, "
                "but the installed diffusers has no such pipeline; install the diffusers version that it was written "
                "with, or copy the pipeline again"
            )


def _absent_parts(folder: Path, kind: Any) -> dict[str, None]:
    """The parts that a pipeline was saved without; diffusers requires them to be passed as None again."""
    known = inspect.signature(kind.__init__).parameters
    index = read_index(folder) if folder.is_dir() else {}
    return {name: None for name, entry in index.items() if entry == [None, None] and name in known}


def _stand_in(model: GraphModel | PackagedModel, entry: Any) -> Any:
    if isinstance(entry, list) and str(entry[0]).startswith("fxquant"):  # From the pipeline's own save_pretrained.
        return model
    return model.skeleton() if isinstance(model, PackagedModel) else model.architecture.skeleton


def save_pipeline(
    pipe: Any,
    folder: str | Path,
    *,
    overwrite: bool = False,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write a pipeline with its quantized parts to a folder, either completely or not at all.

    Args:
        pipe: A ``DiffusionPipeline`` with at least one part that :func:`fxquant.compile` made.
        folder: The folder to write; it is created, with its parents.
        overwrite: Replace a quantized pipeline that is already there. Nothing else is ever replaced: neither float
            pipelines nor folders with other files in them.
        variant: Part of the file names of the weights, such as ``fp16``.
        max_shard_size: The most bytes of one file of weights, or a text such as ``"5GB"``; by default that of each
            part's class.

    Raises:
        ConfigurationError: If no part is quantized, or a part cannot be saved so that :func:`load_pipeline` reads it.
        CheckpointError: If the folder exists and ``overwrite`` is not given, or holds something else.
        WriteError: If the disk is full, the folder cannot be written, or another process wrote there in the meantime;
            existing files stay.
    """
    parts = _parts(pipe)
    quantized = {name for name, part in parts.items() if isinstance(part, GraphModel)}
    if not quantized_models(parts):
        raise ConfigurationError(
            f"no part of this {type(pipe).__name__} is quantized; set pipe.transformer = fxquant.compile(...) first, "
            "or use its own save_pretrained"
        )
    for name, part in parts.items():
        _refuse_unreadable(pipe, name, part)
    with whole_folder(Path(folder).resolve(), lambda path: refuse_existing(path, overwrite)) as written:
        options = {"variant": variant, "max_shard_size": max_shard_size}
        options = {name: value for name, value in options.items() if value is not None}
        for name, part in parts.items():
            if name in quantized or quantized_parts(part):
                save(part, written / name, **options)  # type: ignore[arg-type]
            elif callable(getattr(part, "save_pretrained", None)):
                known = inspect.signature(part.save_pretrained).parameters
                part.save_pretrained(written / name, **{key: options[key] for key in options.keys() & known.keys()})
                share(*(written / name).rglob("*.safetensors"))
            else:
                raise ConfigurationError(f"part {name!r} of the pipeline, a {type(part).__name__}, cannot be saved")
        _write_index(pipe, parts, quantized, written)
        _forget_origin(written)
        models = sorted(quantized_models(parts).items())
        dtypes = {path: dtype_name(model.dtype) for path, model in models}
        plans = {path: model.plan for path, model in models if model.plan is not None}
        card = pipeline_card(type(pipe).__name__, plans, dtypes)
        (written / CARD_FILE).write_text(card, encoding="utf-8")


def _what_it_is(folder: Path) -> str:
    """Describe what a folder without a pipeline index holds, and what reads it."""
    if (folder / PLAN_FILE).is_file():
        return "it holds one quantized model, which fxquant.load reads; a pipeline is the folder around it"
    if (folder / PACKAGE_FILE).is_file():
        return "it holds one packaged model, which fxquant.load_package reads; a pipeline is the folder around it"
    if (folder / "config.json").is_file():
        return (
            "it holds one float model, which its class reads with from_pretrained; a pipeline is the folder around it"
        )
    return "it is not what DiffusionPipeline.save_pretrained or fxquant.save_pipeline wrote"


def _refuse_unreadable(pipe: Any, name: str, part: Any) -> None:
    """Refuse to write a part that could not be read back.

    Raises:
        ConfigurationError: If its class is from neither diffusers nor transformers, or a module in it is quantized.
    """
    from diffusers import pipelines
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    quantized = isinstance(part, GraphModel)
    inner = [] if quantized or not isinstance(part, nn.Module) else part.named_modules()
    known = quantized_parts(part) if is_savable(part) else {}
    path = next((path for path, module in inner if isinstance(module, DropIn) and path not in known), None)
    if path is not None:
        raise ConfigurationError(
            f"{path!r} in part {name!r} of the pipeline is quantized, and the class {type(part).__name__} could not "
            "read its codes back; put the float module back in its place. For a VAE, use fxquant.compile_parts or "
            "fxquant.compile_pipeline, whose results can be saved"
        )
    kind = type(part.architecture.skeleton if quantized else part)
    library = kind.__module__.partition(".")[0] if quantized else str(pipe.config[name][0])
    readable = library in LIBRARIES if quantized else library in LOADABLE_CLASSES or hasattr(pipelines, library)
    if not readable:
        raise ConfigurationError(
            f"part {name!r} of the pipeline is a {kind.__name__} from {kind.__module__}, and reading the folder could "
            "not find that class: it is from neither diffusers nor transformers. Write only the quantized model with "
            "fxquant.save(pipe.transformer, folder), and build the pipeline around it in your own code"
        )


def _parts(pipe: Any) -> dict[str, Any]:
    """The parts that a pipeline has, without ``torch.compile`` wrappers."""
    parts = {name: part for name, part in pipe.components.items() if part is not None and _is_part(pipe, name)}
    return {name: unwrapped(part) for name, part in parts.items()}


def _is_part(pipe: Any, name: str) -> bool:
    return isinstance(pipe.config.get(name), (list, tuple))


def _write_index(pipe: Any, parts: Mapping[str, Any], quantized: set[str], folder: Path) -> None:
    pipe.save_config(folder)
    path = folder / INDEX_FILE
    index = json.loads(path.read_text(encoding="utf-8"))
    for name in quantized:
        original = type(parts[name].architecture.skeleton)
        # transformers knows no quantizers of others, so diffusers is to call the quantized model's own class.
        of_diffusers = original.__module__.startswith("diffusers.")
        index[name] = ["diffusers" if of_diffusers else "fxquant", (original if of_diffusers else GraphModel).__name__]
    words = getattr(pipe, "labels", None)
    if isinstance(words, dict) and words and "id2label" not in index:
        # DiTPipeline reads the names of classes, but does not write them.
        names: dict[str, list[str]] = {}
        for word, label in words.items():
            names.setdefault(str(label), []).append(word)
        index["id2label"] = {label: ", ".join(names[label]) for label in sorted(names, key=int)}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _forget_origin(folder: Path) -> None:
    """Remove the paths that the parts were read from: they are local to this machine and useless elsewhere."""
    for path in (folder / INDEX_FILE, *folder.glob("*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _like_hub_name(text: str) -> bool:
    owner, slash, name = text.partition("/")
    return bool(owner and slash and name) and "/" not in name and not text.startswith((".", "~"))


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    _, found, kind = text.rpartition(" is of type: ")  # Before it stand all modules of the part.
    return f"a part that was given is of type {kind}" if found else text.partition("\n")[0] or type(error).__name__
