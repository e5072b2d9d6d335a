"""Which nodes belong to a layer, and as what, in every stage and for every backend."""

from __future__ import annotations

import pytest
import torch
from torch import fx

import fxquant
from fxquant.errors import UnknownNameError
from fxquant.ir.meta import ROLE
from fxquant.ir.roles import ROLES, assign_roles, module_path, nodes_of, roles_of
from fxquant.pipeline.pipeline import Pass
from tests.support import captured
from tests.tiny import calibrate, inputs, make_dit

pytestmark = pytest.mark.usefixtures("torchao_on_any_processor")
QUERY = "transformer_blocks.0.attn1.to_q"


class Roles:
    """Instrument: the roles of a layer's nodes after each pass."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.seen: dict[str, set[str]] = {}

    def before(self, step: Pass, module: fx.GraphModule) -> None:
        pass

    def after(self, step: Pass, module: fx.GraphModule, record: object) -> None:
        roles = {role for node in module.graph.nodes for name, role in roles_of(node).items() if name == self.layer}
        self.seen[step.name] = roles

    def failed(self, step: Pass, module: fx.GraphModule, error: Exception) -> None:
        pass


def compiled(recipe: str, backend: str = "fake-quant", watch: Roles | None = None) -> fxquant.api.GraphModel:
    model = make_dit()
    given = [] if watch is None else [watch]
    return fxquant.compile(
        model, recipe=recipe, backend=backend, calibrate=calibrate(model), measure=0, instruments=given
    )


def test_roles_follow_the_layer_through_the_passes() -> None:
    watch = Roles(QUERY)
    compiled("htg-w8a8", watch=watch)
    assert watch.seen["remove-no-ops"] == {"product", "weight", "bias"}
    assert {"shift", "factor", "product"} <= watch.seen["shift-channels"]
    assert {"balance", "factor", "product"} <= watch.seen["balance-channels"]
    assert "balance" not in watch.seen["absorb-affines"]
    assert watch.seen["quantize-linears"] == {
        *("product", "weight", "scale", "zero_point", "bias"),
        *("quantize", "input_scale", "input_zero_point"),
    }


@pytest.mark.parametrize("backend", ["fake-quant", "native", "torchao"])
def test_every_layer_has_a_product_and_its_weight(backend: str) -> None:
    quantized = compiled("ptq4dit-w8a8", backend)
    (graph,) = quantized.graphs
    for name in quantized.plan.layers:
        if "@" in name:  # A further use of a layer; a backend may compute equal uses once.
            continue
        roles = [node.meta[ROLE][name] for node in nodes_of(graph, name)]
        assert "product" in roles and "weight" in roles, name
        assert set(roles) <= ROLES.keys()


def test_codes_that_several_layers_read_belong_to_all() -> None:
    (graph,) = compiled("rtn-w8a8").graphs
    (codes,) = [node for node in nodes_of(graph, QUERY) if node.meta[ROLE][QUERY] == "quantize"]
    assert codes.meta[ROLE] == {QUERY.replace("to_q", name): "quantize" for name in ("to_q", "to_k", "to_v")}


def test_float_activations() -> None:
    (graph,) = compiled("rtn-w4a16").graphs
    roles = {node.meta[ROLE][QUERY] for node in nodes_of(graph, QUERY)}
    assert roles == {"product", "dequantize", "weight", "scale", "zero_point", "bias"}


def test_a_range_for_each_token() -> None:
    (graph,) = compiled("rtn-dynamic-w8a8").graphs
    found = {node.name: node.meta[ROLE][QUERY] for node in nodes_of(graph, QUERY)}
    assert list(found.values()).count("quantize") == 2  # The grid, and the codes.
    assert {"input_scale", "input_zero_point"} <= set(found.values())


def test_a_module_has_its_nodes_and_those_of_its_layers() -> None:
    (graph,) = compiled("rtn-w8a8").graphs
    found = nodes_of(graph, "transformer_blocks.0.attn1")
    assert torch.ops.aten.scaled_dot_product_attention.default in {node.target for node in found}
    assert set(nodes_of(graph, QUERY)) < set(found)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    (graph,) = compiled("rtn-w8a8").graphs
    with pytest.raises(UnknownNameError, match=r"unknown layer 'transformer_blocks.0.attn.to_q'. Known: .*attn1.to_q"):
        nodes_of(graph, "transformer_blocks.0.attn.to_q")


def test_nodes_that_torch_export_added_have_no_module() -> None:
    module = captured(make_dit(), timestep_name="timestep", **inputs()).module
    paths = {module_path(node) for node in module.graph.nodes}
    assert "transformer_blocks.0.attn1" in paths
    assert not any(path.startswith("_") for path in paths)


def test_roles_are_assigned_anew() -> None:
    (graph,) = compiled("rtn-w8a8").graphs
    before = {node.name: dict(roles_of(node)) for node in graph.graph.nodes}
    assign_roles(graph.graph)
    assert {node.name: roles_of(node) for node in graph.graph.nodes} == before
