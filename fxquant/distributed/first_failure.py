"""The first failure of several ranks, which is told on their store."""

from __future__ import annotations

import json
from typing import Any

from fxquant.errors import RankError

_KEY = "failed"


def tell(store: Any, rank: int, error: BaseException) -> None:
    """Tell the other ranks of an error of this one, unless a failure was told before.

    A RankError is told as one of the rank that it names; if it names none, it is not told.

    Raises:
        RuntimeError: If the process with the store is gone.
    """
    text = f"rank {rank} failed: {type(error).__name__}: {error}"
    if isinstance(error, RankError):
        if error.rank is None:
            return
        rank, text = error.rank, str(error)
    store.compare_set(_KEY, "", json.dumps([rank, text]))


def told(store: Any) -> RankError | None:
    """What a rank told; None if none did.

    Raises:
        RuntimeError: If the process with the store is gone.
    """
    if not store.check([_KEY]):
        return None
    rank, text = json.loads(store.get(_KEY))
    return RankError(text, rank)
