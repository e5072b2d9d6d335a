"""Files that other libraries mapped into memory, such as the weights of a model that diffusers read."""

from __future__ import annotations

import ctypes
import mmap
import re
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

_HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+) *(.*)$")


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
        libc = ctypes.CDLL(None, use_errno=True)
        for mapping in mappings():
            if mapping.start in self._held and mapping.file and not mapping.changed:
                size = mapping.stop - mapping.start
                libc.madvise(ctypes.c_void_p(mapping.start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)

    def clear(self) -> None:
        """Let go of all weights."""
        self._held.clear()
