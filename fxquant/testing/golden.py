"""Golden texts of graphs: files that a test compares with, and that one environment variable writes anew."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from torch import fx

from fxquant.ir.printing import graph_text

UPDATE = "FXQUANT_UPDATE_GOLDEN"
"""Environment variable: set it to 1 and run the tests once to write golden files anew."""


def assert_golden(actual: fx.GraphModule | str, path: str | Path) -> None:
    """Compare a graph or a text with a file; with the environment variable :data:`UPDATE` at 1, write the file.

    Args:
        actual: A graph, which is printed by :func:`fxquant.testing.graph_text`, or a text.
        path: The golden file, usually beside the test: ``Path(__file__).with_name("rotated.txt")``.

    Raises:
        AssertionError: If the file is missing or holds another text; the message shows a diff.
    """
    text = (actual if isinstance(actual, str) else graph_text(actual)).strip() + "\n"
    file = Path(path)
    if os.environ.get(UPDATE) == "1":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return
    again = f"run the test once with {UPDATE}=1 to write it, and read the change before you commit it"
    if not file.exists():
        raise AssertionError(f"there is no golden file {file}; {again}. It would hold:\n{text}")
    golden = file.read_text(encoding="utf-8")
    if golden != text:
        names = (f"{file.name} (golden)", "actual")
        diff = difflib.unified_diff(golden.splitlines(), text.splitlines(), *names, lineterm="")
        raise AssertionError(f"this is not what {file} holds; {again}:\n" + "\n".join(diff))
