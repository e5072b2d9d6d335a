"""Which nodes belong to a layer, and what each of them does there: its role.

``node.meta[LAYER]`` names the layer that a node works for. Passes and backends rely on it, and it has one value. But
the codes of an input may serve three linears, and the nodes that read weights and scales have no such entry. So
:func:`assign_roles` derives the members of all layers from the graph alone: what a product reads, by the names of its
arguments. It knows no pass and no backend by name. The pipeline calls it after each pass that changed the graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from fxquant.errors import UnknownNameError, check_type
from fxquant.ir.arguments import args
from fxquant.ir.layers import is_cast
from fxquant.ir.meta import LAYER, PROVENANCE, ROLE
from fxquant.ir.names import base_name
from fxquant.ir.time_tables import plus_rows, reads_rows
from fxquant.text import is_inside, nearest

ROLES = {
    "product": "multiplies the input and the weight, or looks up rows of a table",
    "weight": "reads the weight, or its codes",
    "scale": "reads the scale of the weight",
    "zero_point": "reads the zero point of the weight",
    "sums": "reads numbers derived from the weight, such as sums of its codes",
    "dequantize": "makes numbers from codes",
    "bias": "reads or selects the bias",
    "quantize": "makes the codes of the input",
    "input_scale": "reads or computes the scale of the input",
    "input_zero_point": "reads or computes the zero point of the input",
    "balance": "scales the channels of the input",
    "shift": "shifts the channels of the input or of the output",
    "factor": "reads the numbers of a balance or shift, or the signs of a rotation",
    "rotate": "rotates the channels of the input",
    "branch": "adds a product of low rank to the output, or reads its factors",
    "observe": "records the input",
    "cast": "casts to another dtype",
    "layout": "changes the shape or order of a value",
    "part": "works for the layer in another way",
}
"""All roles, and what a node with the role does."""

_PRODUCTS = ("linear", "conv", "embedding", "matmul")  # Parts of the names of ops.
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # torch.export writes this for nodes that no module made.
_LAYOUT = ("view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "constant_pad_nd", "contiguous", "expand")
_BY_ARGUMENT = {
    "weight": "weight",
    "wq": "weight",
    "w_scale": "scale",
    "w_zero_point": "zero_point",
    "w_sums": "sums",
    "w_excess": "sums",
    "offset": "sums",
    "bias": "bias",
    "x_scale": "input_scale",
    "x_zero_point": "input_zero_point",
}
_INPUTS = ("xq", "input", "x", "self", "indices")


def assign_roles(graph: fx.Graph) -> None:
    """Give every node that belongs to layers ``meta[ROLE]``: a dict from the name of the layer to the node's role."""
    for node in graph.nodes:
        node.meta.pop(ROLE, None)
    named: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if LAYER in node.meta:
            named.setdefault(str(node.meta[LAYER]), []).append(node)
    for layer, nodes in named.items():
        products = [node for node in nodes if _is_product(node)] or nodes[-1:]
        for product in products:
            _assign(product, layer)
    for node in graph.nodes:  # What no product reads directly.
        if LAYER in node.meta and ROLE not in node.meta:
            role = _own_role(node)
            _mark(node, str(node.meta[LAYER]), role)
            if role == "branch":
                for name in ("a", "b"):
                    _mark_operand(args(node).node(name), str(node.meta[LAYER]), role)


def roles_of(node: fx.Node) -> dict[str, str]:
    """The layers that a node belongs to, with its role in each; empty if it belongs to none."""
    found: dict[str, str] = node.meta.get(ROLE, {})
    return found


def nodes_of(graph: fx.Graph | fx.GraphModule, layer: str) -> list[fx.Node]:
    """All nodes of a layer, in the order of the graph; ``node.meta["fxquant_role"][layer]`` is the role of each.

    Args:
        graph: A graph, such as ``quantized.graphs[0]``.
        layer: Name of a layer, such as ``transformer_blocks.0.attn1.to_q``; or the path of another module, whose nodes
            are those that its code made, and those of the layers in it.

    Raises:
        UnknownNameError: If the graph has no such layer or module. The message names the nearest ones.
        ConfigurationError: If an argument is of another type.
    """
    check_type("graph", graph, (fx.Graph, fx.GraphModule), "a graph, such as quantized.graphs[0]")
    check_type("layer", layer, str, "the name of a layer or the path of a module")
    found_graph = graph.graph if isinstance(graph, fx.GraphModule) else graph
    assign_roles(found_graph)
    nodes = [node for node in found_graph.nodes if layer in roles_of(node)]
    nodes = nodes or [node for node in found_graph.nodes if _is_inside(node, layer)]
    if not nodes:
        known = {name: None for node in found_graph.nodes for name in (*roles_of(node), *_modules(node)) if name}
        raise UnknownNameError("layer", layer, nearest(layer, known))
    return nodes


def module_path(node: fx.Node) -> str:
    """Path of the module whose code made a node, such as ``transformer_blocks.0.attn1``; empty for the model itself."""
    return next(reversed([*_modules(node)]), "")


def _modules(node: fx.Node) -> Iterator[str]:
    return (str(path) for path, _ in node.meta.get("nn_module_stack", {}).values() if path != _NO_MODULE)


