"""Tensors of which each rank holds a part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from fxquant.errors import ConfigurationError
from fxquant.numerics.packing import pack, unpack
from fxquant.parallel.divisions import Division
from fxquant.parallel.exchange import share_of


@dataclass(frozen=True)
class Cut:
    """How a tensor is divided between ranks.

    Attributes:
        division: The axis, and its runs.
        bits: Bits of packed codes if these are divided along the packed axis, else 0. The runs then count codes.
    """

    division: Division
    bits: int = 0

    def part(self, tensor: Tensor, mesh: DeviceMesh) -> Tensor:
        """The part of this rank of a 1-d mesh, in memory of its own.

        Parts of all ranks in their order are the shards of a DTensor; packed codes are packed again for each rank.
        """
        size, axis = mesh.size(), self.division.axis
        codes = unpack(tensor, self.bits, self.division.whole) if self.bits else tensor
        parts = [share_of(codes, axis, self.division.runs, rank, size) for rank in range(size)]
        if self.bits:
            parts = [pack(part, self.bits) for part in parts]
        shards = distribute_tensor(torch.cat(parts, axis), mesh, [Shard(axis)], src_data_rank=None)
        return shards.to_local().detach().clone()


Cuts = dict[str, Cut]
"""How tensors are divided, by name."""


def add_cut(cuts: Cuts, target: str, cut: Cut) -> None:
    """Add a cut.

    Raises:
        ConfigurationError: If the tensor has another one.
    """
    if cuts.setdefault(target, cut) != cut:
        raise ConfigurationError(f"tensor {target!r} would be divided in two ways; give each layer a weight of its own")
