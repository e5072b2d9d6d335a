"""What all ranks must have in common before they begin."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from fxquant.disk.files import digest
from fxquant.errors import RanksDifferError, shortened

if TYPE_CHECKING:
    from fxquant.distributed.team import Team

_SMALL = 1 << 20  # Bytes of files whose content is compared.


def versions() -> dict[str, str]:
    """The versions that all ranks must have in common, by the names of the packages."""
    return {name: version(name) for name in ("fxquant", "torch", "diffusers")}


def files_of(folder: Path) -> dict[str, str]:
    """The files of a folder, for :func:`check_alike`: their sizes, and digests of small ones such as configs.

    Weights of the same size are not compared here; ``fxquant.compile`` compares those of the model.
    """
    found = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file():
            size = path.stat().st_size
            more = f" with digest {digest(path)[:12]}" if size <= _SMALL else ""
            found[f"file {path.relative_to(folder)}"] = f"{size} bytes{more}"
    return found


def check_alike(team: Team, given: Mapping[str, object]) -> None:
    """Compare what the ranks were given, by name, with what rank 0 was given.

    Args:
        team: The ranks.
        given: What this rank was given: texts, numbers or digests, by the name that a message shows.

    Raises:
        RanksDifferError: On all ranks. Names the rank, the thing and both values.
    """
    first, *others = team.gather({name: str(value) for name, value in given.items()})
    for rank, other in enumerate(others, 1):
        for name in {**first, **other}:
            here, there = (shortened(entries.get(name, "none")) for entries in (first, other))
            if here != there:
                raise RanksDifferError(
                    f"rank {rank} has another {name} than rank 0: {there}, not {here}; start all ranks with the same "
                    "options, files and versions"
                )
