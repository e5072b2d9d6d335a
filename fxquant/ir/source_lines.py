"""The line of a model's code that a node comes from. Nodes that passes make have the lines of what they replace."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import fx

_FRAME = re.compile(r'\s*File "(?P<path>.+)", line (?P<line>\d+), in (?P<function>.+)')
_TORCH = Path(torch.__file__).parent
_OWN = Path(__file__).parent.parent
_SKIPPED = (_TORCH, _OWN, Path("torch"))  # torch.export names its own lines relative to its package.


@dataclass(frozen=True)
class SourceLine:
    """A line of code.

    Attributes:
        path: The file.
        line: Number of the line, counted from 1.
        function: The function that contains it.
        code: The line itself; empty if the file could not be read when the model was traced.
    """

    path: str
    line: int
    function: str
    code: str

    @property
    def file(self) -> str:
        """The file as packages name it, such as ``diffusers/models/attention.py``; only its name outside of them."""
        return short_path(self.path)

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}: {self.code}".removesuffix(": ")


def source_line(node: fx.Node) -> SourceLine | None:
    """The line of the model's own code, not of torch, that made a node; None if that is not known."""
    return _line_of(str(node.meta.get("stack_trace") or ""))


@lru_cache(maxsize=10_000)
def _line_of(trace: str) -> SourceLine | None:
    found = None
    lines = trace.splitlines()
    for number, text in enumerate(lines):
        frame = _FRAME.match(text)
        if frame is None or any(Path(frame["path"]).is_relative_to(root) for root in _SKIPPED):
            continue
        code = lines[number + 1].strip() if number + 1 < len(lines) and not _FRAME.match(lines[number + 1]) else ""
        found = SourceLine(frame["path"], int(frame["line"]), frame["function"], code)
    return found


@lru_cache(maxsize=1000)
def short_path(path: str) -> str:
    """A file below a folder of installed packages, relative to that folder; else its name alone."""
    parts = Path(path).parts
    for folder in ("site-packages", "dist-packages"):
        if folder in parts:
            return "/".join(parts[len(parts) - parts[::-1].index(folder) :])
    return parts[-1] if parts else path
