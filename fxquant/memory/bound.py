"""A bound on the resident set of this process, while :func:`limit_memory` is entered.

Large tensors lie in files then: weights in those that they were read from, all others in files without a name
(:mod:`fxquant.memory.scratch`). A thread watches the resident set and gives memory that files hold back to the system
before the bound is reached. Reading such memory brings it back, so the code that computes knows nothing of this.
"""

from __future__ import annotations

import logging
import mmap
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.errors import ConfigurationError, MemoryLimitError
from fxquant.memory.mappings import FileWeights, is_large, trim, worth_managing
from fxquant.memory.scratch import Scratch

log = logging.getLogger(__name__)

_SECONDS = 0.004  # Between two looks at the resident set. Pages come in at some gigabytes per second.
_PATIENCE = 0.25  # Seconds until memory is given back again if the last time did not help.
_PAUSE = 20  # Times as long as it took to give memory back, until it is given back again below the bound.
_IN_MEMORY = {"tmpfs", "ramfs"}

_current: list[Bound] = []
_entering = threading.Lock()


class Bound:
    """The bound that is in force.

    Args:
        limit: Bytes of the resident set.
        folder: Folder of the files.
    """

    def __init__(self, limit: int, folder: Path) -> None:
        self.limit = limit
        self.scratch = Scratch(folder)
        self.peak = resident()
        """The largest resident set that was seen, in bytes."""
        self._weights = FileWeights()
        self._margin = max(limit // 8, 1 << 26)
        self._after = 0  # Resident set after memory was last given back.
        self._next = 0.0  # When it may be given back again although it has not grown much.
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="fxquant-memory", daemon=True)

    def keep(self, tensor: Tensor) -> Tensor:
        """The same values in a file. Tensors that are small, fake, trained or on another device stay as they are."""
        if not is_large(tensor) or tensor.requires_grad:
            return tensor
        made = self.scratch.copy(tensor)
        self.relax()
        return made

    def place_weights(self, model: nn.Module) -> None:
        """Let the weights of a model lie in files. Those that are not mapped from a file move to a new one.

        The values stay the same. Weights that share memory still do.
        """
        tensors = [*model.parameters(), *model.buffers()]
        large = [t for t in tensors if t.device.type == "cpu" and worth_managing(t.nbytes) and not _is_fake(t)]
        moved: dict[int, Tensor] = {}
        for tensor in self._weights.take([tensor for tensor in large if not self.scratch.holds(tensor)]):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in moved:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                moved[storage.data_ptr()] = self.scratch.copy(whole)
            place = moved[storage.data_ptr()].untyped_storage()
            view = torch.empty(0, dtype=tensor.dtype)
            view.set_(place, tensor.storage_offset(), tensor.shape, tensor.stride())
            view = view.conj() if tensor.is_conj() else view
            tensor.data = torch._neg_view(view) if tensor.is_neg() else view
            self.relax()

    def require(self, nbytes: int, what: str) -> None:
        """Refuse a step that needs more memory than the bound leaves beside what the process holds already.

        Raises:
            MemoryLimitError: Names the step, and a bound that would do: what is needed, and an eighth on top.
        """
        self.release()
        needed = resident() + nbytes
        if needed > self.limit:
            enough = needed + needed // 8  # The next run may hold more at this step, and later steps too.
            raise MemoryLimitError(
                f"max_memory={shown(self.limit)} is too small: {what} needs {shown(nbytes)} at a time, beside "
                f"{shown(needed - nbytes)} that the process holds with its libraries. Give at least {shown(enough)}",
                smallest=enough,
            )

    def relax(self) -> None:
        """Give memory back if the resident set is near the bound."""
        found = resident()
        self.peak = max(self.peak, found)
        if found < self.limit - self._margin:
            return
        now = time.monotonic()
        grown = found - self._after > self._margin // 4 and (found > self.limit or now > self._next - _PATIENCE)
        if grown or now > self._next:
            self.release()

    def release(self) -> None:
        """Give all memory back that files hold, and memory that was freed."""
        with self._lock:
            began = time.monotonic()
            self.scratch.release()
            self._weights.release()
            if resident() > self.limit - self._margin:
                trim()
            self._after, now = resident(), time.monotonic()
            self._next = now + _PATIENCE + _PAUSE * (now - began)

    def start(self) -> None:
        """Begin to watch."""
        self._watcher.start()

    def end(self) -> None:
        """Stop watching. Tensors in files stay valid."""
        self._ended.set()
        self._watcher.join()
        self._weights.clear()
        if self.peak > self.limit:
            log.warning("the process took %s, more than the %s given", shown(self.peak), shown(self.limit))

    def _watch(self) -> None:
        while not self._ended.wait(_SECONDS):
            self.relax()


def current() -> Bound | None:
    """The bound that is in force; None if memory is not bounded."""
    return _current[-1] if _current else None