def _is_inside(node: fx.Node, module: str) -> bool:
    names = (module_path(node), *roles_of(node))
    return any(is_inside(name, module) for name in names)


def _is_product(node: fx.Node) -> bool:
    name = base_name(node.target)
    return "quantize" not in name and any(part in name for part in _PRODUCTS)


def _own_role(node: fx.Node) -> str:
    name = base_name(node.target)
    if name.endswith("channel_affine"):
        return "balance" if args(node).shift is None else "shift"
    if name.endswith("hadamard"):
        return "rotate"
    if name.endswith("low_rank"):
        return "branch"
    if name.endswith("observe"):
        return "observe"
    if "dequantize" in name:
        return "dequantize"
    if "quantize" in name or name.endswith(("token_grid", "token_scale", "block_scale")):
        return "quantize"
    if _is_product(node):
        return "product"
    if node.op == "call_function" and is_cast(node):
        return "cast"
    return "layout" if name in _LAYOUT else "part"


def _mark(node: fx.Node, layer: str, role: str) -> None:
    node.meta.setdefault(ROLE, {}).setdefault(layer, role)


def _assign(product: fx.Node, layer: str) -> None:
    if not _is_product(product):
        _mark_look_up(product, layer)
        return
    _mark(product, layer, "product")
    for name, value in args(product).by_name().items():
        if not isinstance(value, fx.Node):
            continue
        if name in _BY_ARGUMENT:
            _mark_operand(value, layer, _BY_ARGUMENT[name])
        elif name in _INPUTS:
            _mark_input(value, layer)
    total = plus_rows(product) if product.op == "call_function" else None
    if total is not None:
        _mark(total, layer, "shift")
        _mark_operand(args(total).node("other"), layer, "bias")


def _mark_look_up(node: fx.Node, layer: str) -> None:
    """Mark what passes made to look up rows of a table in few bits, and the tensors of the table."""
    endings = {"scale": "scale", "zero_point": "zero_point", "packed": "weight", "weight": "weight"}
    if node.op == "get_attr":
        found = (role for ending, role in endings.items() if str(node.target).endswith(ending))
        _mark(node, layer, next(found, "part"))
    elif node.op == "call_function" and (node.meta.get(LAYER) == layer or PROVENANCE in node.meta):
        _mark(node, layer, _own_role(node))
        for source in node.all_input_nodes:
            _mark_look_up(source, layer)


def _mark_operand(node: fx.Node, layer: str, role: str) -> None:
    """Mark what a product reads besides its input, and the ops between it and the stored tensor."""
    if node.op == "get_attr":
        _mark(node, layer, role)
    elif "dequantize" in base_name(node.target):
        _mark(node, layer, "dequantize")
        for name, part in args(node).by_name().items():
            if isinstance(part, fx.Node):
                grid = "scale" if "scale" in name else "zero_point" if "zero_point" in name else role
                _mark_operand(part, layer, grid)
    elif reads_rows(node):
        selected = args(node).node("self")
        _mark(node, layer, role)
        _mark(selected, layer, role)
        _mark_operand(args(selected).node("self"), layer, role)
    elif node.op == "call_function" and is_cast(node):
        _mark(node, layer, "cast")
        _mark_operand(args(node).node("self"), layer, role)
    elif base_name(node.target) in _LAYOUT and PROVENANCE in node.meta:
        _mark(node, layer, "layout")
        _mark_operand(args(node).node("self"), layer, role)
    elif PROVENANCE in node.meta and role.startswith("input_"):  # Computed at run time.
        _mark(node, layer, role)
        for source in node.all_input_nodes:
            if _own_role(source) == "quantize":
                _mark(source, layer, "quantize")


def _mark_input(node: fx.Node, layer: str) -> None:
    """Mark what passes put between the input of a layer and its product."""
    if node.op != "call_function":
        if node.op == "get_attr":
            _mark(node, layer, "weight")
        return
    role, given = _own_role(node), args(node).by_name()
    if isinstance(node.meta.get("val"), torch.Tensor) and _is_product(node):
        if not node.meta["val"].is_floating_point() and PROVENANCE in node.meta:
            _mark(node, layer, "quantize")  # The kernel of the layer before also makes the codes of this one.
        return
    if base_name(node.target) == "getitem" and PROVENANCE in node.meta:
        _mark(node, layer, "quantize")
        source = node.args[0]
        if isinstance(source, fx.Node):
            _mark(source, layer, "quantize")
        return
    made = PROVENANCE in node.meta
    if role in ("balance", "shift", "rotate") and made:
        _mark(node, layer, role)
        for name in ("scale", "shift", "signs"):
            if isinstance(given.get(name), fx.Node):
                _mark_operand(given[name], layer, "factor")
    elif role in ("observe", "quantize", "dequantize") or (
        role in ("layout", "cast") and made and node.meta.get(LAYER) == layer
    ):
        _mark(node, layer, role)
    else:
        return
    source = next((given[name] for name in _INPUTS if isinstance(given.get(name), fx.Node)), None)
    if source is not None:
        _mark_input(source, layer)
