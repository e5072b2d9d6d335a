"""The stages that a graph goes through, and their order. Other packages may add stages between those of fxquant.

The order is partial: a stage of another package comes after one stage and before another. Two stages that different
packages put into the same place have no order, so passes of both cannot follow each other in one pipeline.
"""

from __future__ import annotations

import re
from typing import ClassVar

from fxquant.errors import ConfigurationError
from fxquant.registry import OWN, Registry

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


class Stage:
    """The stage that a graph has reached. Stages compare by order: ``Stage.CAPTURED < Stage.QUANTIZED``.

    :func:`fxquant.authoring.register_stage` makes further ones.

    Attributes:
        name: Its name, as in dumps.
        home: The module that registered it.
    """

    CAPTURED: ClassVar[Stage]
    OBSERVED: ClassVar[Stage]
    TRANSFORMED: ClassVar[Stage]
    QUANTIZED: ClassVar[Stage]
    LOWERED: ClassVar[Stage]

    def __init__(self, name: str, home: str) -> None:
        self.name = name
        self.home = home
        self.__module__ = home  # The registry asks every object where it comes from.

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<stage {self.name}>"

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return stage_named, (self.name,)  # A copy is the same stage.

    def __le__(self, other: Stage) -> bool:
        if not isinstance(other, Stage):
            return NotImplemented
        _require_known(self, other)
        return self is other or any(self <= earlier for earlier in _EARLIER[other])

    def __lt__(self, other: Stage) -> bool:
        return self is not other and self <= other

    def __ge__(self, other: Stage) -> bool:
        return other <= self if isinstance(other, Stage) else NotImplemented

    def __gt__(self, other: Stage) -> bool:
        return self is not other and self >= other


_EARLIER: dict[Stage, set[Stage]] = {}
"""The stages just before each stage."""

_NEIGHBOURS: dict[Stage, tuple[Stage, Stage]] = {}
"""The stages that a stage of another package was put between."""


def _check_entry(name: str, item: object) -> None:
    if not isinstance(item, Stage) or item.name != name:
        raise ConfigurationError(
            f"{item!r} is not the stage {name!r}; name what fxquant.authoring.register_stage returned"
        )


STAGES: Registry[Stage] = Registry("stage", "fxquant.stages", _check_entry)
"""All known stages by name."""


def stage_named(name: str) -> Stage:
    """The stage of a name; if an installed package offers it, the package is imported.

    Raises:
        UnknownNameError: If there is no such stage. The message lists the stages.
        PluginError: If the package that offers it cannot be imported.
    """
    return STAGES[name]


def later(first: Stage, second: Stage) -> Stage:
    """The later one of two stages.

    Raises:
        ConfigurationError: If neither comes before the other.
    """
    if first <= second:
        return second
    if second <= first:
        return first
    raise ConfigurationError(
        f"the stages {first} ({first.home}) and {second} ({second.home}) have no order; register one of them with "
        "after= or before= the other, or use the passes of one package only"
    )


def in_order() -> list[Stage]:
    """The registered stages, each after all earlier ones. Installed packages are imported only if asked by name."""
    return sorted(_EARLIER, key=lambda stage: (sum(other < stage for other in _EARLIER), stage.name))


def is_own(stage: Stage) -> bool:
    """Whether a stage is one of fxquant itself."""
    return stage in OWN_STAGES


def neighbours(stage: Stage) -> tuple[Stage, Stage]:
    """The stages that a stage of another package was put between."""
    return _NEIGHBOURS[stage]


def known_again(name: str, home: str, after: Stage | str, before: Stage | str | None) -> Stage | None:
    """The stage of a name if the same module registered it with the same neighbours; otherwise None."""
    known = next((stage for stage in _NEIGHBOURS if stage.name == name), None)
    if known is None or known.home != home or str(after) != str(neighbours(known)[0]):
        return None
    return known if before is None or str(before) == str(neighbours(known)[1]) else None


_PLACING: list[str] = []  # The names of stages whose neighbours are being looked up.


def place(name: str, home: str, after: Stage | str, before: Stage | str | None) -> Stage:
    """Make a stage between two others and register it.

    Raises:
        ConfigurationError: If the name cannot be read, or the stage cannot be there.
        UnknownNameError: If a neighbour is not registered.
        DuplicateNameError: If another stage has the name.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(f"a stage cannot be called {name!r}; use small letters and digits, joined by hyphens")
    _PLACING.append(name)
    try:
        start = _neighbour(name, "after", after)
        end = _next_own(name, start) if before is None else _neighbour(name, "before", before)
    finally:
        _PLACING.pop()
    if end <= start:
        raise ConfigurationError(
            f"stage {name} cannot come after {start} and before {end}: {end} "
            + ("is the same stage" if end is start else f"comes before {start}, so that the order would be a circle")
        )
    stage = STAGES.register(name)(Stage(name, home))
    _EARLIER[stage] = {start}
    _EARLIER[end].add(stage)
    _NEIGHBOURS[stage] = start, end
    return stage


def remove(stage: Stage) -> None:
    """Take a stage out of the order.

    Raises:
        ConfigurationError: If it belongs to fxquant, is not registered, or another stage was registered next to it.
    """
    _require_known(stage)
    if is_own(stage):
        raise ConfigurationError(f"the stage {stage} belongs to fxquant and stays")
    next_to = [other for other, beside in _NEIGHBOURS.items() if stage in beside]
    if next_to:
        raise ConfigurationError(f"the stage {next_to[0]} was registered next to {stage}; remove it first")
    STAGES.remove(stage.name)
    del _EARLIER[stage], _NEIGHBOURS[stage]
    for earlier in _EARLIER.values():
        earlier.discard(stage)


def _neighbour(name: str, side: str, given: Stage | str) -> Stage:
    if isinstance(given, Stage):
        _require_known(given)
        return given
    if not isinstance(given, str):
        raise ConfigurationError(f"stage {name}: {side} should be a stage or the name of one, not {given!r}")
    if given in _PLACING:
        circle = " -> ".join([*_PLACING[_PLACING.index(given) :], given])
        raise ConfigurationError(f"stages that name each other as neighbours have no order: {circle}")
    return stage_named(given)


def _next_own(name: str, start: Stage) -> Stage:
    for stage in OWN_STAGES:
        if start < stage:
            return stage
    raise ConfigurationError(f"stage {name} cannot come after {start}, which is the last: a backend makes these graphs")


def _require_known(*stages: Stage) -> None:
    for stage in stages:
        if stage not in _EARLIER:
            raise ConfigurationError(f"the stage {stage} of {stage.home} is not registered any more")


def _own(name: str) -> Stage:
    stage = STAGES.register(name)(Stage(name, f"{OWN}ir.stages"))
    _EARLIER[stage] = set(OWN_STAGES[-1:])
    OWN_STAGES.append(stage)
    return stage


OWN_STAGES: list[Stage] = []
"""The stages of fxquant itself, in order."""

for _name in ("captured", "observed", "transformed", "quantized", "lowered"):
    setattr(Stage, _name.upper(), _own(_name))