def place_weights(model: nn.Module, device: torch.device) -> None:
    """Let the weights of a model lie in files while memory is bounded; see :meth:`Bound.place_weights`.

    Raises:
        ConfigurationError: If the model is not on the CPU.
    """
    bound = current()
    check_place(None if bound is None else bound.limit, device)
    if bound is not None:
        bound.place_weights(model)


def check_place(limit: int | str | None, device: torch.device) -> None:
    """Refuse a bound for a model that is not on the CPU.

    Raises:
        ConfigurationError: Says what to do.
    """
    if limit is not None and device.type != "cpu":
        raise ConfigurationError(
            f"max_memory bounds the memory of the CPU, and the model is on {device}; convert it on the CPU, or leave "
            "max_memory out"
        )


def kept(tensor: Tensor) -> Tensor:
    """The same values, in a file while memory is bounded; see :meth:`Bound.keep`."""
    bound = current()
    return tensor if bound is None else bound.keep(tensor)


def relax() -> None:
    """Give memory back if it is bounded and nearly used up.

    Loops that only read all weights call it after each one. The system maps pages of files that it has in memory faster
    than the thread that watches is scheduled.
    """
    bound = current()
    if bound is not None:
        bound.relax()


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor of zeros, in a file while memory is bounded and if it is large."""
    bound = current()
    size = torch.Size(shape).numel() * dtype.itemsize
    if bound is None or torch.device(device).type != "cpu" or not worth_managing(size):
        return torch.zeros(*shape, dtype=dtype, device=device)
    return bound.scratch.empty(shape, dtype)


@contextmanager
def limit_memory(limit: int | str | None, scratch: str | Path | None = None) -> Iterator[Bound | None]:
    """Within this context, fxquant bounds the resident set of this process.

    Large tensors lie in memory-mapped files. Results are the same bit for bit.

    Args:
        limit: Bytes, or a text such as ``"8GB"``. None for no bound; then nothing is done.
        scratch: A folder for the files, which are deleted at the end; by default that of temporary files.

    Raises:
        ConfigurationError: If the size cannot be read, another bound is in force, the system is not Linux, or the
            folder cannot be made or lies in memory.
        MemoryLimitError: If the process has more memory already.
    """
    if limit is None:
        yield None
        return
    size = read_size(limit)
    if sys.platform != "linux" or not hasattr(mmap, "MADV_REMOVE"):
        raise ConfigurationError(
            f"max_memory needs Linux: {sys.platform} has no call that gives the memory of mapped files back. Convert "
            "without it, on a machine with memory for about twice the float weights"
        )
    with _entering:
        if current() is not None:
            raise ConfigurationError("max_memory is given twice: a bound of the memory is in force already")
        bound = Bound(size, _checked_folder(tempfile.gettempdir() if scratch is None else scratch))
        bound.require(0, "a conversion")
        bound.start()
        _current.append(bound)
    try:
        yield bound
    finally:
        _current.remove(bound)
        bound.end()


def read_size(size: int | str) -> int:
    """Bytes from a number or a text such as ``8GB`` (10^9 bytes each) or ``8GiB`` (2^30).

    Raises:
        ConfigurationError: If it is not a positive size.
    """
    try:
        found = int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError:
        found = 0
    if found <= 0 or isinstance(size, bool):
        raise ConfigurationError(f"max_memory={size!r} is not a size; write 8GB, for example, or a number of bytes")
    return found


def resident() -> int:
    """Bytes of this process that are in memory, those of mapped files included."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def shown(nbytes: int) -> str:
    """A size as text, rounded up so that it can be given as a bound."""
    return f"{-(-nbytes // 10_000_000) / 100:.2f}GB"


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def _checked_folder(scratch: str | Path) -> Path:
    if not isinstance(scratch, (str, Path)):
        raise ConfigurationError(f"scratch={scratch!r} is no path of a folder; give a text or a pathlib.Path")
    folder = Path(scratch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"the folder {str(folder)!r} for scratch files cannot be made: {reason}") from error
    if _file_system(folder) in _IN_MEMORY:
        raise ConfigurationError(
            f"the folder {folder} for scratch files lies in memory ({_file_system(folder)}); give one on a disk: "
            "scratch=, or --scratch on the command line"
        )
    return folder


def _file_system(folder: Path) -> str:
    """The type of the file system that holds a folder, such as ``ext4``."""
    place, found = folder.resolve(), (-1, "")
    for line in _mounts():
        fields = line.split()
        mounted, kind = Path(fields[4].replace("\\040", " ")), fields[fields.index("-") + 1]
        if place.is_relative_to(mounted):
            found = max(found, (len(mounted.parts), kind), key=lambda one: one[0])
    return found[1]


def _mounts() -> Iterable[str]:
    return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
