"""Arguments of nodes by the names of their schemas."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from fxquant.errors import ArgumentError
from fxquant.ir.arguments import args, item_of, source_of

aten = torch.ops.aten


def nodes() -> tuple[fx.Graph, fx.Node, fx.Node]:
    graph = fx.Graph()
    return graph, graph.placeholder("x"), graph.placeholder("w")


def test_an_argument_is_found_by_name_however_it_is_given() -> None:
    graph, x, w = nodes()
    by_position = graph.call_function(aten.linear.default, (x, w))
    by_name = graph.call_function(aten.linear.default, (x,), {"weight": w, "bias": x})
    assert (args(by_position).input, args(by_position).weight, args(by_position).bias) == (x, w, None)
    assert (args(by_name).input, args(by_name).weight, args(by_name).bias) == (x, w, x)


def test_an_argument_that_is_not_given_has_the_default_of_the_schema() -> None:
    graph, x, _ = nodes()
    gelu = graph.call_function(aten.gelu.default, (x,))
    part = graph.call_function(aten.slice.Tensor, (x, 1))
    assert args(gelu).approximate == "none"
    assert (args(part).dim, args(part).start, args(part).step) == (1, None, 1)


def test_an_argument_that_is_only_given_by_name() -> None:
    graph, x, w = nodes()
    total = graph.call_function(aten.add.Tensor, (x, w), {"alpha": 2})
    assert args(total).alpha == 2
    assert args(total).is_keyword("alpha") and not args(total).is_keyword("other")


def test_an_unknown_name_names_the_op_and_its_schema() -> None:
    graph, x, w = nodes()
    node = graph.call_function(aten.linear.default, (x, w))
    with pytest.raises(ArgumentError, match=r"node linear_default has no argument 'wq'.*aten::linear\(Tensor input"):
        _ = args(node).wq
    with pytest.raises(ArgumentError, match="getitem"):
        _ = args(graph.call_function(operator.getitem, (x, 0))).self


def test_a_required_argument_that_is_missing_is_an_error() -> None:
    graph, x, _ = nodes()
    with pytest.raises(ArgumentError, match=r"linear_default lacks the argument 'weight' of aten::linear"):
        _ = args(graph.call_function(aten.linear.default, (x,))).weight


def test_node_refuses_what_is_not_a_node() -> None:
    graph, x, _ = nodes()
    scaled = graph.call_function(aten.mul.Tensor, (x, 2.0))
    assert args(scaled).node("self") is x
    with pytest.raises(ArgumentError, match=r"'other' of node mul_tensor is 2.0, not a node.*aten::mul"):
        args(scaled).node("other")


def test_replaced_gives_the_positional_arguments_with_some_changed() -> None:
    graph, x, w = nodes()
    node = graph.call_function(aten.layer_norm.default, (x, [4]))
    assert args(node).replaced(input=w) == (w, [4])
    assert args(node).replaced(bias=w) == (x, [4], None, w)
    assert args(node).replaced(eps=1e-3) == (x, [4], None, None, 1e-3)
    with pytest.raises(ArgumentError, match=r"'approximate' .* cannot be given by position"):
        args(graph.call_function(aten.gelu.default, (x,))).replaced(approximate="tanh")


def test_source_and_item_need_no_schema() -> None:
    graph, x, _ = nodes()
    parts = graph.call_function(aten.chunk.default, (x, 2))
    second = graph.call_function(operator.getitem, (parts, 1))
    assert source_of(second) is parts and item_of(second) == 1
    with pytest.raises(ArgumentError, match="first argument of node x is None"):
        source_of(x)
    with pytest.raises(ArgumentError, match="takes item x"):
        item_of(graph.call_function(operator.getitem, (parts, x)))


def test_replaced_takes_an_argument_named_self() -> None:
    graph, x, w = nodes()
    assert args(graph.call_function(aten.mul.Tensor, (x, 2.0))).replaced(self=w) == (w, 2.0)


def test_without_leaves_an_argument_to_its_default() -> None:
    graph, x, w = nodes()
    linear = graph.call_function(aten.linear.default, (x, w, x))
    norm = graph.call_function(aten.layer_norm.default, (x, [4], w, x))
    assert args(linear).without("bias") == (x, w)
    assert args(norm).without("weight") == (x, [4], None, x)
    assert args(norm).without("eps") == (x, [4], w, x)
    with pytest.raises(ArgumentError, match=r"'weight' of aten::linear.* has no default"):
        args(linear).without("weight")


def test_gives_tells_arguments_from_defaults() -> None:
    graph, x, w = nodes()
    linear = graph.call_function(aten.linear.default, (x,), {"weight": w})
    assert args(linear).gives("weight") and not args(linear).gives("bias")
    assert args(linear).by_name() == {"input": x, "weight": w, "bias": None}
