"""Joining the processes that torchrun, accelerate or another launcher started."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fxquant.errors import ConfigurationError, RankError


@dataclass(frozen=True)
class Place:
    """What a launcher says about this process.

    Attributes:
        rank: Its number, from 0.
        size: Number of processes.
        local_rank: Its number on this machine, from 0.
    """

    rank: int
    size: int
    local_rank: int

    @classmethod
    def of_environment(cls) -> Place | None:
        """What the environment says; None for a process that works alone.

        Raises:
            ConfigurationError: If a variable is not a number, or the rank is not one of the processes.
        """
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
        if any(name not in os.environ for name in (*names[:2], "MASTER_ADDR", "MASTER_PORT")):
            return None
        try:
            rank, size, local = (int(os.environ.get(name, os.environ["RANK"])) for name in names)
        except ValueError as error:
            raise ConfigurationError(
                f"RANK, WORLD_SIZE and LOCAL_RANK should be numbers, as torchrun sets them: {error}"
            ) from None
        if not 0 <= rank < size:
            raise ConfigurationError(f"RANK is {rank} and WORLD_SIZE is {size}; start the processes with torchrun")
        return None if size == 1 else cls(rank, size, local)

    def device(self, name: str) -> str:
        """The device of this process: of several GPUs each process gets one."""
        return f"cuda:{self.local_rank}" if name == "cuda" else name

    def join(self) -> None:
        """Wait for all processes and make their process group: nccl for tensors on GPUs, gloo for others.

        Raises:
            RankError: If it cannot be made, or another process failed before it came here; names it.
        """
        import torch
        import torch.distributed as dist

        from fxquant.distributed.meeting import Meeting

        if torch.cuda.is_available():
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
        meeting = Meeting.of(self)
        meeting.wait()
        try:
            dist.init_process_group(store=meeting.store, rank=self.rank, world_size=self.size)
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} cannot join the {self.size} processes at {os.environ['MASTER_ADDR']}: {error}",
                self.rank,
            ) from error


def launcher_holds_store() -> bool:
    """Whether torchrun keeps the store of the processes, which then outlives each of them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
