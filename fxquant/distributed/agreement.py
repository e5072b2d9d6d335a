"""What all ranks must have in common before they begin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fxquant.errors import RanksDifferError, shortened

if TYPE_CHECKING:
    from fxquant.distributed.team import Team


def versions() -> dict[str, str]:
    """The versions that all ranks must have in common, by the names of the packages."""
    import diffusers
    import torch

    from fxquant import __version__

    return {"fxquant": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}


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
