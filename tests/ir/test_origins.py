from __future__ import annotations

import json

import fxquant
from fxquant.ir.meta import LAYER
from tests.tiny import calibrate, make_dit

QUERY = "transformer_blocks.0.attn1.to_q"


def test_origin() -> None:
    model = make_dit()
    (graph,) = fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model), measure=0).graphs
    node = next(node for node in graph.graph.nodes if node.meta.get(LAYER) == QUERY)
    found = fxquant.origin(node)
    assert [str(one) for one in found.made_by] == ["quantize-linears(linear_3)"]
    assert found.module == QUERY and found.roles == {QUERY: "product"}
    assert found.line.file == "diffusers/models/attention_processor.py"
    assert f"made by quantize-linears from linear_3\n  product of {QUERY}" in str(found)
    assert json.loads(json.dumps(found.to_json()))["line"]["file"] == found.line.file
    sample = fxquant.origin(next(node for node in graph.graph.nodes if node.op == "placeholder"))
    assert "captured from the model" in str(sample) and "line of the model's code is not known" in str(sample)
