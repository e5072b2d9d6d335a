"""Memory that the system can take back.

Files that other libraries mapped, such as the weights of a model that diffusers read, hold the values. The allocator
holds memory that was freed.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+) *(.*)$")
_PRESENT, _SWAPPED, _OF_FILE = (1 << bit for bit in (63, 62, 61))  # Of the words of /proc/self/pagemap.
_OFTEN = 1 << 24  # Bytes that are freed between two calls of the allocator.

_SMALLEST = 1 << 16
"""Bytes; the memory of smaller tensors is left as it is."""


class _Freed:
    """Bytes that were freed since the last call of the allocator."""

    nbytes = 0


@dataclass
class Mapping:
    """A range of addresses.

    Attributes:
        start: First address.
        stop: The address behind the last one.
        file: Path of the file that is mapped there; empty for memory without a file.
        private: Whether writes stay in this process, and not in the file.
        changed: Bytes that were written to in a private mapping, and are not in the file.
    """

    start: int
    stop: int
    file: str
    private: bool
    changed: int = 0


def mappings() -> list[Mapping]:
    """All mappings of this process, ascending."""
    found: list[Mapping] = []
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        header = _HEADER.match(line)
        if header is not None:
            start, stop, rights, inode, path = header.groups()
            file = path if inode != "0" and path.startswith("/") else ""
            found.append(Mapping(int(start, 16), int(stop, 16), file, rights[3] == "p"))
        elif line.startswith("Anonymous:"):
            found[-1].changed = int(line.split()[1]) * 1024
    return found


class FileWeights:
    """Weights of a model that lie in mapped files, whose memory can be given back because the files have them.

    The object holds the weights, so that their addresses stay theirs.
    """

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def take(self, tensors: list[Tensor]) -> list[Tensor]:
        """Hold those tensors that lie in files as the files have them; returns the others."""
        found = mappings()
        starts = [mapping.start for mapping in found]
        others = []
        for tensor in tensors:
            place = tensor.data_ptr()
            mapping = found[bisect_right(starts, place) - 1]
            if place < mapping.stop and mapping.file and mapping.private and not mapping.changed:
                self._held[mapping.start] = tensor
            else:
                others.append(tensor)
        return others

    def release(self) -> None:
        """Give the memory of the files back to the system. Mappings that were written to are left as they are."""
        if not self._held:
            return
        for mapping in mappings():
            if mapping.start in self._held and mapping.file and not mapping.changed:
                _advise(_pages(mapping.start, mapping.stop - mapping.start))

    def clear(self) -> None:
        """Let go of all weights."""
        self._held.clear()


def let_go(tensor: Tensor) -> None:
    """Take note that another tensor takes the place of this one: its memory is given back, or soon will be."""
    if isinstance(tensor, FakeTensor) or tensor.device.type != "cpu":
        return
    give_back(tensor)
    give_back_freed(tensor.nbytes)  # Also what was computed on the way to the other tensor, which is larger than both.


def give_back(tensor: Tensor) -> bool:
    """Let the system take back the memory of a tensor that nothing will read soon, if a file has its values.

    The tensor stays valid: reading it again brings its values back from the file. Tensors that lie in memory, and those
    that were written to since they were mapped, are left as they are.

    Returns:
        Whether the memory was given back.
    """
    if not is_large(tensor) or isinstance(tensor, FakeTensor) or sys.platform != "linux" or not tensor.is_contiguous():
        return False
    pages = _pages(tensor.data_ptr(), tensor.nbytes)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(8 * pages.start)
            words = np.frombuffer(file.read(8 * len(pages)), dtype=np.uint64)
    except OSError:  # Some containers hide it.
        return False
    # A page that was written to is no longer one of the file. Pages that are absent and not swapped hold nothing else.
    lost = (words & _SWAPPED != 0) | ((words & _PRESENT != 0) & (words & _OF_FILE == 0))
    if len(words) != len(pages) or bool(lost.any()):
        return False
    return _advise(pages)


def is_large(tensor: Tensor) -> bool:
    """Whether a tensor is one of the CPU, of no subclass, that is large enough to manage its memory."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and tensor.device.type == "cpu" and worth_managing(tensor.nbytes)


def worth_managing(nbytes: int) -> bool:
    """Whether so many bytes are enough to manage the memory of a tensor; less lies together with other things."""
    return nbytes >= _SMALLEST


def _pages(address: int, nbytes: int) -> range:
    """The numbers of the pages that lie wholly within a part of the memory."""
    page = mmap.PAGESIZE
    return range(-(-address // page), (address + nbytes) // page)


def _advise(pages: range) -> bool:
    """Let the system take back pages; returns whether it did."""
    if not pages:
        return False
    place, size = (number * mmap.PAGESIZE for number in (pages.start, len(pages)))
    return not ctypes.CDLL(None).madvise(ctypes.c_void_p(place), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def drop_values(values: npt.NDArray[Any]) -> None:
    """Let the system take back the memory of an array whose values nothing will read.

    Afterwards the array holds any values. It may be written to again.

    Args:
        values: A contiguous array in memory that no file holds.
    """
    assert values.flags.c_contiguous
    if sys.platform == "linux":  # Elsewhere the memory is freed with the array.
        _advise(_pages(values.ctypes.data, values.nbytes))


def give_back_freed(nbytes: int) -> None:
    """Let the system take back memory that was freed, now and then.

    The allocator of the GNU C library holds freed blocks of up to 32 MiB, among which weights, their copies and second
    moments leave gaps as large as themselves.

    Args:
        nbytes: How many bytes were freed; they are counted, because a call of the allocator takes milliseconds.
    """
    _Freed.nbytes += nbytes
    if _Freed.nbytes >= _OFTEN:
        _Freed.nbytes = 0
        trim()


def trim() -> None:
    """Let the system take back all memory that was freed.

    The GNU C library keeps it; while weights are lowered, that is as much as the size of all weights.
    """
    found = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if found is not None:  # Other C libraries have no such function.
        found(0)
