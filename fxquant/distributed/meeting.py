"""Where processes meet before they form a group, so that one that fails before then can tell the others."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fxquant.distributed import first_failure
from fxquant.distributed.launch import Place, launcher_holds_store
from fxquant.errors import ConfigurationError, RankError

_LONGEST = 1800.0  # Seconds for which a process waits for others that do not come.
_PATIENCE = 30.0  # Seconds for which a process that failed tries to tell the others, or waits until they know.
_PAUSE = 0.05  # Seconds between two looks at the store.
_made: dict[Place, Meeting] = {}


class Meeting:
    """The store of the processes that one launcher started, on which they find each other.

    Args:
        place: What the launcher says about this process.
        patience: Seconds in which the store should be there.

    Attributes:
        store: The store, for the process group too.

    Raises:
        ConfigurationError: If MASTER_PORT is not a number.
        RankError: If the store cannot be reached.
    """

    def __init__(self, place: Place, patience: float) -> None:
        self._place = place
        self._serves = place.rank == 0 and not launcher_holds_store()
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        if not port.isdecimal():
            raise ConfigurationError(f"MASTER_PORT is {port!r} and should be a number, as torchrun sets it")
        try:
            if not self._serves:
                _await(host, int(port), patience)
            store = dist.TCPStore(  # type: ignore[attr-defined]
                host,
                int(port),
                place.size,
                is_master=self._serves,
                timeout=timedelta(seconds=_LONGEST),
                wait_for_workers=False,
            )
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self.store: Any = dist.PrefixStore(f"fxquant-{attempt}", store)  # type: ignore[attr-defined]
        except (OSError, RuntimeError) as error:
            raise RankError(
                f"rank {place.rank} cannot reach the store of the {place.size} processes at {host}:{port}: {error}; "
                "check MASTER_ADDR and MASTER_PORT, and that rank 0 runs",
                place.rank,
            ) from error

    @classmethod
    def of(cls, place: Place, patience: float = _LONGEST) -> Meeting:
        """The meeting of this process, which is made once."""
        if place not in _made:
            _made[place] = cls(place, patience)
        return _made[place]

    def wait(self) -> None:
        """Wait until all processes have come here.

        Raises:
            RankError: If one failed before, or does not come within half an hour; names it.
        """
        self.store.set(f"here-{self._place.rank}", "")
        until = time.monotonic() + _LONGEST
        missing = list(range(self._place.size))
        try:
            while missing := [rank for rank in missing if not self.store.check([f"here-{rank}"])]:
                failure = self.failure()
                if failure is not None:
                    raise failure
                if time.monotonic() > until:
                    raise RankError(
                        f"rank {missing[0]} did not come within {_LONGEST:.0f} s; see the log of its machine",
                        missing[0],
                    )
                time.sleep(_PAUSE)
        except RuntimeError as error:
            if isinstance(error, RankError):
                raise
            raise RankError(f"the process with the store of all ranks is gone: {error}") from error

    def failure(self) -> RankError | None:
        """What another process reported before it came here."""
        found = first_failure.told(self.store)
        return None if found is None or found.rank == self._place.rank else found

    def report(self, error: BaseException) -> bool:
        """Tell the other processes of an error; returns whether this is the first one to tell."""
        if not isinstance(error, RankError):  # One was told, or tells that a rank cannot be reached.
            first_failure.tell(self.store, self._place.rank, error)
        return int(self.store.add("claim", 1)) == 1

    def leave(self) -> None:
        """After an error: if this process holds the store, wait until the others know, for at most 30 seconds."""
        self.store.set(f"left-{self._place.rank}", "")
        until = time.monotonic() + _PATIENCE
        everyone = [f"left-{rank}" for rank in range(self._place.size)]
        while self._serves and not self.store.check(everyone) and time.monotonic() < until:
            time.sleep(_PAUSE)


def tell(place: Place, error: BaseException) -> bool:
    """Tell the other processes of an error before all have met; returns whether this process is to print it."""
    try:
        return Meeting.of(place, _PATIENCE).report(error)
    except (RuntimeError, ConfigurationError) as lost:  # Nobody can be told.
        error.add_note(f"The other ranks could not be told: {lost}")
        return True


def reported(place: Place) -> RankError | None:
    """What another process reported, if this one has come to the meeting."""
    try:
        return _made[place].failure() if place in _made else None
    except RuntimeError:  # The process with the store is gone.
        return None


def leave(place: Place) -> None:
    """End a meeting after an error, if this process has come to it."""
    if place in _made:
        _made[place].leave()


def _await(host: str, port: int, patience: float) -> None:
    """Wait until something listens; connecting in C++ would neither end at a signal nor be silent."""
    until = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=patience).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(_PAUSE)
        else:
            return
