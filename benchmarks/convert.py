"""Time and memory of converting DiT-XL/2 at full size, with random weights.

    python benchmarks/convert.py --layers 4,14,28,56 --recipe ptq4dit-w8a8 --json out/convert.json

Every case runs in its own process, so that peak memory is measured per case. This process stays small, because a child
starts with the peak of its parent. Measurements per case:

* conversion: seconds of capture, of each pass (its verification included) and of lowering. Calibration forwards and
  the measurement of the output error are timed separately and excluded.
* memory: peak resident size of the process while it builds the float model, converts and saves it, over the bytes of
  the float weights. It includes everything: the interpreter, imported libraries, the user's float model, the
  calibration statistics and the memory of the forwards. ``own`` is the peak minus the resident size after the imports.
* the checkpoint: bytes of its tensors over the float weights, and seconds of loading it in a new process, which must
  yield the same bits.
* statistics: bytes that calibration recorded; second moments, which GPTQ requests, are counted separately.
* overhead of observing: the time of an observed forward over a plain one, interleaved, medians.

Growth is the exponent of layers in a fit of log seconds over log layers; 1 is linear.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

LAYERS = (4, 14, 28, 56)
RECIPES = ("rtn-w8a8", "ptq4dit-w8a8", "ptq4dit-w4a8")
_WIDTH, _HEADS, _LATENT = 72, 16, 32
_OUTPUT = "output.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", default="28", help="transformer blocks, joined by commas; DiT-XL/2 has 28")
    parser.add_argument("--recipe", default=",".join(RECIPES), help="recipes, joined by commas")
    parser.add_argument("--timesteps", type=int, default=10, help="calibration forwards, one timestep each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--forwards", type=int, default=7, help="pairs of plain and observed forwards; 0 for none")
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        task = json.loads(options.worker)
        print(json.dumps({"convert": convert, "load": load, "observe": observe}[task.pop("do")](**task)))
        return
    layers = [int(part) for part in options.layers.split(",")]
    cases = [(recipe, count) for recipe in options.recipe.split(",") for count in layers]
    shared = {"threads": options.threads, "timesteps": options.timesteps}
    measured = []
    for recipe, count in cases:
        with tempfile.TemporaryDirectory() as folder:
            case = run("convert", recipe=recipe, layers=count, folder=folder, **shared)
            case |= run("load", layers=count, folder=folder, threads=options.threads)
        measured.append(case)
        print(_line(case), file=sys.stderr, flush=True)
    report: dict[str, Any] = {"machine": machine(), "options": shared, "cases": measured, "growth": growth(measured)}
    if options.forwards:
        arguments = {"layers": min(layers, key=lambda n: abs(n - 28)), "recipe": cases[0][0], **shared}
        report["observing"] = run("observe", forwards=options.forwards, **arguments)
    show(report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def run(what: str, **arguments: Any) -> dict[str, Any]:
    """Carry out one task in a new process and return what it measured."""
    command = [sys.executable, __file__, "--worker", json.dumps({"do": what, **arguments})]
    # Passive waiting: threads that spin while they wait would be counted as CPU time.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "OMP_NUM_THREADS": str(arguments["threads"])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- in the processes of the cases ----------------------------------------------------------------------------------


class Stopwatch:
    """Accumulates wall and CPU seconds by name."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall[name] += time.perf_counter() - wall
            self.cpu[name] += time.process_time() - cpu

    def watch(self, holder: Any, attribute: str, name: str, after: Callable[[Any], None] | None = None) -> None:
        """Time every call of a function from now on; ``after`` is called with its result."""
        function = getattr(holder, attribute)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                result = function(*args, **kwargs)
            if after is not None:
                after(result)
            return result

        setattr(holder, attribute, timed)


