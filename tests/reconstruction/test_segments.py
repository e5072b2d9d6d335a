"""Graphs are parted into their blocks, and the parts together are the graph."""

from __future__ import annotations

from typing import Any

import torch

from fxquant.capture.graph import CapturedGraph
from fxquant.reconstruction.segments import segments
from fxquant.reconstruction.simulate import as_it_is, run_segment
from tests.support import captured, outputs
from tests.tiny import inputs, make_dit


def dit(layers: int = 3) -> CapturedGraph:
    return captured(make_dit(layers), timestep_name="timestep", **inputs(3))


def test_blocks_are_found_by_their_module_paths() -> None:
    names = [part.name for part in segments(dit().module.graph)]
    blocks = [name for name in names if name.startswith("transformer_blocks.")]
    # The first block's embedder is called once more, behind all blocks.
    assert blocks == [*(f"transformer_blocks.{number}" for number in range(3)), "transformer_blocks.0@2"]
    assert (names[0], names[-1]) == ("before", "behind")
    assert len(set(names)) == len(names)


def test_each_op_is_in_one_part_and_reads_what_came_before() -> None:
    graph = dit().module.graph
    parts = segments(graph)
    ops = [node for node in graph.nodes if node.op == "call_function"]
    assert [node for part in parts for node in part.nodes] == ops
    known = {node for node in graph.nodes if node.op == "placeholder"}
    for part in parts:
        assert known.issuperset(part.inputs)
        assert set(part.outputs) <= set(part.nodes)
        known.update(part.outputs)


def test_run_one_after_the_other_they_give_the_same_bits() -> None:
    module = dit().module
    tensors = list(inputs(3).values())
    held: dict[Any, Any] = dict(zip((n for n in module.graph.nodes if n.op == "placeholder"), tensors, strict=True))
    for part in segments(module.graph):
        with torch.no_grad():
            held |= run_segment(module, part, {node: held[node] for node in part.inputs}, as_it_is)
    (result,) = (node for node in module.graph.nodes if node.op == "output")
    assert all(map(torch.equal, (held[leaf] for leaf in result.args[0]), outputs(module, *tensors)))


def test_a_value_that_is_also_read_later_is_an_output_and_held_until_then() -> None:
    graph = dit().module.graph
    plain = segments(graph)
    early, late = plain[1].nodes[0], plain[3].nodes[-1]
    assert early not in plain[1].outputs and early not in plain[3].inputs
    parts = segments(graph, lambda node: (early,) if node is late else ())
    assert early in parts[1].outputs and early in parts[3].inputs
    assert [part for part in parts if early in part.freed.get(late, ())] == [parts[3]]
    assert not any(early in freed for node, freed in parts[1].freed.items())


def test_a_value_is_freed_by_its_last_reader_and_outputs_are_kept() -> None:
    for part in segments(dit().module.graph):
        own = {node: number for number, node in enumerate(part.nodes)}
        freed = {source: node for node, sources in part.freed.items() for source in sources}
        assert not freed.keys() & set(part.outputs)
        for source, node in freed.items():
            assert own[node] == max(own[user] for user in source.users if user in own)
