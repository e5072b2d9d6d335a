from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.calibration.calibrate import Calibration, calls_redirected
from fxquant.capture.threads import is_traced_elsewhere, tracing_alone, uncompiled
from fxquant.capture.trace import Architecture
from fxquant.errors import ConfigurationError
from fxquant.planning.plan import Plan
from fxquant.runtime.model import GraphModel


class Small(nn.Module):
    """Compiles in a moment."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + self.mlp(x) * timestep[:, None, None]


def call(tokens: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(2, tokens, 8, generator=generator), torch.tensor([0.25, 0.5])


def compiled(model: nn.Module) -> GraphModel:
    return fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=lambda: model(*call()), measure=0)


@pytest.mark.slow
def test_threads_call_capture_load_and_compile_at_once(tmp_path: Path) -> None:
    model = Small().eval()  # Copied by the threads: making one draws from the random numbers that all threads share.
    shared = compiled(model)
    fxquant.save(shared, tmp_path / "small")
    expected = {tokens: compiled(model)(*call(tokens)) for tokens in (3, 5, 7)}
    ready = threading.Barrier(10)

    def check(run: Callable[[], nn.Module], reference: Callable[[int], Tensor], *sizes: int) -> None:
        ready.wait(60)
        for _ in range(3):
            found = run()
            for tokens in sizes:
                torch.testing.assert_close(found(*call(tokens)), reference(tokens))

    jobs: list[Any] = [
        *[(lambda: shared, expected.__getitem__, 3, 5, 7)] * 4,
        *[(lambda: compiled(copy.deepcopy(model)), expected.__getitem__, 3)] * 2,
        *[(lambda: fxquant.load(tmp_path / "small", model=copy.deepcopy(model)), expected.__getitem__, 3)] * 2,
        (lambda: fxquant.trace(copy.deepcopy(model)), lambda tokens: model(*call(tokens)), 3, 5),
        (lambda: model, lambda tokens: model(*call(tokens)), 3, 5),
    ]
    screen, graphs = sys.stderr, len(shared.graphs)
    with torch.no_grad(), ThreadPoolExecutor(len(jobs)) as pool:
        for done in [pool.submit(check, *job) for job in jobs]:
            done.result()
    assert sys.stderr is screen
    assert len(shared.graphs) == graphs + 2, "threads that meet a new shape at once share the graph of it"


def test_what_other_threads_run_is_no_part_of_a_graph() -> None:
    """One model runs in the middle of the capture of another."""
    other, inside, seen = Small().eval(), threading.Event(), []

    class Slow(Small):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            inside.set()
            thread.join(60)
            return super().forward(x, timestep)

    def meanwhile() -> None:
        inside.wait(60)
        seen.append((is_traced_elsewhere(), other(*call()), torch.ones(3).sum().item()))

    thread = threading.Thread(target=meanwhile)
    thread.start()
    architecture = Architecture.of(Slow().eval(), "timestep")
    found = architecture.capture(architecture.canonical(call(), {}))
    ((elsewhere, output, number),) = seen
    assert elsewhere
    assert number == 3
    torch.testing.assert_close(output, other(*call()))
    plain = Architecture.of(other, "timestep")
    targets = [
        [node.target for node in graph.module.graph.nodes]
        for graph in (found, plain.capture(plain.canonical(call(), {})))
    ]
    assert targets[0] == targets[1]


def test_a_model_that_another_thread_calibrates_is_refused() -> None:
    """Also where that begins between the check of the model and its copy."""
    model = Small().eval()
    calibration = Calibration(model, Architecture.of(model, "timestep"), Plan("", "", "timestep"), (), (), 0)
    with calls_redirected(model, calibration.forward):
        with pytest.raises(ConfigurationError, match=r"this Small is being calibrated by another fxquant\.compile"):
            Architecture.of(model, "timestep")
        with pytest.raises(ConfigurationError, match=r"this Small is being calibrated by another fxquant\.compile"):
            compiled(model)


@pytest.mark.parametrize("own", ["default", "force_eager"])
def test_what_is_compiled_is_compiled_again_whoever_ends_first(own: str) -> None:
    def stance() -> str:
        return torch._dynamo.eval_frame._stance.stance

    with torch.compiler.set_stance(own):
        first, second = uncompiled(), uncompiled()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert stance() == "force_eager"  # The other one still compares.
        second.__exit__(None, None, None)
        assert stance() == own
        with pytest.raises(ZeroDivisionError), uncompiled():
            _ = 1 / 0
        assert stance() == own


def test_the_lock_is_given_back_after_a_failure() -> None:
    with pytest.raises(ZeroDivisionError), tracing_alone():
        with tracing_alone():  # As when a capture within a call of a model makes another one.
            assert not is_traced_elsewhere()
        raise ZeroDivisionError
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(is_traced_elsewhere).result(60)
    torch.testing.assert_close(fxquant.trace(Small().eval())(*call()), Small().eval()(*call()))
