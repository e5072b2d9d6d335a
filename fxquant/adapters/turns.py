"""Lets calls with different strengths of LoRAs, in different threads, run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, Lock


class Turns:
    """All calls of a model read the strength from one tensor, so calls of equal strength may overlap, and others wait.

    Calls wait in the order in which they come. A caller must not wait for another call while it has a turn.
    """

    def __init__(self) -> None:
        self._entry = Lock()  # Held while waiting, so that later calls do not overtake.
        self._changed = Condition()
        self._running = 0
        self.strength = 1.0

    def take(self, strength: float, change: Callable[[float], None]) -> None:
        """Wait until calls may have this strength, and count one more; :meth:`give` ends it.

        Args:
            strength: What multiplies all branches.
            change: Called with the strength if it differs from the one before.
        """
        with self._entry, self._changed:
            self._changed.wait_for(lambda: not self._running or strength == self.strength)
            if strength != self.strength:
                change(strength)
                self.strength = strength
            self._running += 1

    def give(self) -> None:
        """End what :meth:`take` began."""
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no call runs, and let none begin meanwhile."""
        with self._entry, self._changed:
            self._changed.wait_for(lambda: not self._running)
            yield
