"""Tensors in memory-mapped files without a name, which the system writes to disk when it needs their memory.

A file has no name in its folder from the start. So it is gone when the last tensor in it is, also after a crash.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fxquant.errors import WriteError

_ARENA = 1 << 28  # Bytes of a file that holds many tensors; each file takes a file descriptor.
_PAGE = mmap.PAGESIZE


class Scratch:
    """Makes tensors in files.

    Args:
        folder: The folder of the files, which exists. Its disk should have room for the float weights of a model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._arenas: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._places: dict[int, int] = {}  # Bytes of each tensor by its address.
        self._open: mmap.mmap | None = None
        self._used = 0
        self.nbytes = 0
        """Bytes of all tensors that are held now."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None) -> Tensor:
        """A tensor of zeros in a file; it is contiguous if no strides are given.

        Raises:
            WriteError: If the disk is full.
        """
        span = math.prod(shape)
        if stride is not None and span:
            span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if not span:
            return torch.zeros(*shape, dtype=dtype)
        flat = torch.frombuffer(self._take(span * dtype.itemsize), dtype=dtype)
        return flat.view(*shape) if stride is None else flat.as_strided(shape, stride)

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in a file, with the same strides; a tensor that lies there already is returned as it is.

        Raises:
            WriteError: If the disk is full.
        """
        if self.holds(tensor):
            return tensor
        # Of an axis that repeats one value, the value is copied.
        repeated = [stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)]
        once = tensor.detach()[tuple(slice(0, 1) if again else slice(None) for again in repeated)]
        made = self.empty(once.shape, once.dtype, once.stride())
        made.copy_(once)
        return made.expand(tensor.shape)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is the whole of one that this object made, or a view of it that begins where it does."""
        return tensor.untyped_storage().data_ptr() in self._places

    def release(self) -> None:
        """Give the memory of all tensors back to the system. Reading one brings its part back from the file."""
        for arena in list(self._arenas):
            arena.madvise(mmap.MADV_DONTNEED)  # The pages of a shared mapping stay in the file.

    def _take(self, nbytes: int) -> ctypes.Array[ctypes.c_char]:
        room = -(-nbytes // _PAGE) * _PAGE
        with self._lock:
            if self._open is None or self._used + room > len(self._open):
                self._close()
                self._open, self._used = self._new_arena(max(room, _ARENA)), 0
                self._arenas.add(self._open)
            arena, start = self._open, self._used
            self._used += room
            self.nbytes += room
        # torch holds this object, and this object the mapping.
        held = (ctypes.c_char * nbytes).from_buffer(arena, start)
        address = ctypes.addressof(held)
        self._places[address] = room
        end = weakref.finalize(held, self._free, weakref.ref(arena), address, start, room)
        end.atexit = False
        return held

    def _new_arena(self, nbytes: int) -> mmap.mmap:
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)  # A full disk found later would kill the process.
                return mmap.mmap(file.fileno(), nbytes)
        except OSError as error:
            raise WriteError(
                f"no room for {nbytes / 1e9:.1f} GB more in {self.folder}, where tensors lie while memory is bounded "
                f"({error.strerror}); {self.nbytes / 1e9:.1f} GB are held there. Free some space, or name a folder on "
                "another disk: scratch=, or --scratch on the command line"
            ) from error

    def _close(self) -> None:
        """Give the rest of the current file back to the disk."""
        if self._open is not None and self._used < len(self._open):
            self._open.madvise(mmap.MADV_REMOVE, self._used, len(self._open) - self._used)
        self._open = None

    def _free(self, arena: weakref.ref[mmap.mmap], address: int, start: int, room: int) -> None:
        self._places.pop(address, None)
        self.nbytes -= room
        held = arena()
        if held is not None and os.getpid() == self._process:  # A forked process shares the file.
            held.madvise(mmap.MADV_REMOVE, start, room)  # Frees the blocks on the disk too.
