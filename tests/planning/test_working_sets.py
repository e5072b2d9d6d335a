"""What a conversion needs at a time while memory is bounded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.planning.working_sets import live_bytes


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x).relu()  # Two values of 64 channels live at once.
        left, right = up.view(-1, 2, 32).transpose(1, 2).chunk(2, dim=1)  # Views.
        return x + self.down((left * right).flatten(1).repeat(1, 2))


def _graph(dynamic: bool, dtype: torch.dtype) -> torch.fx.Graph:
    axes = ({0: torch.export.Dim("batch", min=2, max=1024)},) if dynamic else None
    example = torch.randn(4, 8, dtype=dtype)
    return torch.export.export(_Net().to(dtype), (example,), dynamic_shapes=axes).graph


def test_the_largest_set_of_live_values_is_found_for_each_batch_size() -> None:
    graph = _graph(True, torch.float32)
    assert live_bytes(graph, 1) == 4 * (64 + 64)
    assert live_bytes(graph, 100) == 4 * (64 + 64) * 100


def test_sizes_that_were_traced_and_the_dtype_count() -> None:
    assert live_bytes(_graph(False, torch.float32), 100) == 4 * (64 + 64) * 4
    assert live_bytes(_graph(True, torch.bfloat16), 100) == 2 * (64 + 64) * 100


def test_a_view_keeps_its_source_and_a_value_that_is_read_later_stays() -> None:
    graph, made = torch.fx.Graph(), {}
    ops = torch.ops.aten

    def add(name: str, target: object, arguments: tuple, *shape: int) -> None:
        read = tuple(made.get(one, one) if isinstance(one, str) else one for one in arguments)
        made[name] = graph.call_function(target, read)
        made[name].meta["val"] = torch.empty(shape, device="meta")

    made["x"] = graph.placeholder("x")
    made["x"].meta["val"] = torch.empty(10, device="meta")
    add("a", ops.relu.default, ("x",), 10)
    add("v", ops.slice.Tensor, ("a", 0, 0, 2), 2)
    add("b", ops.relu.default, ("x",), 100)
    add("c", ops.sum.default, ("b",))
    add("d", ops.add.Tensor, ("v", "c"), 2)
    graph.output(made["d"])
    # b is made while the whole of a is held for its view; then a, b and c.
    assert live_bytes(graph, 1) == 4 * (10 + 100 + 1)
