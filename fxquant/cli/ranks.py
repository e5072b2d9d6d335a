"""Commands that torchrun or accelerate start in several processes: one of them prints, and errors are printed once."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fxquant.cli import output
from fxquant.distributed.launch import Place
from fxquant.errors import ConfigurationError, RankError, RanksDifferError

if TYPE_CHECKING:
    from fxquant.distributed.team import Team

_SHARED = {"quantize"}
_SEPARATE = {"eval"}  # Each process makes its share by itself, and keeps it in files.
_ALONE = {"attribute", "balance", "export", "generate", "search", "sensitivity"}
_COURTESY = 0.5  # Seconds in which a rank that failed may print its error itself.


class Terminated(SystemExit):
    """The launcher ends this process, because another one failed or somebody stopped it."""


class Ranks:
    """The processes that run one command.

    Attributes:
        place: What the launcher says about this process; None if it works alone.
        team: The processes, once they have joined.
        separate: Whether the processes do not join, so that each prints its own errors.
        shared: Whether the processes join, so that they wait for one that fails before.
        clean: Called if the process that writes is gone, which may have left unfinished files behind.
    """

    def __init__(self, place: Place | None = None) -> None:
        self.place = place
        self.team: Team | None = None
        self.separate = False
        self.shared = False
        self.clean: Callable[[], object] = lambda: None

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.place is None or self.place.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """Number of this process, and of all processes."""
        return (0, 1) if self.place is None else (self.place.rank, self.place.size)

    @property
    def group(self) -> Any:
        """The process group, for ``fxquant.compile``; None for one process."""
        if self.team is None:
            return None
        import torch.distributed as dist

        return dist.group.WORLD

    def admit(self, command: str | None) -> bool:
        """Whether this process runs a command; commands that only show something run in the first.

        Raises:
            ConfigurationError: If the command computes something and cannot share its work.
        """
        if command in _ALONE and self.place is not None:
            raise ConfigurationError(
                f"fxquant {command} runs in one process, and {self.place.size} were started; run it without torchrun "
                "or accelerate launch"
            )
        if command in _SEPARATE:
            self.separate = True
            output.out.quiet = output.err.quiet = False
        self.shared = command in _SHARED and self.place is not None
        return self.first or self.separate or command in _SHARED

    def join(self, options: Mapping[str, object], folder: Path) -> None:
        """Join the other processes, and compare versions, options and the files of a folder; nothing for one process.

        Raises:
            RanksDifferError: Names what differs.
            RankError: If another process failed or died.
        """
        if self.place is None:
            return
        import torch.distributed as dist

        from fxquant.distributed.agreement import check_alike, files_of, versions
        from fxquant.distributed.team import Team

        self.place.join()
        assert dist.group.WORLD is not None
        self.team = Team(dist.group.WORLD).__enter__()
        check_alike(self.team, {**versions(), **options, **files_of(folder)})

    def wait(self) -> None:
        """Wait for the other processes; nothing for one process."""
        if self.team is not None:
            self.team.wait()

    def count_step(self, own: int) -> int:
        """Count one more step; returns the number of steps of all processes. This process made ``own``."""
        return own if self.team is None else self.team.count("steps")

    def leave(self) -> None:
        """Say that this process is done."""
        if self.team is not None:
            import torch.distributed as dist

            self.team.__exit__(None, None, None)
            dist.destroy_process_group()

    def abandon(self, error: BaseException) -> None:
        """Leave the process group after an error: a process that still has one can hang at its end."""
        if self.team is None:
            self._leave_meeting()
            return
        import torch.distributed as dist

        self.team.__exit__(type(error), error, None)
        with suppress(RuntimeError):  # The others are gone.
            dist.destroy_process_group()

    def _leave_meeting(self) -> None:
        """After an error before all have joined."""
        if self.shared and self.place is not None:
            with suppress(RuntimeError, ImportError):  # The others are gone, or torch cannot be imported.
                from fxquant.distributed.meeting import leave

                leave(self.place)

    def failed(self, error: BaseException) -> bool:
        """Tell the other processes of an error; returns whether this process is to print it."""
        if self.place is None or self.separate:
            return True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # This process ends by itself.
        prints = self.first
        if isinstance(error, RankError) and (self.team is not None or self.shared):
            time.sleep(_COURTESY)
        if self.team is not None:
            self.team.report(error)
            prints = self.team.claim("message")
        elif self.shared:
            prints = self._tell(error)
        if isinstance(error, RankError) and error.rank == 0:
            self.clean()
        if prints:
            output.err.quiet = False
        return prints

    def _tell(self, error: BaseException) -> bool:
        """Tell processes that wait for this one to join."""
        assert self.place is not None
        try:
            from fxquant.distributed.meeting import tell
        except ImportError as broken:  # Without torch there is no store.
            error.add_note(f"The other ranks could not be told: {broken}")
            return True
        return tell(self.place, error)

    def named(self, error: BaseException) -> str:
        """The message of an error, with the rank that it is from."""
        if self.place is None or isinstance(error, (RankError, RanksDifferError)):
            return str(error)
        alike = self.team is None and not self.separate and self.first  # All may have found the mistake.
        return str(error) if alike else f"rank {self.share[0]}: {error}"

    def terminated(self) -> RankError:
        """Why the launcher ends this process."""
        from fxquant.distributed.meeting import reported
        from fxquant.distributed.team import died

        failure = reported(self.place) if self.team is None and self.place is not None else None
        if failure is not None:
            return failure
        dead = [] if self.team is None else self.team.dead()
        return died(dead[0]) if dead else RankError("the launcher stopped the processes; nothing was written")


_current: ContextVar[Ranks] = ContextVar("ranks", default=Ranks())  # noqa: B039 - never changed.


def ranks() -> Ranks:
    """The processes of the command that runs."""
    return _current.get()


@contextmanager
def on_ranks() -> Iterator[Ranks]:
    """Around a command: what a launcher says about this process, and its end with the others."""
    place = Place.of_environment()
    if place is None:
        yield ranks()
        return
    started = Ranks(place)
    token = _current.set(started)
    quiet = output.out.quiet, output.err.quiet
    output.out.quiet = output.err.quiet = not started.first
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield started
        started.leave()
    except BaseException as error:
        started.abandon(error)
        raise
    finally:
        output.out.quiet, output.err.quiet = quiet
        signal.signal(signal.SIGTERM, before)
        _current.reset(token)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(128 + number)