def convert(recipe: str, layers: int, timesteps: int, threads: int, folder: str) -> dict[str, Any]:
    """Compile, save, and measure both."""
    import diffusers
    import torch
    from safetensors.torch import save_file

    import fxquant
    from fxquant import api
    from fxquant.backends.fake_quant import FakeQuant
    from fxquant.calibration.calibrate import Calibration
    from fxquant.capture.trace import Architecture
    from fxquant.pipeline.pipeline import PASSES, Pipeline
    from fxquant.statistics.collection import Statistics

    _ = diffusers.DiTTransformer2DModel, [PASSES[name] for name in PASSES]  # Imported on first use.
    torch.set_num_threads(threads)
    peaks = {"imports": peak()}
    model = build(layers)
    peaks["model"] = peak()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    watch = Stopwatch()
    passes: dict[str, float] = defaultdict(float)

    def keep_records(records: Any) -> None:
        for record in records:
            passes[record.text.partition("{")[0]] += record.seconds

    watch.watch(Architecture, "of", "capture")
    watch.watch(Architecture, "capture", "capture")
    watch.watch(Pipeline, "run", "passes", keep_records)
    watch.watch(FakeQuant, "finish", "lower")
    watch.watch(Calibration, "_capture", "first call")
    recorded = Statistics(transient=True)
    held: dict[str, int] = {}

    def weigh(_: object) -> None:
        held["moments"] = sum(one.moments.nbytes for one in recorded.values() if one.moments)
        held["statistics"] = recorded.nbytes - held["moments"]

    watch.watch(api, "run_calibration", "calibration", weigh)
    watch.watch(api, "output_sqnr", "measurement")

    def calibrate() -> None:
        for step in range(timesteps):
            call(model, 1, 999 - step * (1000 // timesteps))

    with watch("compile"):
        quantized = fxquant.compile(model, recipe=recipe, calibrate=calibrate, measure=1, statistics=recorded)
    peaks["compile"] = peak()
    with watch("save"):
        fxquant.save(quantized, folder, overwrite=True)
    peaks["save"] = peak()
    save_file({"output": call(quantized, 2, 500)}, Path(folder) / _OUTPUT)
    sizes = {path.name: path.stat().st_size for path in Path(folder).iterdir() if path.name != _OUTPUT}
    return {
        "recipe": recipe,
        "layers": layers,
        "float_bytes": weights,
        "seconds": {"wall": _parts(watch.wall), "cpu": _parts(watch.cpu)},
        "passes": {**passes, "verification on entry": watch.wall["passes"] - sum(passes.values())},
        "peak_bytes": peaks,
        "recorded_bytes": held,
        "peak": peaks["save"] / weights,
        "own": (peaks["save"] - peaks["imports"]) / weights,
        "files": sizes,
        "size": sizes["diffusion_pytorch_model.safetensors"] / weights,
    }


def _parts(times: dict[str, float]) -> dict[str, float]:
    forwards = times["calibration"] - times["first call"]
    parts = {name: times[name] for name in ("capture", "passes", "lower", "measurement", "save")}
    parts["calibration forwards"] = forwards
    parts["conversion"] = times["compile"] - forwards - times["measurement"]
    parts["other"] = parts["conversion"] - times["capture"] - times["passes"] - times["lower"]
    return parts


def load(layers: int, folder: str, threads: int) -> dict[str, Any]:
    """Load in a process without the float model, and compare the output bit for bit."""
    import diffusers
    import torch
    from safetensors.torch import load_file

    import fxquant

    _ = diffusers.DiTTransformer2DModel  # Imported on first use.
    torch.set_num_threads(threads)
    imports = peak()
    expected = load_file(Path(folder) / _OUTPUT)["output"]
    (Path(folder) / _OUTPUT).unlink()
    watch = Stopwatch()
    with watch("load"):
        model = fxquant.load(folder)
    loaded = peak()
    same = torch.equal(call(model, 2, 500), expected)
    return {
        "load_seconds": {"wall": watch.wall["load"], "cpu": watch.cpu["load"]},
        "load_peak_bytes": {"imports": imports, "load": loaded},
        "same_bits": same,
    }


def observe(recipe: str, layers: int, timesteps: int, threads: int, forwards: int) -> dict[str, Any]:
    """Time interleaved plain and observed forwards."""
    import torch

    from fxquant.calibration.calibrate import Calibration
    from fxquant.capture.trace import Architecture
    from fxquant.pipeline.recipes import make_recipe
    from fxquant.planning.plan import Plan

    torch.set_num_threads(threads)
    model = build(layers)
    chosen = make_recipe(recipe)
    architecture = Architecture.of(model, "timestep")
    calibration = Calibration(
        model, architecture, Plan(str(chosen), "", "timestep"), chosen.prepare, chosen.convert, keep=0
    )
    call(calibration.forward, 2, 0)
    call(model, 2, 0)
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(forwards):
        step = 999 - number * (1000 // timesteps)
        for name, target in (("plain", model), ("observed", calibration.forward)):
            watch = Stopwatch()
            with watch("forward"):
                call(target, 2, step)
            seconds[f"{name} wall"].append(watch.wall["forward"])
            seconds[f"{name} cpu"].append(watch.cpu["forward"])
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {kind: medians[f"observed {kind}"] / medians[f"plain {kind}"] for kind in ("wall", "cpu")}
    return {"recipe": recipe, "layers": layers, "batch": 2, "forwards": forwards, "medians": medians, "ratio": ratios}


def build(layers: int) -> Any:
    """DiT-XL/2 with random weights and `layers` blocks; parameters that are initialized to zero become random."""
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=_HEADS,
        attention_head_dim=_WIDTH,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=_LATENT,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def call(model: Any, batch: int, step: int) -> Any:
    """One forward at a denoising step."""
    import torch

    generator = torch.Generator().manual_seed(step)
    latents = torch.randn(batch, 4, _LATENT, _LATENT, generator=generator)
    labels = torch.randint(0, 1000, (batch,), generator=generator)
    with torch.no_grad():
        return model(latents, timestep=torch.full((batch,), step), class_labels=labels).sample


def peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- the report -----------------------------------------------------------------------------------------------------


def growth(cases: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each recipe, the exponent of layers in a log-log fit of the seconds of capture and passes."""
    found: dict[str, dict[str, float]] = {}
    for recipe in dict.fromkeys(case["recipe"] for case in cases):
        own = [case for case in cases if case["recipe"] == recipe]
        if len(own) > 1:
            found[recipe] = {kind: _exponent(own, kind) for kind in ("wall", "cpu")}
    return found


def _exponent(cases: list[dict[str, Any]], kind: str) -> float:
    x = [math.log(case["layers"]) for case in cases]
    y = [math.log(_conversion(case, kind)) for case in cases]
    return statistics.linear_regression(x, y).slope


def _conversion(case: dict[str, Any], kind: str) -> float:
    seconds: dict[str, float] = case["seconds"][kind]
    return seconds["capture"] + seconds["passes"]


def machine() -> dict[str, Any]:
    """The machine and the versions that the numbers were measured with."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "numpy")},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def _line(case: dict[str, Any]) -> str:
    return f"{case['recipe']} {case['layers']}: {_conversion(case, 'wall'):.1f} s, peak {case['peak']:.2f} x"


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    from tabulate import tabulate

    cases = report["cases"]
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()), "\n")
    rows = []
    for case in cases:
        wall = case["seconds"]["wall"]
        rows.append(
            {
                "recipe": case["recipe"],
                "layers": case["layers"],
                "capture s": wall["capture"],
                "passes s": wall["passes"],
                "both, CPU s": _conversion(case, "cpu"),
                "other s": wall["other"] + wall["lower"],
                "save s": wall["save"],
                "load s": case["load_seconds"]["wall"],
                "same bits": "yes" if case["same_bits"] else "NO",
                "forwards s": wall["calibration forwards"],
            }
        )
    print(tabulate(rows, headers="keys", floatfmt=".2f", tablefmt="github"), "\n")
    rows = []
    for case in cases:
        name = {"recipe": case["recipe"], "layers": case["layers"]}
        rows.append(name | {key: round(value, 2) for key, value in case["passes"].items()})
    print("Seconds of each pass:\n")
    print(tabulate(rows, headers="keys", floatfmt=".2f", tablefmt="github"), "\n")
    rows = []
    for case in cases:
        rows.append(
            {
                "recipe": case["recipe"],
                "layers": case["layers"],
                "float GB": case["float_bytes"] / 1e9,
                **{f"peak {when} GB": size / 1e9 for when, size in case["peak_bytes"].items()},
                "peak/float": case["peak"],
                "own/float": case["own"],
                "load peak GB": case["load_peak_bytes"]["load"] / 1e9,
                "file/float": round(case["size"], 4),
            }
        )
    print(tabulate(rows, headers="keys", floatfmt=("", "", *[".2f"] * 8, ".4f"), tablefmt="github"), "\n")
    for recipe, exponents in report["growth"].items():
        shown = ", ".join(f"layers ** {value:.2f} ({kind})" for kind, value in exponents.items())
        print(f"growth of capture and passes, {recipe}: {shown}")
    if "observing" in report:
        ratio, layers = report["observing"]["ratio"], report["observing"]["layers"]
        print(
            f"observed / plain forward, {layers} layers, batch 2: {ratio['wall']:.3f} (wall), {ratio['cpu']:.3f} (CPU)"
        )


if __name__ == "__main__":
    main()
