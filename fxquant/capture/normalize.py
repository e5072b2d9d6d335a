"""Changes the graph that ``torch.export`` returns into the form that passes expect."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.fx.graph import CodeGen

from fxquant.capture.calls import CallSpec, TensorSpec
from fxquant.errors import CaptureError
from fxquant.ir.arguments import args, item_of
from fxquant.ir.meta import ITEM
from fxquant.ir.tensors import get_tensor, set_tensor

_ASSERTIONS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")
_RANDOM_IN_TRAINING = (torch.ops.aten.dropout.default, torch.ops.aten.feature_dropout.default)


def flatten_signature(graph: fx.Graph, call: CallSpec) -> None:
    """Keep only the tensor inputs as placeholders of the graph, and make its output a flat tuple."""
    graph.set_codegen(CodeGen())
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, leaf in zip(placeholders, call.leaves, strict=True):
        if not isinstance(leaf, TensorSpec):
            if node.users:
                raise CaptureError(f"the graph reads the constant input {node.name!r} as a value; give it as a tensor")
            graph.erase_node(node)
    remaining = [node for node in graph.nodes if node.op == "placeholder"]
    for node, (name, _) in zip(remaining, call.tensors, strict=True):
        if name in call.items:
            node.meta[ITEM] = call.items[name]
    for node in list(graph.nodes):
        if node.op == "call_module" and str(node.target) == "_guards_fn":
            graph.erase_node(node)


def inline_regions(module: fx.GraphModule) -> None:
    """Inline the regions under ``no_grad`` or ``autocast``, which ``torch.export`` traces as separate graphs.

    Raises:
        CaptureError: If a region computes in another dtype than that of its values.
    """
    for node in list(module.graph.nodes):
        name = getattr(node.target, "__name__", "") if isinstance(node.target, HigherOrderOperator) else ""
        if name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            continue
        position = next(i for i, argument in enumerate(node.args) if _is_graph(argument))
        body = getattr(module, str(node.args[position].target))
        inline_regions(body)
        if name == "wrap_with_autocast":
            _refuse_casts(body, node.args[1], bool(node.args[2]))
        inputs = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        for inner in body.graph.nodes:
            if inner.op == "get_attr":
                set_tensor(module, f"{node.name}.{inner.target}", get_tensor(body, str(inner.target)))
                inner.target = f"{node.name}.{inner.target}"
        with module.graph.inserting_before(node):
            values: dict[fx.Node, Any] = dict(zip(inputs, node.args[position + 1 :], strict=True))
            results: Any = module.graph.graph_copy(body.graph, values)
        if isinstance(results, (list, tuple)):
            for user in list(node.users):
                user.replace_all_uses_with(results[item_of(user)])
                module.graph.erase_node(user)
        else:
            node.replace_all_uses_with(results)
        module.graph.erase_node(node)


def refuse_inner_graphs(graph: fx.Graph, model: str) -> None:
    """Refuse ops whose body is a graph of its own, such as ``torch.cond`` and ``flex_attention``.

    Raises:
        CaptureError: Names the op and the module that calls it.
    """
    for node in graph.nodes:
        if not isinstance(node.target, HigherOrderOperator):
            continue
        modules = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
        where = f" in module {modules[-1]!r}" if modules else ""
        name = node.target.name()
        raise CaptureError(
            f"{model} cannot be traced: its code calls {name}{where}, which runs a function as a graph of its own, "
            "and a pass sees only one graph. Give attention a mask instead (scaled_dot_product_attention, in "
            "diffusers set_attention_backend or set_attn_processor); compute both branches and choose with torch.where",
            reason=f"it calls {name}{where}",
        )


def _is_graph(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr" and "val" not in argument.meta


def _refuse_casts(body: fx.GraphModule, dtype: Any, enabled: bool) -> None:
    for node in body.graph.nodes:
        value = node.meta.get("val")
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()) or not enabled or dtype is None:
            continue
        if value.dtype not in (dtype, torch.float64):
            raise CaptureError(
                f"part of the model runs under autocast to {dtype} on values of {value.dtype}; convert the model to "
                f"{dtype}, or remove the autocast from its code"
            )


def drop_assertions(graph: fx.Graph) -> None:
    """Remove checks of the traced dtypes and sizes, and the values that only these checks read.

    The checks would fail after casts and for other shapes.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and any(name in str(node.target) for name in _ASSERTIONS):
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() and node.target not in _RANDOM_IN_TRAINING)


def loosen_views(graph: fx.Graph) -> None:
    """Replace a view by a reshape if its input is not contiguous, or comes from a convolution with such an output.

    A view fits only the memory layout of the trace. A convolution has another layout at other sizes, or when it is
    quantized.
    """
    loose: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        convolved = "conv" in str(node.target) and isinstance(value, torch.Tensor) and not value.is_contiguous()
        if convolved or not loose.isdisjoint(node.all_input_nodes):
            loose.add(node)
        if node.target is torch.ops.aten.view.default:
            source = args(node).node("self")
            if source in loose or not source.meta["val"].is_contiguous():
                node.target = torch.ops.aten.reshape.default
