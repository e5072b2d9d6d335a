"""Hook of MkDocs: pages that lie beside ``docs/`` in the repository become pages of the site.

Links are written so that they work in the repository. On the site ``docs/`` is the root, so they are rewritten.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/convert.py",
    "benchmarks/cpu/__init__.py",
    "benchmarks/gpu/__init__.py",
    "benchmarks/results/convert.md",
    "benchmarks/results/cpu.md",
    "benchmarks/results/cold-start.md",
    "benchmarks/results/scale.json",
    "benchmarks/results/step-caches.md",
    "examples/digits/README.md",
    "examples/digits/samples.png",
    "examples/parallel/README.md",
    "examples/passes/README.md",
)
"""Paths in the repository of the pages, and of the files that they link to."""

_LINK = re.compile(r"(\]\()([^)#:\s]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add the files from outside."""
    from mkdocs.structure.files import File

    for path in OUTSIDE:
        files.append(File(path, str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Rewrite relative links from the layout of the repository to that of the site."""
    here = page.file.src_uri

    def change(link: re.Match[str]) -> str:
        return link[1] + site_link(here, link[2])

    return _LINK.sub(change, markdown)


def site_link(here: str, target: str) -> str:
    """A link on the site page ``here`` to what ``target`` names in the repository."""
    folder = posixpath.dirname(here if here in OUTSIDE else f"docs/{here}")
    path = posixpath.normpath(posixpath.join(folder, target))
    if path == "README.md":
        path = "docs/index.md"
    return posixpath.relpath(path.removeprefix("docs/"), posixpath.dirname(here) or ".")
