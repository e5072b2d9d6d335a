"""Minibatches mix samples of several calls, where every value says which axis has the samples."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxquant.reconstruction.cache import drop_unused, minibatch, mixable, share_alike
from tests.support import captured


class Three(nn.Module):
    """Values with samples in front, with samples behind tokens, and with none."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x * 2, x.transpose(0, 1).contiguous(), y + 1


def values() -> tuple[list[fx.Node], list[dict[fx.Node, object]], list[Tensor]]:
    module = captured(Three(), x=torch.randn(4, 5, 2), y=torch.randn(5, 2)).module
    nodes = [node for node in module.graph.nodes if node.op == "call_function" and node.name != "transpose"]
    chunks, rows = [], []
    for number in range(3):
        x = torch.arange(6.0)[:, None, None].expand(6, 5, 2) + 10 * number
        made = module(x, torch.zeros(5, 2))
        chunks.append(dict(zip(nodes, made, strict=True)))
        rows.append(x[:, 0, 0])
    return nodes, chunks, rows


def test_samples_of_several_calls_are_mixed() -> None:
    nodes, chunks, rows = values()
    assert not mixable(chunks, nodes)  # The value without samples is equal in all calls, but nobody has looked yet.
    share_alike(chunks, nodes)
    assert mixable(chunks, nodes)
    made, chosen = minibatch(chunks, nodes, rows, True, torch.Generator().manual_seed(0), 6)
    assert len(chosen) == 6
    assert len(set((chosen // 10).tolist())) == 3
    front, behind, none = (made[node] for node in nodes)
    assert torch.equal(front[:, 0, 0], 2 * chosen)
    assert torch.equal(behind[0, :, 0], chosen)
    assert torch.equal(none, torch.ones(5, 2))


def test_otherwise_a_minibatch_is_one_call() -> None:
    nodes, chunks, rows = values()
    made, chosen = minibatch(chunks, nodes, rows, False, torch.Generator().manual_seed(0), 2)
    number = int(chosen[0]) // 10
    assert torch.equal(chosen, rows[number])
    assert all(made[node] is chunks[number][node] for node in nodes)


def test_what_nobody_reads_any_more_is_freed() -> None:
    nodes, chunks, _ = values()
    drop_unused(chunks[0], {nodes[0]: 3, nodes[1]: 1}, 2)
    assert list(chunks[0]) == [nodes[0]]
