"""One resumable training loop, shared by the three models.

Nothing is drawn from global random state. Step i of a stage draws from a generator seeded by (seed, stage, i), so a run
that was killed and resumed takes the same steps as an uninterrupted one.
"""

import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

OnStep = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class Stage:
    """One model to train.

    Attributes:
        name: names the snapshot and seeds the stage.
        model: trained in place; ends with the averaged weights if `ema` is not 0.
        loss: the loss of one step; it draws all random numbers from the given generator.
        steps: optimiser steps in total.
        learning_rate: the peak, after linear warm-up over `warmup` steps; then cosine decay to a hundredth of it.
        ema: decay of the running average of the weights, 0 for none.
    """

    name: str
    model: nn.Module
    loss: Callable[[torch.Generator], Tensor]
    steps: int
    learning_rate: float
    warmup: int = 50
    ema: float = 0.0
    weight_decay: float = 0.0


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """The generator of one step of one stage."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{stage}/{step}".encode()))


def save_atomically(value: Any, path: Path) -> None:
    """Save like `torch.save`, but leave either the old file or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    os.replace(partial, path)


def _rate(stage: Stage, step: int) -> float:
    """The learning rate of a step as a fraction of the peak."""
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    through = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * through))


def fit(stage: Stage, *, seed: int, folder: Path, snapshot_every: int = 200, progress: OnStep | None = None) -> None:
    """Train `stage.model` from the last snapshot in `folder`, or from the start, to its last step.

    `progress` is called after every step with the stage's name, the steps done, the total steps and the loss.

    Raises:
        ValueError: if the snapshot was taken with another seed or another number of steps.
        FloatingPointError: if the loss is not finite.
    """
    model, path = stage.model, folder / f"{stage.name}.snapshot.pt"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=stage.weight_decay, fused=True
    )
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    run, start = {"seed": seed, "steps": stage.steps}, 0
    if path.is_file():
        snapshot = torch.load(path, weights_only=True)
        if snapshot["run"] != run:
            raise ValueError(
                f"{path} belongs to the run {snapshot['run']}, not {run}; remove it or choose another folder"
            )
        model.load_state_dict(snapshot["model"])
        optimizer.load_state_dict(snapshot["optimizer"])
        average, start = snapshot["average"], snapshot["step"]

    model.train()
    for step in range(start, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * _rate(stage, step)
        loss = stage.loss(step_generator(seed, stage.name, step))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{stage.name}: the loss of step {step} is {loss.item()}; lower the learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if stage.ema:
            # The average follows quickly at first; otherwise the random start would dominate short runs.
            keep = min(stage.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], 1 - keep)
        if (step + 1) % snapshot_every == 0 or step + 1 == stage.steps:
            save_atomically(
                {
                    "run": run,
                    "step": step + 1,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average,
                },
                path,
            )
        if progress is not None:
            progress(stage.name, step + 1, stage.steps, loss.item())
    if stage.ema:
        model.load_state_dict(average, strict=False)
    model.eval()
