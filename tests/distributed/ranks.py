"""Runs a function in several processes that form a process group.

The processes are forked from one that has imported what they need, because importing torch takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_PRELOADED = ["torch", "torch.distributed", "diffusers", "fxquant", "fxquant.api", "tests.distributed.work"]
_LONGEST = 900  # Seconds; tests run on machines that others use too.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)


class Ended(Exception):
    """Stands for the result of a process that died."""


def run_ranks(
    function: Callable[..., Any], size: int, *arguments: Any, environment: Mapping[str, str] | None = None
) -> list[Any]:
    """The results of ``function(rank, size, *arguments)`` in each process, or what it raised.

    Args:
        function: A function of a module, which is imported by each process.
        size: Number of processes.
        arguments: Further arguments, which are pickled.
        environment: Environment variables beside those that torchrun sets.
    """
    port = _free_port()
    pipes = [_context.Pipe(duplex=False) for _ in range(size)]
    started: Sequence[Any] = [
        _context.Process(
            target=_rank, args=(function, rank, size, port, dict(environment or {}), pipe[1], arguments), daemon=True
        )
        for rank, pipe in enumerate(pipes)
    ]
    for process, (_, sender) in zip(started, pipes, strict=True):
        process.start()
        sender.close()
    results: list[Any] = []
    for process, (receiver, _) in zip(started, pipes, strict=True):
        try:
            got = receiver.poll(_LONGEST)
            results.append(
                pickle.loads(receiver.recv_bytes()) if got else TimeoutError(f"no result after {_LONGEST} s")
            )
        except EOFError:
            process.join()
            results.append(Ended(process.exitcode))
    for process in started:
        process.join(30)
        if process.is_alive():
            process.kill()
            raise TimeoutError("a process did not end")
    return results


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _rank(
    function: Callable[..., Any],
    rank: int,
    size: int,
    port: int,
    environment: Mapping[str, str],
    sender: Any,
    arguments: Sequence[Any],
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    import torch

    torch.set_num_threads(1)
    try:
        result = function(rank, size, *arguments)
    except Exception as error:
        error.add_note(traceback.format_exc())
        result = error
    sender.send_bytes(pickle.dumps(result))  # As bytes, or tensors would be in memory that ends with this process.
