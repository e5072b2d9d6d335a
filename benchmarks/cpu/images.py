"""Seconds an image: a whole pipeline of a DiT without text, with its VAE.

    python -m benchmarks.cpu.images --model dit:28 --steps 20 --markdown out/images.md

Each system runs the transformer of diffusers' ``DiTPipeline`` in a process of its own, one after the other, with
guidance: each step is one call of two samples. Scheduler (DDIM) and VAE (of the published shape of Stable Diffusion's,
with random weights) are those of diffusers in float32 for all systems. One image of one step comes first, unmeasured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.cpu.rounds import NO_TIME, Failed, Process, Settings, Stores, present, say
from benchmarks.cpu.systems import REFERENCE, Run, System, all_systems
from benchmarks.cpu.table import machine
from benchmarks.figures import write
from benchmarks.models import Task, shape_of

USUAL = (REFERENCE, "compiled bf16", "OpenVINO + NNCF int8, bf16 rest", "native W8A8, eager")

_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


class Timed(nn.Module):
    """A transformer for pipelines that is run by a system, and whose calls are timed.

    Attributes:
        seconds: Seconds of each call.
    """

    def __init__(self, run: Run, config: Any) -> None:
        super().__init__()
        self.run = run
        self.config = config
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.seconds: list[float] = []

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        began = time.perf_counter()
        call = {"hidden_states": hidden_states, "timestep": timestep, "class_labels": class_labels}
        output = self.run(call | {"return_dict": False})
        self.seconds.append(time.perf_counter() - began)
        return Transformer2DModelOutput(sample=output.float())


def pipeline_of(task: Task, run: Run) -> Any:
    """A ``DiTPipeline`` of 1,000 classes whose transformer is a system.

    Raises:
        ValueError: If the task's model is no DiT, which takes latents, timesteps and class labels.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    if "class_labels" not in task.timed:
        raise ValueError(f"{task.name}: images are made with a DiT alone, because other pipelines need text encoders")
    torch.manual_seed(0)
    made = DiTPipeline(Timed(run, task.outline().config), AutoencoderKL(**_VAE).eval(), DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    return made


def measured(task: Task, run: Run, steps: int, images: int) -> dict[str, Any]:
    """Seconds of each image, and of the transformer and the VAE within it."""
    pipe = pipeline_of(task, run)

    def image(count: int, seed: int) -> float:
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        pipe(class_labels=[seed], guidance_scale=4.0, num_inference_steps=count, generator=generator, output_type="np")
        return time.perf_counter() - began

    image(1, 0)
    pipe.transformer.seconds.clear()
    seconds = [image(steps, number) for number in range(1, images + 1)]
    return {"seconds": seconds, "transformer": sum(pipe.transformer.seconds) / images}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu.images", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", default="dit:28", help="the DiT and its number of layers")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=1, help="measured images of each system, one after the other")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--system", action="append", help=f"exact name; repeatable. Default: {'; '.join(USUAL)}")
    parser.add_argument("--minutes", type=float, help="start no system after so many minutes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--verbose", action="store_true", help="show the output of the systems' processes")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    known, names = all_systems(), options.system or [*USUAL]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown system {unknown[0]!r}; known: {'; '.join(known)}")
    try:
        shape, _ = shape_of(options.model)
    except ValueError as error:
        parser.error(str(error))
    log = None if options.verbose else subprocess.DEVNULL
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    settings = Settings(options.model, 2, options.images, options.threads, 1, log, until)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        stores = Stores(settings, Path(scratch))
        for system in present([known[name] for name in names]):
            rows.append({"system": system.name} | _one(stores, system, options.steps))
            say(f"{system.name}: {rows[-1].get('failed') or 'measured'}")
    found = machine(options.threads)
    text = f"{shape.said}, {options.model}, {options.steps} steps\n\n{table(rows)}"
    print(text)
    if options.json:
        data = {"machine": found, "model": options.model, "steps": options.steps, "rows": rows}
        write(options.json, json.dumps(data, indent=1) + "\n")
    if options.markdown:
        write(options.markdown, f"{text}\n")


def _one(stores: Stores, system: System, steps: int) -> dict[str, Any]:
    """What the process of a system measured, or why it failed."""
    settings, process = stores.settings, None
    if not settings.has_time:
        return {"failed": NO_TIME}
    try:
        folder = stores.folder(system)
        process = Process(settings, "image", system.name, folder, steps=steps, rounds=settings.rounds)
        return process.read()
    except Failed as error:
        return {"failed": str(error)}
    finally:
        if process is not None:
            process.close()


def table(rows: list[dict[str, Any]]) -> str:
    """Seconds an image, of which the transformer, and the ratio to the reference."""
    done = [row for row in rows if "failed" not in row]
    base = next((statistics.median(row["seconds"]) for row in done if row["system"] == REFERENCE), None)
    cells = []
    for row in done:
        seconds = statistics.median(row["seconds"])
        ratio = "" if base is None else f"{base / seconds:.2f}"
        cells.append([row["system"], f"{seconds:.2f}", f"{row['transformer']:.2f}", ratio])
    header = ["system", "s an image", "of it transformer", f"x {REFERENCE}"]
    text = tabulate(cells, header, "github", disable_numparse=True, colalign=["left", *["right"] * 3])
    failed = [f"- {row['system']}: {row['failed']}" for row in rows if "failed" in row]
    return "\n".join([text, *(["", "Not measured:", "", *failed] if failed else [])])


if __name__ == "__main__":
    main()
