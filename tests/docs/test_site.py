"""The site: links, what the pages must name, and what they must not. `make docs` builds it and checks the rest."""

from __future__ import annotations

import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import fxquant
from tests.docs.pages import ROOT, pages, text_of
from tests.tiny import calibrate, make_dit

OURS = [page for page in pages() if not page.startswith("examples/")]
REFERENCE = [page for page in OURS if page.startswith("docs/reference/")]


def links_of(page: str) -> list[str]:
    """Relative targets of the links and pictures of a page."""
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.S)
    found = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [target for target in found if not re.match(r"[a-z]+:|#", target)]


@pytest.mark.parametrize("page", pages())
def test_links_lead_to_files(page: str) -> None:
    made = {"docs/reference/commands.md"}  # By docs/tools/commands.py.
    for target in links_of(page):
        path = (ROOT / page).parent / target.partition("#")[0]
        inside = path.resolve().relative_to(ROOT).as_posix()
        assert inside in made or path.exists(), f"{page} links to {target}"


ABSOLUTE = r"(?<![\w.~/$<)\]}*-])(?:file:/{2})?/\w[\w.+-]*"
"""An absolute path. A slash behind a word, a dot or a bracket is part of a relative path, a unit or a tag of HTML."""


def outside_the_software(text: str) -> list[str]:
    """What a page must not hold: a path of one machine, the number of an issue, or a note of its author."""
    named = re.findall(r"\bissue \d|\bthis session\b|/tmp/|/home/|\bTODO\b", text, flags=re.I)
    return named + re.findall(ABSOLUTE, re.sub(r"\bhttps?://\S+", "", text))


@pytest.mark.parametrize("page", OURS)
def test_pages_are_about_the_software(page: str) -> None:
    assert outside_the_software(text_of(page)) == []


@pytest.mark.parametrize(
    "text",
    [
        *("open /data/models/dit", "`/opt/x`", "--out=/var/x", "(/srv/a)", "'/mnt/a'", "file:///etc/hosts", "/root"),
        *("under $HOME/tmp/x", "see Issue 7", "in this session", "to do: TODO", "~/home/a"),
    ],
)
def test_what_is_outside_the_software_is_found(text: str) -> None:
    assert outside_the_software(text)


@pytest.mark.parametrize(
    "text",
    ["docs/pages/a.md", "../../README.md", "https://host/a/b", "W / n", "MB/s", "`/` searches", "</div>", "{name}/a"],
)
def test_relative_paths_links_and_units_are_allowed(text: str) -> None:
    assert outside_the_software(text) == []


def test_navigation_names_every_page() -> None:
    named = set(re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    shown = {page.removeprefix("docs/") for page in pages() if page.startswith("docs/")}
    assert shown <= named
    for path in named - shown - {"reference/commands.md"}:  # Pages from outside of docs/.
        assert (ROOT / path).exists(), path


def test_reference_names_things_that_exist() -> None:
    for page in REFERENCE:
        for path in re.findall(r"^::: ([\w.]+)$", text_of(page), flags=re.M):
            module, _, name = path.rpartition(".")
            if importlib.util.find_spec(path if name[0].islower() and module != "fxquant" else module) is None:
                pytest.fail(f"{page} names {path}")
            assert hasattr(importlib.import_module(module), name) or importlib.util.find_spec(path), path


def test_reference_has_every_public_name_and_every_pass() -> None:
    text = "\n".join(text_of(page) for page in REFERENCE)
    for name in fxquant.__all__:
        home = getattr(fxquant, name).__module__
        assert f"::: fxquant.{name}\n" in text or f"::: {home}\n" in text, name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for group in ("passes", "backends"):
        for target in project["entry-points"][f"fxquant.{group}"].values():
            module = target.partition(":")[0]
            assert f"::: {module}" in text, module


def test_every_recipe_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name in project["entry-points"]["fxquant.recipes"]:
        assert f"`{name}-…`" in text_of("docs/usage.md"), name
        assert f"`{name}`" in text_of("docs/methods.md"), name


def test_figures_of_the_methods_are_measured_ones() -> None:
    measured = text_of("docs/results.md")
    figures = re.findall(r"(?<![\w.])\d\d\.\d\d?(?![\w.])", text_of("docs/methods.md").replace("arXiv", ""))
    assert len(figures) > 40
    for figure in figures:
        assert figure in measured, f"{figure} dB is not in docs/results.md"


def test_requirements_of_the_site_are_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.M))
    named = {re.match(r"[\w-]+", text)[0] for text in project["optional-dependencies"]["docs"]}  # type: ignore[index]
    assert named <= pinned


def test_pictures_show_the_rewrites(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from docs.tools.pictures import draw_block

    model = make_dit()
    draw_block(model, calibrate(model), tmp_path)
    drawn = {path.stem.removeprefix("block-"): path.read_text() for path in tmp_path.glob("*.svg")}
    inserted = {name: text.count(">fxquant::channel_affine<") for name, text in drawn.items()}
    assert inserted == {"captured": 0, "balanced": 3, "transformed": 0, "quantized": 0}
    assert drawn["quantized"].count(">fxquant::linear<") == 7  # adaLN, q, k, v, output, two of the feed-forward.
    assert drawn["quantized"].count(">fxquant::quantize<") == 5  # q, k and v read the same codes.
    assert all("gelu" in text and "attention" in text for text in drawn.values())
    shown = sorted(path.name for path in (ROOT / "docs" / "pictures").glob("block-*.svg"))
    assert shown == sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("here", "target", "expected"),
    [
        ("usage.md", "results.md", "results.md"),
        ("usage.md", "../benchmarks/results/cpu.md", "benchmarks/results/cpu.md"),
        ("start.md", "../README.md", "index.md"),
        ("reference/index.md", "../../CHANGELOG.md", "../CHANGELOG.md"),
        ("CONTRIBUTING.md", "docs/write-a-pass.md", "write-a-pass.md"),
        ("examples/digits/README.md", "samples.png", "samples.png"),
        ("benchmarks/README.md", "../docs/results.md", "../results.md"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(here: str, target: str, expected: str) -> None:
    from docs.tools.outside import site_link

    assert site_link(here, target) == expected


def test_docstrings_become_markdown(tmp_path: Path) -> None:
    griffe = pytest.importorskip("griffe")
    from docs.tools.roles import Roles

    (tmp_path / "small.py").write_text(
        '''"""Uses :class:`~small.Thing` and :func:`make`.

Before::

    y = linear(x)

======  ===========
to read  ``args``,
         ``item``
======  ===========
"""

class Thing: ...

def make(): ...
'''.replace("======  ===", "=======  ===")
    )
    loaded = griffe.load("small", search_paths=[tmp_path], extensions=griffe.load_extensions(Roles))
    text = loaded.docstring.value
    assert '<autoref identifier="small.Thing" optional><code>Thing</code></autoref>' in text
    assert '<autoref identifier="small.make" optional><code>make</code></autoref>' in text
    assert "Before:\n\n    y = linear(x)" in text
    assert "| to read | ``args``, ``item`` |" in text
