"""The order of passes: which stage each pass accepts, and which it leaves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from fxquant.errors import ConfigurationError
from fxquant.ir.stages import Stage, later


class Ordered(Protocol):
    """The part of a pass that its place depends on."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def requires(self) -> Stage:
        """The latest stage of a graph that it accepts."""

    @property
    def establishes(self) -> Stage:
        """The stage of the graph afterwards, if it was not at a later one."""


def stage_after(passes: Iterable[Ordered], stage: Stage) -> Stage:
    """The stage of a graph after passes.

    Args:
        passes: The passes in order.
        stage: Stage of the graph before.

    Raises:
        ConfigurationError: If a pass does not accept the stage that the graph has then; names the pass that made it.
    """
    maker = None
    for step in passes:
        if not stage <= step.requires:
            raise ConfigurationError(f"{step.name} works on {step.requires} graphs{_why(step.requires, stage, maker)}")
        try:
            reached = later(stage, step.establishes)
        except ConfigurationError as error:
            raise ConfigurationError(f"{step.name} cannot follow {maker or f'{stage} graphs'}: {error}") from None
        stage, maker = reached, maker if reached is stage else step.name
    return stage


def _why(accepted: Stage, stage: Stage, maker: str | None) -> str:
    order = "" if accepted < stage else f"; the stages {accepted} and {stage} have no order"
    if maker is None:
        return f", this one is {stage} already{order}"
    return f" but comes after {maker}, which makes them {stage}{order or '; move it to the front'}"
