"""Keeps finished parts of a long job in a folder, so that the same job continues from them after an interruption.

Each part is one safetensors file: tensors, JSON values, and what the part was made from. A part is taken back only if
it was made from the same and its digest is right. The folder is locked while a process works in it.

Parts are not forced to the disk one by one. They survive the end of the process, whatever ends it. After a power
failure a file may be damaged; its digest shows this, and the part is computed anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxquant.disk.files import few, write_tensors
from fxquant.disk.folders import SAVING, check_writable, parents_of
from fxquant.disk.locks import Lock
from fxquant.disk.refusals import writing
from fxquant.disk.whole_file import whole_file
from fxquant.errors import FolderInUseError, FxquantError, ResumeWarning, WriteError
from fxquant.memory.bound import relax
from fxquant.text import printable

_KEY = "fxquant-finished-work"
_FORMAT = "2"  # Another one whenever parts hold something else or something else is computed from the same.
_SUFFIX = ".safetensors"
_LONGEST = 150  # Bytes of the name of a part in the name of its file.
_TRIES = 10
_REASON = 500  # The most characters of an error that a file causes.
_DAMAGE = (
    *(OSError, SafetensorError, FxquantError, LookupError, TypeError, ValueError, AttributeError, RuntimeError),
    *(ArithmeticError, AssertionError),
)
"""What reading a damaged part may raise."""

T = TypeVar("T")


class Part(NamedTuple):
    """What was kept of one part: tensors on the CPU by name, and JSON values."""

    tensors: dict[str, Tensor]
    data: Any


@dataclass(eq=False)
class FinishedWork:
    """Finished parts of a job. Open the folder with :func:`working_in`.

    ::

        with working_in(folder) as work:
            for batch in batches:
                found = work.part(f"batch-{batch.number}", made_from, lambda: Part(*compute(batch)))

    Attributes:
        folder: The folder.
        versions: What every part depends on besides ``made_from``: the versions of fxquant and torch.
    """

    folder: Path
    versions: Mapping[str, str]
    _said: set[tuple[str, ...]] = field(default_factory=set)

    def room(self, name: str) -> FinishedWork:
        """The parts in a folder of this one, whose names do not clash with other parts."""
        return FinishedWork(self.folder / name, self.versions, self._said)

    def part(
        self,
        name: str,
        made_from: Mapping[str, str],
        compute: Callable[[], Part],
        check: Callable[[Part], object] = lambda part: part,
    ) -> Part:
        """A part that was kept, or else what ``compute`` returns, which is then kept.

        Args:
            name: Name of the part.
            made_from: Everything that the part depends on: words for a message, such as ``weights``, each with a text
                or a digest that differs if it differs.
            compute: Computes the part.
            check: Raises an error, such as a ValueError, if a part that was kept holds something else than expected.
                Then it is computed anew.

        Raises:
            WriteError: If it cannot be written.
        """

        def read(part: Part) -> Part:
            check(part)
            return part

        found = self.load(name, made_from, read)
        if found is None:
            found = compute()
            self.save(name, made_from, found.tensors, found.data)
        return found

    @overload
    def load(self, name: str, made_from: Mapping[str, str]) -> Part | None: ...

    @overload
    def load(self, name: str, made_from: Mapping[str, str], read: Callable[[Part], T]) -> T | None: ...

    def load(self, name: str, made_from: Mapping[str, str], read: Callable[[Part], Any] = lambda part: part) -> Any:
        """A part that was kept, or None. Warns of a part that is damaged or was made from something else.

        Args:
            name: Name of the part.
            made_from: As in :meth:`part`.
            read: Makes what is returned from the part. If it raises an error, such as a KeyError, the part counts as
                damaged: a folder may come from anybody.
        """
        path = self.path(name)
        if not path.is_file():
            return None
        try:
            head, part = _read(path)
            wanted = {**self.versions, **made_from}
            differ = [word for word in {**head, **wanted} if head.get(word) != wanted.get(word)]
            found = None if differ else read(part)
        except _DAMAGE as error:
            self.warn(f"{path} is damaged ({printable(str(error), _REASON)}); {name} is computed anew")
            return None
        if differ:
            self.refuse(name, differ)
        return found

    def save(
        self, name: str, made_from: Mapping[str, str], tensors: Mapping[str, Tensor] | None = None, data: Any = None
    ) -> None:
        """Keep a part; its file is written completely or not at all.

        Args:
            name: Name of the part.
            made_from: As in :meth:`part`.
            tensors: Tensors of any dtype and device, by name.
            data: JSON values.

        Raises:
            WriteError: If it cannot be written.
        """
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in (tensors or {}).items()}
        text = json.dumps({"made_from": {**self.versions, **made_from}, "data": data})
        with whole_file(self.path(name), forced=False) as unfinished:
            write_tensors(plain, unfinished, {_KEY: text, "digest": _digest(text, plain)})

    def remove(self, name: str) -> None:
        """Remove a part, if it is there."""
        self.path(name).unlink(missing_ok=True)

    def keep_only(self, names: Collection[str]) -> None:
        """Remove all other parts of this folder; those of its rooms stay, and so do files that are not parts."""
        wanted = {self.path(name) for name in names}
        for path in self.folder.glob(f"*{_SUFFIX}"):
            if path not in wanted and _is_part(path):
                path.unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """The file of a part."""
        plain = name.replace("/", "_")
        encoded = os.fsencode(plain)
        if len(encoded) > _LONGEST:
            plain = f"{encoded[:_LONGEST].decode(errors='ignore')}-{hashlib.sha256(encoded).hexdigest()[:8]}"
        return self.folder / f"{plain}{_SUFFIX}"

    def refuse(self, name: str, differ: Collection[str]) -> None:
        """Warn, once for all parts, that they were made from something else.

        Args:
            name: Name of the first such part.
            differ: In what it differs, in words.
        """
        key = tuple(sorted(differ))
        if key not in self._said:
            self._said.add(key)
            self.warn(
                f"{self.folder} holds results of another run, which differs in {few(key)}; they are not used, and "
                f"{name} and what follows are computed anew"
            )

    @staticmethod
    def warn(message: str) -> None:
        """Warn that something is computed anew."""
        warnings.warn(message, ResumeWarning, stacklevel=3)


@contextmanager
def working_in(folder: str | Path | None, versions: Mapping[str, str] | None = None) -> Iterator[FinishedWork | None]:
    """Open and lock a folder for the parts of a job; None for no folder.

    The lock ends with the process, however it ends, so a killed process blocks nobody. A folder that stays empty is
    removed.

    Args:
        folder: The folder, which is made if it does not exist.
        versions: Versions that every part depends on; those of fxquant and torch if None.

    Raises:
        FolderInUseError: If another process, or another job of this one, works in the folder.
        WriteError: If the folder cannot be written, or is a pipeline.
    """
    if folder is None:
        yield None
        return
    place = Path(folder).resolve()
    if (place / "model_index.json").exists():
        raise WriteError(f"{place} is a pipeline; choose another folder for finished work")
    check_writable(place)
    with parents_of(place):
        lock = locked(place)
        try:
            _tidy(place)
            yield FinishedWork(place, _versions() if versions is None else versions)
        finally:
            with suppress(OSError):  # It is not empty.
                place.rmdir()
            del lock


def locked(folder: Path) -> Lock:
    """Make a folder and lock it.

    Args:
        folder: The folder, whose parent exists.

    Raises:
        FolderInUseError: If it is locked.
        WriteError: If it cannot be made.
    """
    for _ in range(_TRIES):
        with writing(folder):
            folder.mkdir(exist_ok=True)
        lock = Lock.of(folder)
        if lock is not None:
            return lock
        if folder.is_dir():  # Otherwise the process that held it has just removed it.
            break
    raise FolderInUseError(f"another process works in {folder}; wait until it ends, or give another folder")


def digest_of_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bits, for what a part is made from; the layout of a kernel is no part."""
    dense = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    whole = dense.cpu().contiguous()
    found = hashlib.sha256(f"{whole.dtype}{tuple(whole.shape)}".encode())
    found.update(_bytes_of(whole))
    return found.hexdigest()


