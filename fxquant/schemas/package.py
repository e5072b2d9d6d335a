"""Schema of ``package.json`` (:mod:`fxquant.storage.aot.package`)."""

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
    infinite: list[Name] | None = None
    tensors: dict[Name, Text] | None = None
    packed: Annotated[list[Name], Field(max_length=1_000_000)]
    graphs: Annotated[list[Graph], Field(max_length=1000)]
    ops: Annotated[list[Annotated[str, Field(pattern=r"^\w+::\w+$")]], Field(max_length=1000)]
    files: dict[Annotated[Name, Field(pattern=r"^[^/\\]+$")], Digest]

    @model_validator(mode="after")
    def _callable(self) -> PackageFile:
        own = {parameter.name for parameter in self.signature if not parameter.kind.startswith("VAR_")}
        if not any(parameter.kind == "VAR_KEYWORD" for parameter in self.signature):
            for graph in self.graphs:
                unknown = graph.call.structure.get("dict", {}).keys() - own
                if unknown:
                    raise ValueError(f"a packaged call has the input {min(unknown)!r}, which the signature lacks")
        return self
