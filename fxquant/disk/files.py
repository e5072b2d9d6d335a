"""What all folders that fxquant writes have in common: tensors in safetensors files, and a digest of every file.

Errors name the file that they are about.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxquant.errors import BackendError, CheckpointError, FxquantError
from fxquant.text import printable

_REASON = 2000  # The most characters per line of an error that a file causes.
_PART = 64 << 20  # Bytes of a file that are in memory at a time.


def refuse_to_replace(folder: Path, overwrite: bool, written: Callable[[Path], bool], mark: str) -> None:
    """Refuse to write to a folder if it already holds something that must not be replaced.

    Args:
        folder: Where to write.
        overwrite: Whether the content may be replaced if it consists only of files that would be written.
        written: Whether a file is one that would be written.
        mark: The file that identifies a folder as written by fxquant. Folders of other tools also have a
            ``config.json`` and a ``model.safetensors``.

    Raises:
        CheckpointError: If something must not be replaced; the message says what is there.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; choose another name for the folder")
    found = sorted(path.name for path in folder.iterdir())
    if not found:
        return
    if not overwrite:
        raise CheckpointError(f"{folder} exists; choose another folder or pass overwrite=True")
    others = [name for name in found if not (is_plain_file(folder / name) and written(folder / name))]
    if others:
        raise CheckpointError(
            f"{folder} holds more than a checkpoint ({few(others)}), which overwriting would delete; choose another "
            "folder"
        )
    if mark not in found:
        raise CheckpointError(
            f"{folder} holds {few(found)} and no {mark}, so fxquant did not write it and does not replace it; choose "
            "another folder, or remove it yourself"
        )


def is_plain_file(path: Path) -> bool:
    """Whether a path is a file and not a link to one."""
    return path.is_file() and not path.is_symlink()


def few(names: Sequence[str]) -> str:
    """The first three names of a list."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def write_tensors(tensors: Mapping[str, Tensor], path: Path, further: Mapping[str, str] | None = None) -> None:
    """Write tensors of any dtype, which may share memory, so that :func:`load_tensors` can read them.

    Args:
        tensors: The tensors by name.
        path: The file.
        further: Entries of the file's metadata.
    """
    pairs = [name for name, tensor in tensors.items() if tensor.is_complex()]  # Safetensors does not support them all.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    plain |= {name: torch.view_as_real(plain[name]) for name in pairs}
    metadata = {"format": "pt"} | ({"complex": json.dumps(pairs)} if pairs else {}) | dict(further or {})
    save_file(_unshared(plain), path, metadata=metadata)
    share(path)


def share(*paths: Path) -> None:
    """Give files the permissions that new files have here. Safetensors lets only the owner read its files."""
    for path in paths:
        probe = path.with_name(f".{path.name}.mode")  # Reading the umask would change it, in all threads.
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        path.chmod(stat.S_IMODE(mode))


def load_tensors(
    path: Path, device: torch.device, take: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor.clone()
) -> dict[str, Tensor]:
    """The tensors of a file, on a device.

    Only a part of the file is in memory at a time, so that memory never holds all tensors and the whole file at once.

    Args:
        path: What :func:`write_tensors` wrote.
        device: Where the tensors go.
        take: Makes the result from a name and a tensor of the file, which is freed afterwards. Several threads call it
            at once. The default clones the tensor, because tensors in the file are at odd addresses, where some matmul
            kernels round differently.

    Raises:
        CheckpointError: If it cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            names, metadata = list(file.keys()), file.metadata() or {}
        with ThreadPoolExecutor(max(2, torch.get_num_threads())) as pool:
            while len(tensors) < len(names):
                tensors |= _load_part(path, device, names[len(tensors) :], take, pool)
        for name in json.loads(metadata.get("complex", "[]")):
            tensors[name] = torch.view_as_complex(tensors[name])
    except FxquantError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}; copy the checkpoint again") from error
    return tensors


def _load_part(
    path: Path, device: torch.device, names: Sequence[str], take: Callable[[str, Tensor], Tensor], pool: Executor
) -> dict[str, Tensor]:
    """The first few tensors; everything that is read from a file stays in memory until the file is closed."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        read: dict[str, Tensor] = {}
        total = 0
        for name in names:
            read[name] = file.get_tensor(name)
            total += read[name].nbytes
            if total > _PART:
                break
        return dict(zip(read, pool.map(take, read, read.values()), strict=True))


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clone tensors that share memory with another one, because safetensors refuses these."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return found


def check_digests(folder: Path, names: Collection[str], digests: Any, where: str) -> None:
    """Compare files with their digests; the file ``where`` holds one digest for each name.

    Raises:
        CheckpointError: Names the first file that is missing or has other bytes.
    """
    for name in names:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy the checkpoint again")
        if not isinstance(digests, Mapping) or digest(path) != digests.get(name):
            raise CheckpointError(f"{path} is damaged: its bytes do not match the digest in {where}; copy it again")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(data: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, without the entry ``digest``."""
    rest = {key: value for key, value in data.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def is_text_of(text: str, data: Any) -> bool:
    """Whether a text is ``json.dumps(data, indent=1)`` and a line end, without building that text as a whole."""
    position = 0
    for piece in json.JSONEncoder(indent=1).iterencode(data):
        if not text.startswith(piece, position):
            return False
        position += len(piece)
    return text[position:] == "\n"


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype, without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def dtype_of_name(name: Any) -> torch.dtype:
    """The dtype with a name.

    Raises:
        CheckpointError: If no dtype has this name.
    """
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{name!r} is not a dtype of torch")
    return dtype


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Turn any error that the content of a file causes into an error that names the file."""
    try:
        yield
    except BackendError:
        raise
    except Exception as error:
        folder = str(path.parent) if path.parent.is_absolute() else f"{path.parent}/"  # "d" alone is in any text.
        if isinstance(error, CheckpointError) and (str(path) if path.parent == Path() else folder) in str(error):
            raise
        reason = getattr(error, "reason", str(error)) if isinstance(error, FxquantError) else repr(error)
        reason = printable(reason, _REASON)
        raise CheckpointError(f"{path}: {reason}") from error
