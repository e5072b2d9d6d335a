"""The readable text of a graph, for golden tests, dumps and people."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from fxquant.ir.histories import has_content, history_of
from fxquant.ir.meta import LAYER, PROVENANCE
from fxquant.ir.names import op_name


def graph_text(module: fx.GraphModule, *, notes: bool = False) -> str:
    """One line per node: ``name: dtype[shape] = op(arguments)``. ``@name`` is a tensor, ``B`` an open batch size.

    Args:
        module: The graph module.
        notes: Append to each line its layer, the passes that made the node, and the tensors that it reads and that
            passes made or changed.
    """
    lines = []
    for node in module.graph.nodes:
        if node.op == "call_function":
            shown = [_argument(argument) for argument in node.args]
            shown += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
            line = f"{node.name}{_type(node)} = {op_name(node.target).removesuffix('.default')}({', '.join(shown)})"
        elif node.op == "output":
            line = f"return {', '.join(_argument(leaf) for leaf in node.args[0])}"
        elif node.op == "placeholder":
            line = f"{node.name}{_type(node)}"
        else:
            continue
        known = "; ".join(_notes(module, node)) if notes else ""
        lines.append(f"{line}  # {known}" if known else line)
    return "\n".join(lines)


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"@{value.target}" if value.op == "get_attr" else value.name
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_argument, value)) + "]"
    return str(value).removeprefix("torch.")


def _type(node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    shape = ", ".join(re.sub(r"s\d+", "B", str(size)) for size in value.shape)
    return f": {str(value.dtype).removeprefix('torch.')}[{shape}]"


def _notes(module: fx.GraphModule, node: fx.Node) -> Iterator[str]:
    if LAYER in node.meta:
        yield str(node.meta[LAYER])
    passes = dict.fromkeys(origin.pass_name for origin in node.meta.get(PROVENANCE, ()))
    if passes:
        yield "by " + ", ".join(passes)
    tensors = [read for read in node.all_input_nodes if read.op == "get_attr"]
    made = [read for read in tensors if has_content(read) or history_of(module, read).root != read.target]
    changed = [read for read in tensors if read not in made and history_of(module, read).steps]
    for word, found in (("made", made), ("changed", changed)):
        if found:
            yield f"{word} {', '.join(f'@{read.target}' for read in found)}"