def digest_of_tensors(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of tensors with their names, in order, behind a text."""
    found = hashlib.sha256(text.encode())
    for name, tensor in tensors.items():
        found.update(f"{name}{digest_of_tensor(tensor)}".encode())
        relax()
    return found.hexdigest()


def check_numbers(part: Part, *shape: int, least: float = -math.inf) -> None:
    """Refuse a part whose JSON values are not numbers in lists of this shape.

    Args:
        part: The part.
        shape: Lengths of the lists, from the outside in.
        least: What no number is below.

    Raises:
        ValueError: It holds something else, or a NaN.
    """
    numbers = np.array(part.data)
    if numbers.shape != shape or numbers.dtype.kind not in "if" or not (numbers >= least).all():
        raise ValueError(f"it holds no numbers of shape {list(shape)}")


def _versions() -> dict[str, str]:
    package = sys.modules[__name__.partition(".")[0]]  # An import would be against the direction of imports.
    versions = {"version of fxquant": str(package.__version__), "version of torch": torch.__version__}
    return {"format of the folder": _FORMAT, **versions}


def _tidy(folder: Path) -> None:
    """Remove parts that killed processes were writing. What others write here, such as ``--out``, stays."""
    for path in folder.rglob(f".*{_SUFFIX}.{SAVING}-*"):
        if path.is_file():
            path.unlink(missing_ok=True)


def _is_part(path: Path) -> bool:
    """Whether a file was written as a part, and is not one of the user's."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return _KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _read(path: Path) -> tuple[dict[str, str], Part]:
    with safe_open(path, framework="pt", device="cpu") as file:
        metadata = file.metadata() or {}
        text = metadata[_KEY]
        # Cloned, because tensors in the file are at odd addresses, where some kernels round differently.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a mapping)
    if metadata["digest"] != _digest(text, tensors):
        raise ValueError("its bytes do not match its digest")
    for name in json.loads(metadata.get("complex", "[]")):
        tensors[name] = torch.view_as_complex(tensors[name])
    head = json.loads(text)
    if not isinstance(head["made_from"], dict):
        raise ValueError("it does not say what it was made from")
    return head["made_from"], Part(tensors, head["data"])


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """A checksum of a part. It finds damage, and is several times as fast as a cryptographic digest."""
    found = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = torch.view_as_real(tensors[name]) if tensors[name].is_complex() else tensors[name]
        found = zlib.crc32(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode(), found)
        found = zlib.crc32(_bytes_of(tensor), found)
    return f"{found:08x}"


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
