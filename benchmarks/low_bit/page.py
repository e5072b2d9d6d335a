"""Writes the tables into a page of the documentation, between two marks of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.figures import write

SECTIONS = {
    "tables": """## Recipes in every number format

`make low-bit` measures this and the next section. Each cell is the mean SQNR of the output in dB and that of the worst
timestep; *planted*, *flux-like* and *pixart-like* have salient channels. The last two are a FLUX of two double and two
single blocks and a PixArt of four blocks, 128 wide, with random weights: their figures compare recipes, and say nothing
about trained models. Integers in groups have a range per token, because formats with blocks find their scales at run
time too. The last table is the size of the tensors of the digits model.""",
    "ablation": """## What each part of the recipes that choose is worth

Each part of `auto-w8a8`, `auto-w4a8` and `auto-w4a4` is switched off alone. The last three columns are means over the
first, the middle and the last third of the sampler's steps, from noise to image.

![SQNR over the steps of the sampler, with all parts and without each one](pictures/parts.svg)""",
}
"""What stands before the tables of each section."""


def insert(path: Path, texts: Mapping[str, str]) -> None:
    """Replace what stands between the marks of sections.

    Args:
        path: The page.
        texts: The tables by section, Markdown.

    Raises:
        SystemExit: The page lacks the marks of a section; nothing is written.
    """
    page = path.read_text(encoding="utf-8")
    for name, text in texts.items():
        start, end = marks(name)
        if page.count(start) != 1 or page.count(end) != 1 or page.index(start) > page.index(end):
            raise SystemExit(
                f"{path} lacks the lines {start!r} and {end!r}; write both where the section {name} belongs"
            )
        before, after = page.partition(start)[0], page.partition(end)[2]
        page = f"{before}{start}\n\n{SECTIONS[name]}\n\n{text}\n\n{end}{after}"
    write(path, page)


def marks(name: str) -> tuple[str, str]:
    """The first and the last line of a section."""
    return f"<!-- benchmarks.low_bit: {name} -->", f"<!-- benchmarks.low_bit: end of {name} -->"
