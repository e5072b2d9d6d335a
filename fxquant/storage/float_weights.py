"""Float weights of a pipeline before diffusers reads them: shards that fit together, and a dtype that maps files.

diffusers leaves weights in the files that it maps if they have the dtype that is asked for, and otherwise converts them
in memory. While memory is bounded, they are converted into files instead.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxquant.disk.files import blaming
from fxquant.errors import CheckpointError, WriteError
from fxquant.memory.bound import current
from fxquant.schemas.common import read_json
from fxquant.storage.agreement import check_config, read_headers
from fxquant.storage.load_options import dtype_for, dtype_option
from fxquant.storage.pipeline_folders import read_index
from fxquant.storage.weights import variant_of
from fxquant.text import printable

_SHOWN = 200  # Characters of an error that a message shows.
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_shards(folder: Path) -> None:
    """Refuse a folder whose shards do not hold the tensors that their index lists.

    Raises:
        CheckpointError: Names the shard that is missing, or that belongs to another model.
    """
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        listed: dict[str, set[str]] = {}
        try:
            for name, shard in read_json(index, "pipeline")[1]["weight_map"].items():
                listed.setdefault(shard, set()).add(name)
        except (KeyError, AttributeError, TypeError) as error:
            reason = printable(repr(error), _SHOWN)
            raise CheckpointError(f"{index} cannot be read as an index of shards: {reason}; copy it again") from error
        for shard, names in sorted(listed.items()):
            path = folder / shard
            if Path(shard).name != shard or not path.is_file():
                raise CheckpointError(
                    f"the shard {path} is missing: {index.name} lists {len(names)} tensors in it; copy it again"
                )
            differing = sorted(names ^ read_headers(path).keys())
            if differing:
                where = "lacks" if differing[0] in names else "also holds"
                raise CheckpointError(
                    f"the shard {path} belongs to another model than {index.name}: it {where} {differing[0]!r}; copy "
                    "all files of the model from one place"
                )


def check_numbers(folder: Path) -> None:
    """Refuse a part of a pipeline whose config states sizes that its weights cannot have: it would never be made.

    Raises:
        CheckpointError: Names the file and the number.
    """
    config, files = folder / "config.json", sorted(folder.glob("*.safetensors"))
    if config.is_file() and files:
        _, data = read_json(config, "pipeline")
        with blaming(config):
            check_config(data, {name: header for path in files for name, header in read_headers(path).items()})


@contextmanager
def mapped_parts(folder: Path, names: Collection[str], options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Parts of a pipeline whose dtype has to be converted, with weights in mapped files, while memory is bounded.

    Args:
        folder: The folder of the pipeline.
        names: Parts that diffusers is to read.
        options: The options of the caller, with ``dtype`` or ``torch_dtype``, and ``variant``.

    Yields:
        Models by name; none if memory is not bounded. The files have no names any more when the context ends.
    """
    bound, found = current(), {}
    if bound is not None:
        index = read_index(folder)
        for name in sorted(names):
            kind = _class(index.get(name))
            wanted = dtype_for(name, dtype_option(options))
            dtype = torch.float32 if wanted is None else wanted
            files = _files(folder / name, options.get("variant"))
            kept = getattr(kind, "_keep_in_fp32_modules", None) or ()
            if kind is None or not files or not _differs(files, dtype, kept):
                continue
            with tempfile.TemporaryDirectory(dir=bound.scratch.folder, prefix="fxquant-") as place:
                _convert(folder / name, files, Path(place), dtype, kept)
                given = {key: options[key] for key in ("variant",) if options.get(key) is not None}
                found[name] = kind.from_pretrained(place, torch_dtype=dtype, **given)
    yield found


def _class(entry: Any) -> Any:
    """The class of a part, if it is a model of diffusers."""
    import diffusers

    if not isinstance(entry, list) or entry[:1] != ["diffusers"]:
        return None
    found = getattr(diffusers, str(entry[1]), None)
    return found if isinstance(found, type) and issubclass(found, diffusers.ModelMixin) else None


def _files(folder: Path, variant: str | None) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    return [path for path in files if variant_of([path.name]) == variant]


def _dtype(name: str, dtype: torch.dtype, kept: Sequence[str]) -> torch.dtype:
    return torch.float32 if any(part in name.split(".") for part in kept) else dtype


def _differs(files: Sequence[Path], dtype: torch.dtype, kept: Sequence[str]) -> bool:
    pairs = ((name, _FLOATS.get(header.dtype)) for path in files for name, header in read_headers(path).items())
    return any(held not in (None, _dtype(name, dtype, kept)) for name, held in pairs)


def _convert(source: Path, files: Sequence[Path], place: Path, dtype: torch.dtype, kept: Sequence[str]) -> None:
    """Copy a model to a folder, in another dtype, tensor by tensor."""
    bound = current()
    assert bound is not None
    for path in source.glob("*.json"):
        shutil.copyfile(path, place / path.name)
    for path in files:
        converted: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if tensor.is_floating_point():
                    tensor = tensor.to(_dtype(name, dtype, kept))
                converted[name] = bound.keep(tensor)
        try:
            save_file(converted, place / path.name, metadata={"format": "pt"})
        except Exception as error:
            raise WriteError(f"{path} cannot be converted to {dtype} in {bound.scratch.folder}: {error}") from error
