from __future__ import annotations

import pytest
import torch
from torch import nn

from fxquant.errors import ConfigurationError
from tests.passes.models import planned
from tests.support import golden, rewritten


class Table(nn.Module):
    """A table beside a value, which holds the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return x + self.table(labels)


def inputs() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 4), "labels": torch.randint(0, 9, (2,))}


def test_before_and_after() -> None:
    plan = planned(table=("embedding", [10, 4], 8, None, 0))
    before, after = rewritten(Table(), "quantize-embeddings", plan, **inputs())
    assert before == golden(
        """
        x: float32[B, 4]
        labels: int64[B]
        embedding: float32[B, 4] = embedding(@table.weight, labels)
        add: float32[B, 4] = add.Tensor(x, embedding)
        return add
        """
    )
    assert after.splitlines() == [
        *before.splitlines()[:2],
        "embedding_default: uint8[B, 4] = embedding(@table.weight_packed, labels)",
        "embedding_default_1: float32[B, 1] = embedding(@table.weight_scale, labels)",
        "embedding_default_2: uint8[B, 1] = embedding(@table.weight_zero_point, labels)",
        "dequantize_weight_default: float32[B, 4] = fxquant::dequantize_weight("
        "embedding_default, embedding_default_1, embedding_default_2, int8, 0, 4, float32)",
        "add: float32[B, 4] = add.Tensor(x, dequantize_weight_default)",
        "return add",
    ]


def test_a_float_table_stays() -> None:
    plan = planned(table=("embedding", [10, 4], None, None, 0))
    before, after = rewritten(Table(), "quantize-embeddings", plan, **inputs())
    assert after == before


def test_a_table_of_tokens_is_refused() -> None:
    plan = planned(**{"0": ("embedding", [10, 4], 8, None, 0)})
    with pytest.raises(ConfigurationError, match="layer 0: a table is stored in few bits only where"):
        rewritten(nn.Sequential(nn.Embedding(10, 4)), "quantize-embeddings", plan, input=torch.ones(2, 3).int())
