"""Schema of files of layer times (:class:`fxquant.planning.layer_times.LayerTimes`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fxquant.schemas.common import Entry, Finite, Name, Size, Text

Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LayerTimesFile(Entry):
    """The file. It has no digest: a table of times may be written by hand."""

    format: Size
    machine: Text
    backend: Text
    batch: Size
    float_call: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    rest: Finite
    layers: Annotated[
        dict[Name, Annotated[dict[Name, Milliseconds], Field(max_length=1_000)]], Field(max_length=100_000)
    ]
