"""Schema of ``package.json`` (:mod:`fxquant.packages`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fxquant.schemas.calls import Call
from fxquant.schemas.common import Digest, FloatDtypeName, Name, Schema, Text


class Machine(Schema):
    """What the package was compiled for."""

    torch: Name
    system: Name
    processor: Name
    has: list[Name]


class Parameter(Schema):
    """One parameter of the model's ``forward``."""

    name: Annotated[Name, Field(pattern=r"^[^\W\d]\w*$")]
    kind: Literal["POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY", "VAR_KEYWORD"]
    default: Any = None


class Graph(Schema):
    """One compiled graph."""

    call: Call
    output: Text
    output_module: Name | None = None
    tensors: Annotated[list[Name], Field(max_length=1_000_000)]


class PackageFile(Schema):
    """The file."""

    machine: Machine
    model_class: Annotated[Name, Field(pattern=r"^[^:]*:[^:]+$")]
    recipe: Text = ""
    backend: Name
    dtype: FloatDtypeName
    timestep: Name | None
    signature: Annotated[list[Parameter], Field(max_length=2000)]
    packed: Annotated[list[Name], Field(max_length=1_000_000)]
    graphs: Annotated[list[Graph], Field(max_length=1000)]
    ops: Annotated[list[Annotated[str, Field(pattern=r"^\w+::\w+$")]], Field(max_length=1000)]
    files: dict[Annotated[Name, Field(pattern=r"^[^/\\]+$")], Digest]

    @model_validator(mode="after")
    def _callable(self) -> PackageFile:
        if self.timestep is not None and any(self.timestep not in graph.call.names for graph in self.graphs):
            raise ValueError(f"the timestep {self.timestep!r} is no input of the packaged calls")
        return self
