from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from fxquant.ir.source_lines import short_path, source_line
from tests.support import captured, nodes_of
from tests.tiny import inputs, make_dit


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()  # The line.


def test_the_line_is_that_of_the_model_not_of_torch() -> None:
    (linear,) = nodes_of(captured(Model(), torch.randn(2, 4)).module, torch.ops.aten.linear.default)
    line = source_line(linear)
    lines, first = inspect.getsourcelines(Model.forward)
    assert line is not None
    assert (line.line, line.function) == (first + 1, "forward")
    assert line.code == lines[1].strip()
    assert line.file == "test_source_lines.py"


def test_files_of_packages_are_named_as_imported() -> None:
    module = captured(make_dit(), timestep_name="timestep", **inputs()).module
    files = {line.file for node in module.graph.nodes if (line := source_line(node))}
    assert "diffusers/models/attention.py" in files
    assert not any(file.startswith(("/", "torch/")) for file in files)
    assert "runtime_assert.py" not in files  # A line of torch.export, which it names relative to torch.
    assert short_path("/a/site-packages/b/c.py") == "b/c.py"
    assert short_path("/home/me/model.py") == "model.py"


def test_nodes_without_a_line() -> None:
    module = captured(Model(), torch.randn(2, 4)).module
    assert source_line(next(iter(module.graph.nodes))) is None
    node = module.graph.call_function(torch.relu)
    node.meta["stack_trace"] = 'File "/a/model.py", line 7, in forward'
    assert str(source_line(node)) == "model.py:7 in forward"
