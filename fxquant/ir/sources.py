"""Frees the sources of graphs that are gone.

Whenever ``torch.fx`` makes the code of a graph, it keeps its source for tracebacks, for as long as the process lives. A
conversion makes the code of dozens of graphs. So a process that loads, converts or copies models again and again would
grow, by about one megabyte each time for a small model.
"""

from __future__ import annotations

import gc
import linecache
import threading
from types import FunctionType

from torch.fx import graph_module

EVERY = 128
"""So many sources are added before those of graphs that are gone are looked for, which takes a tenth of a second."""

_NAMED = "<eval_with_key>"  # How torch.fx names the code of a graph.


class _Sources:
    """The sources that ``torch.fx`` keeps."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept = 0  # Their number at the last look.

    def forget(self) -> None:
        sources: dict[str, str] = getattr(getattr(graph_module, "_loader", None), "eval_cache", {})
        if len(sources) < self._kept + EVERY or not self._lock.acquire(blocking=False):  # Another thread is at it.
            return
        try:
            # Names first: code that another thread makes meanwhile keeps its source.
            names = [name for name in list(sources) if name.startswith(_NAMED)]
            used = {one.__code__.co_filename for one in gc.get_objects() if type(one) is FunctionType}
            for name in names:
                if name not in used:
                    sources.pop(name, None)
                    linecache.cache.pop(name, None)
            self._kept = len(sources)
        finally:
            self._lock.release()


_sources = _Sources()


def forget_sources() -> None:
    """Free the sources of graphs that are gone, if there are many new ones since the last look."""
    _sources.forget()
