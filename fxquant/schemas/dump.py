"""Schema of the JSON file of a graph (:mod:`fxquant.ir.dumps`).

FX writes the names of inputs, keyword arguments and tensors into the Python code of a graph as they are, and runs that
code. So they have to be names here, and nothing else.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from fxquant.schemas.common import DtypeName, Name, Schema, Size

_CUTS_CODE = frozenset("\"'\\")


def _identifier(name: str) -> str:
    if not (name.isidentifier() and name.isascii()):
        raise ValueError("this is not a name of a variable")
    return name


def _path(name: str) -> str:
    if not _CUTS_CODE.isdisjoint(name) or not all(name.split(".")):
        raise ValueError("this is not a name of a tensor")
    return name


Identifier = Annotated[str, Field(max_length=2000), AfterValidator(_identifier)]
Path = Annotated[Name, AfterValidator(_path)]
Shape = Annotated[list[Size], Field(fail_fast=True, max_length=64)]
Pair = Annotated[list[Any], Field(min_length=2, max_length=2)]


class Node(Schema):
    """One node."""

    name: Identifier
    op: Literal["placeholder", "get_attr", "call_function", "output"]
    target: str
    args: list[Any] = Field(default_factory=list)
    kwargs: dict[Identifier, Any] = Field(default_factory=dict)
    fxquant_layer: Name | None = None
    fxquant_item: Name | None = None
    stack_trace: str | None = None
    value: Pair | None = None
    device: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> Node:
        if self.op == "placeholder":
            _identifier(self.target)
        if self.op == "get_attr":
            _path(self.target)
        return self


class DumpFile(Schema):
    """The file."""

    stage: str
    nodes: list[Node]
    shapes: dict[Path, Annotated[list[DtypeName | Shape], Field(min_length=2, max_length=2)]]
    names: dict[str, bool] = Field(default_factory=dict)
    facts: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_graph(self) -> DumpFile:
        for name, (dtype, shape) in self.shapes.items():
            if not isinstance(dtype, str) or not isinstance(shape, list):
                raise ValueError(f"the tensor {name!r} should have a dtype and a shape")
        names = [node.name for node in self.nodes]
        if len(set(names)) < len(names):
            again = next(name for number, name in enumerate(names) if name in names[:number])
            raise ValueError(f"two nodes are called {again!r}")
        if [node.op for node in self.nodes].count("output") != 1 or self.nodes[-1].op != "output":
            raise ValueError("a graph ends with its output")
        return self
