"""The pages of the documentation, and the code that they show.

A Python block of a page is run by ``test_pages.py``, unless a comment in the line before it says why not::

    <!-- not run: needs a GPU -->
    ```python
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("torchrun", "accelerate", "python")

_FENCE = re.compile(
    r"(?:^[ ]*<!-- not run: (?P<reason>[^\n]+?) -->\n)?"
    r"^[ ]*```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^[ ]*```[ ]*$",
    flags=re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Path of the page in the repository.
        line: Number of its first line of code, from 1.
        language: What follows the fence.
        code: The code.
        not_run: Why it is not run; None if it is.
        section: The last heading of second level before it; empty if there is none.
    """

    page: str
    line: int
    language: str
    code: str
    not_run: str | None
    section: str


def pages() -> list[str]:
    """Paths of all pages in the repository, ``README.md`` first."""
    found = sorted((ROOT / "docs").rglob("*.md"))
    return [
        "README.md",
        *(path.relative_to(ROOT).as_posix() for path in found),
        "examples/digits/README.md",
        "examples/passes/README.md",
    ]


def text_of(page: str) -> str:
    """The Markdown of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, of one language or of all."""
    text, found = text_of(page), []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        code = textwrap.dedent(match["code"])
        section = re.findall(r"^## (.+)$", text[: match.start()], flags=re.M)[-1:]
        found.append(Block(page, line, match["language"], code, match["reason"], "".join(section)))
    return [block for block in found if language is None or block.language == language]


def commands_of(page: str, program: str) -> Iterator[list[str]]:
    """The words of each command of a program, such as ``fxquant``, in blocks of the shell and in indented blocks.

    Commands that a launcher such as ``torchrun`` starts (``torchrun ... -m fxquant ...``) are among them.
    """
    shown = [block.code for block in blocks_of(page) if block.language in ("console", "bash", "sh", "")]
    rest = _FENCE.sub("", text_of(page))
    shown += re.findall(r"(?:^ {4}.*\n)+", rest, flags=re.M)
    for code in shown:
        for line in code.replace("\\\n", " ").splitlines():
            command = line.strip().removeprefix("$ ")
            if command.split(" ")[0] in LAUNCHERS and f" -m {program} " in command:
                command = program + command.partition(f" -m {program}")[2]
            if command.split(" ")[0] == program:
                words = shlex.split(command, comments=True)
                yield words[1 : words.index("|") if "|" in words else None]


def inline_of(page: str, program: str) -> Iterator[list[str]]:
    """The words of each command of a program that stands within a sentence."""
    for found in re.findall(
        rf"`(?:(?:{'|'.join(LAUNCHERS)}) [^`]*-m )?{program} ([^`]+)`", _FENCE.sub("", text_of(page))
    ):
        yield found.split()
