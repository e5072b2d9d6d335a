"""The command ``fxquant new-pass``: a package around a new pass, whose tests pass at once.

The files are those of ``templates/new-pass``, a package that runs as it is. The words ``my-pass``, ``my_pass`` and
``MyPass`` are replaced in their text and their names.
"""

from __future__ import annotations

import keyword
import re
import shlex
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

import typer

from fxquant.cli.app import Debug, app
from fxquant.cli.output import print_plain, quiet, status
from fxquant.errors import ConfigurationError

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

_EXAMPLES = """[bold]Examples[/]

  fxquant new-pass rotate-inputs

  fxquant new-pass rotate-inputs --out packages/rotation
"""


@app.command("new-pass", epilog=_EXAMPLES, no_args_is_help=True)
def new_pass(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the pass, such as rotate-inputs.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder to write; by default the name.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a package with a new pass, its tests and its entry point."""
    folder = Path(name) if out is None else out
    with quiet(), status("importing torch"):
        check_name(name)
        write_package(name, folder)
    print_plain(
        f"{folder} holds a pass whose tests pass. Go on with:\n\n"
        f"  cd {shlex.quote(str(folder))}\n  pip install -e '.[test]'\n  pytest"
    )


def check_name(name: str) -> None:
    """Refuse a name that no new pass can have.

    Raises:
        ConfigurationError: If it is not lower-case words with hyphens, or is taken by a pass or by Python.
    """
    from fxquant.pipeline.pipeline import PASSES

    if _NAME.fullmatch(name) is None:
        words = re.findall(r"[a-z0-9]+", re.sub(r"([a-z0-9])([A-Z])", r"\1-\2", name).lower())
        hint = "-".join(words).lstrip("0123456789-") or "rotate-inputs"
        raise ConfigurationError(f"{name!r} is not a name of a pass; write lower-case words with hyphens: {hint}")
    if name in PASSES:
        raise ConfigurationError(f"there is a pass {name!r} already; choose another name (fxquant list passes)")
    if keyword.iskeyword(name):
        raise ConfigurationError(f"{name!r} is a word of Python; choose another name, such as {name}-inputs")


def write_package(name: str, folder: Path) -> None:
    """Write the package of a new pass.

    Args:
        name: Name of the pass, lower-case words with hyphens.
        folder: Where it goes; it must not exist.

    Raises:
        ConfigurationError: If there is something at the path already.
        WriteError: If the folder cannot be written; nothing is left then.
    """
    from fxquant.disk.folders import whole_folder

    def refuse_existing(path: Path) -> None:
        if path.exists() or path.is_symlink():
            raise ConfigurationError(f"{path} exists already; choose another folder with --out")

    words = {
        "my-pass": name,
        "my_pass": name.replace("-", "_"),
        "MyPass": class_name(name),
    }
    with whole_folder(folder.resolve(), refuse_existing) as scratch:
        _copy(_template(), scratch, words)


def class_name(name: str) -> str:
    """The class of a pass: a name that neither Python nor the code of the template uses otherwise."""
    found = "".join(word.capitalize() for word in name.split("-"))
    code = (_template() / "fxquant_my_pass" / "my_pass.py").read_text(encoding="utf-8")
    return f"{found}Pass" if keyword.iskeyword(found) or re.search(rf"\b{found}\b", code) else found


def _template() -> Traversable:
    return files("fxquant.cli") / "templates" / "new-pass"


def _copy(source: Traversable, target: Path, words: dict[str, str]) -> None:
    for item in source.iterdir():
        if item.name == "__pycache__":
            continue
        place = target / _filled(item.name, words)
        if item.is_dir():
            place.mkdir()
            _copy(item, place, words)
        else:
            place.write_text(_filled(item.read_text(encoding="utf-8"), words), encoding="utf-8")


def _filled(text: str, words: dict[str, str]) -> str:
    """The text with the words replaced, all at once: a new name may contain one of them."""
    return re.sub("|".join(map(re.escape, words)), lambda found: words[found[0]], text)
