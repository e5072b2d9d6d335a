"""A team: the ranks of a process group that work on one conversion.

Ranks meet before every exchange. They wait in Python, on the store of the process group and not in a collective, so
that a rank that fails ends the wait of the others at once, and a rank that works for hours runs into no timeout.
"""

from __future__ import annotations

import io
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fxquant.distributed.first_failure import tell, told
from fxquant.distributed.launch import launcher_holds_store
from fxquant.errors import ConfigurationError, RankError

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.1  # Seconds between two looks at the store.
_SHORT_PAUSE, _SHORTEST_PAUSE = 0.002, 0.0001  # The same if ranks meet often, and if all are there.
_LOOK = 1.0  # Seconds between two looks whether the processes of other ranks still exist.
_FAREWELL = 30.0  # Seconds for which the process with the store waits for others to read why it ends.
_made: Counter[str] = Counter()  # Teams by process group: all ranks make them in the same order.
_entered: list[Team] = []


class Team:
    """The ranks of a process group, as seen by one of them.

    All ranks call the same methods in the same order. As a context, a team tells the other ranks of an error that
    leaves the context, also those that wait in a team that was made within the context. The process that holds the
    store of the group leaves the outermost context last: it waits until the others have left theirs or are gone, for at
    most 30 seconds if there is an error.

    Args:
        group: The process group, such as ``torch.distributed.group.WORLD``.
        device: Device of the tensors of this rank. Tensors on a GPU of another rank arrive here.

    Attributes:
        rank: Number of this process in the group, from 0.
        size: Number of processes.
        device: Device of the tensors of this rank.
        on_wait: Called now and then while this rank waits for others.

    Raises:
        ConfigurationError: If this process is not in the group, or the group cannot exchange tensors of the device.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device | str = "cpu") -> None:
        if not dist.is_initialized() or dist.get_rank(group) < 0:
            raise ConfigurationError(
                "group is not a process group that this process belongs to; pass torch.distributed.group.WORLD after "
                "torch.distributed.init_process_group(), and only on the ranks of the group"
            )
        kind = torch.device(device).type
        if kind not in [entry.partition(":")[0] for entry in dist.get_backend_config(group).split(",")]:
            raise ConfigurationError(
                f"the process group has no backend for tensors on {kind}, only {dist.get_backend_config(group)}; make "
                "it by torch.distributed.init_process_group() without backend=, or with backend='cpu:gloo,cuda:nccl'"
            )
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.on_wait: Callable[[], object] = lambda: None
        self.device = torch.device(device)
        self._group = group
        number = _made[group.group_name]
        _made[group.group_name] += 1
        self._store: Any = dist.distributed_c10d.PrefixStore(f"fxquant-{number}", group.get_group_store())
        self._met = 0
        self._outer = tuple(_entered)
        self._processes: dict[int, tuple[str, int]] = {}  # Machines and process numbers, once all ranks have met.
        self._store.set(f"process-{self.rank}", json.dumps([_machine(), os.getpid()]))

    def __enter__(self) -> Self:
        _entered.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        _entered.remove(self)
        if error is not None:
            self.report(error)
            with suppress(RuntimeError):  # The process with the store is gone, so nobody is left to be told.
                self._say_farewell()
        else:
            self.leave()
        return False

    def report(self, error: BaseException) -> None:
        """Tell the other ranks of an error; they raise a :class:`RankError` when they next wait for others."""
        try:
            tell(self._store, self.rank, error)
        except RuntimeError as lost:  # The process with the store is gone, so nobody is left to be told.
            error.add_note(f"The other ranks could not be told: {lost}")

    def failure(self) -> RankError | None:
        """What another rank reported, to this team or to one in whose context it was made; None if none did."""
        for team in (self, *self._outer):
            found = told(team._store)
            if found is not None:
                return None if found.rank == self.rank else found
        return None

    def leave(self) -> None:
        """Let the process that may hold the store end after the others have read what they need."""
        self._store.set(f"left-{self.rank}", "")
        if dist.get_rank() == 0:
            self._until_left(lambda: self.failure() is not None or bool(self.dead()))
            self._say_farewell()

    def _say_farewell(self) -> None:
        """After an error: end after the others have read why, if this process may hold the store.

        A rank that has left has read the failure, or needs the store no more.
        """
        self._store.set(f"left-{self.rank}", "")
        if not self._outer and dist.get_rank() == 0 and not launcher_holds_store():
            until = time.monotonic() + _FAREWELL
            self._until_left(lambda: time.monotonic() > until)

    def _until_left(self, is_over: Callable[[], bool]) -> None:
        pause = _FIRST_PAUSE
        missing = [rank for rank in range(self.size) if rank != self.rank]
        while missing := [rank for rank in missing if not self._has_left(rank)]:
            if is_over():
                return
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _has_left(self, rank: int) -> bool:
        return bool(self._store.check([f"left-{rank}"])) or self._is_dead(rank)

    def claim(self, what: str) -> bool:
        """Whether this is the first rank that asks this, such as for the right to print a message.

        If the process with the store is gone, it is the first of the ranks that still exist.
        """
        try:
            return int(self._store.add(f"claim-{what}", 1)) == 1
        except RuntimeError:
            dead = self.dead()
            return self.rank == min(rank for rank in range(self.size) if rank not in dead)

    def count(self, what: str, more: int = 1) -> int:
        """Add to a counter that all ranks share; returns the sum so far."""
        return int(self._store.add(f"count-{what}", more))

    def wait(self, longest_pause: float = _LONGEST_PAUSE) -> None:
        """Wait until all ranks have come here.

        Args:
            longest_pause: Seconds between two looks at the most.

        Raises:
            RankError: If another rank failed or died; names it.
        """
        self._met += 1
        try:
            self._store.set(f"{self._met}-{self.rank}", "")
            missing = [rank for rank in range(self.size) if rank != self.rank]
            pause, looked = _FIRST_PAUSE, time.monotonic()
            while missing := [rank for rank in missing if not self._store.check([f"{self._met}-{rank}"])]:
                self._refuse_failed()
                if time.monotonic() - looked > _LOOK:
                    looked = time.monotonic()
                    self._refuse_dead(missing)
                    self.on_wait()
                time.sleep(pause)
                pause = min(2 * pause, longest_pause)
            self._store.delete_key(f"{self._met - 1}-{self.rank}")  # All that are here have read it.
            if not self._processes:
                held = [json.loads(self._store.get(f"process-{rank}")) for rank in range(self.size)]
                self._processes = {rank: (machine, process) for rank, (machine, process) in enumerate(held)}
        except RuntimeError as error:
            if isinstance(error, RankError):
                raise
            raise self._lost(error) from error

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank. Tensors on a GPU arrive on the device of this rank.

        Raises:
            RankError: If another rank failed or died; names it.
        """
        packed = _packed(value)  # Before the meeting: others would wait in the exchange for a rank that fails here.
        self.wait()
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, packed, group=self._group)
        except RuntimeError as error:
            raise self._lost(error) from error
        return [value if rank == self.rank else self._unpacked(data) for rank, data in enumerate(found)]

    def broadcast(self, value: T | None, source: int) -> T:
        """The value of one rank, on all ranks.

        Raises:
            RankError: If another rank failed or died; names it.
        """
        found: list[Any] = [_packed(value) if self.rank == source else None]
        self.wait()
        try:
            dist.broadcast_object_list(found, dist.get_global_rank(self._group, source), group=self._group)
        except RuntimeError as error:
            raise self._lost(error) from error
        held: T = value if self.rank == source else self._unpacked(found[0])  # type: ignore[assignment]
        return held

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum of those of all ranks, in place. They have the same bits on all ranks.

        Raises:
            RankError: If another rank failed or died; names it.
        """
        self.wait()
        self._add_up([tensor])

    def add_up_often(self, tensors: Sequence[Tensor]) -> None:
        """The same for several tensors, for many short steps: this rank looks for the others more often.

        Raises:
            RankError: If another rank failed or died; names it.
        """
        self.wait(_SHORT_PAUSE)
        self._add_up(tensors)

    def _add_up(self, tensors: Sequence[Tensor]) -> None:
        try:
            sums = [dist.all_reduce(tensor, group=self._group, async_op=True) for tensor in tensors]
            looked = time.monotonic()
            while not all(each.is_completed() for each in sums):
                if time.monotonic() - looked > _LOOK:
                    looked = time.monotonic()
                    if dead := self.dead():  # Gloo notices it by itself, nccl does not.
                        raise died(dead[0])
                time.sleep(_SHORTEST_PAUSE)
            for each in sums:
                each.wait()
        except RuntimeError as error:
            if isinstance(error, RankError):
                raise
            raise self._lost(error) from error

    def share(self, items: int) -> range:
        """The part of a number of items, in order, that this rank takes."""
        return range(items * self.rank // self.size, items * (self.rank + 1) // self.size)

    def dead(self) -> list[int]:
        """The ranks on this machine whose processes no longer exist."""
        return [rank for rank in range(self.size) if rank != self.rank and self._is_dead(rank)]

    def _is_dead(self, rank: int) -> bool:
        known = next((team._processes for team in (self, *self._outer) if team._processes), {})
        machine, process = known.get(rank, ("", 0))
        return machine == _machine() and not _exists(process)

    def _refuse_failed(self) -> None:
        failure = self.failure()
        if failure is not None:
            raise failure

    def _refuse_dead(self, waited_for: list[int]) -> None:
        for rank in waited_for:
            if self._is_dead(rank) and not self._store.check([f"{self._met}-{rank}"]):
                self._refuse_failed()
                raise died(rank)

    def _lost(self, error: BaseException) -> RankError:
        """The error for a connection that broke: it names the rank that is gone, if that is known."""
        time.sleep(_LOOK)  # So that the process of a rank that was killed is gone.
        dead = self.dead()
        try:
            failure = self.failure()
        except RuntimeError:
            failure = None
        if failure is not None:
            return failure
        if dead:
            return died(dead[0])
        return RankError(f"the connection to another rank broke, because it ended or its network failed: {error}")

    def _unpacked(self, data: bytes) -> Any:
        def place(storage: Any, location: str) -> Any:
            return storage.cuda(self.device.index) if location.startswith("cuda") else storage

        # Written a moment ago by the same program: the ranks of a group run the code that their user started.
        return torch.load(io.BytesIO(data), map_location=place, weights_only=False)


def died(rank: int) -> RankError:
    """The error for a rank whose process is gone without a word."""
    return RankError(
        f"rank {rank} died without a message: it was killed, perhaps because memory ran out, or crashed; see the "
        "report of the launcher and the log of its machine",
        rank,
    )


def _packed(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _machine() -> str:
    """Tells machines, and containers with processes of their own, apart."""
    try:
        booted = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # Not on Linux.
        booted = ""
    return f"{socket.gethostname()}-{booted}"


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # Not on Linux, or gone by now.
        return not Path("/proc/self/stat").exists()
    return state != "Z"  # A process that ended, and whose parent has not noticed yet.
