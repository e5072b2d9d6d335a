"""Peak memory and time of converting FLUX-shaped models of several sizes, in memory and within a bound.

    python -m benchmarks.scale --billions 0.1,0.3 --json out/scale.json --into docs/scale.md

Each model has random weights in bfloat16, which are written as shards tensor by tensor. Each case runs in its own
process, which reads the shards, converts the model and writes the checkpoint. A thread samples the resident set:

* total: everything that is in memory, as a container that counts mapped files sees it.
* anonymous: the part that no file holds and that the system could not take back.

Cases that the JSON file holds already are not run again, so an interrupted run continues where it was. Cases in memory
whose weights alone take more than 0.4 of the machine's memory are left out. The in-memory peak is also given over the
bytes of the float weights, without what the process takes after its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import versions, write

SHAPES = {0.1: (2, 6, 6), 0.3: (4, 9, 8), 0.7: (6, 14, 10), 3.0: (12, 25, 15), 12.0: (19, 38, 24)}
"""Double blocks, single blocks and heads of 128 channels, by billions of parameters."""

BOUNDS = {0.1: "1.2GB", 0.3: "1.5GB", 0.7: "2GB", 3.0: "4GB", 12.0: "8GB"}
"""The bound of the bounded conversion, by billions of parameters."""

_START, _END = "<!-- benchmarks.scale -->", "<!-- benchmarks.scale: end -->"
_TEXT_TOKENS, _SIDE = 16, 8
_SECONDS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--billions", default="0.1,0.3", help=f"sizes, of {', '.join(map(str, SHAPES))}")
    parser.add_argument("--recipe", default="ptq4dit-gptq-w4a8")
    parser.add_argument("--calls", type=int, default=4, help="calibration calls of one sample, one timestep each")
    parser.add_argument("--ways", default="memory,bounded", help="memory, bounded or both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shard", default="1GB", help="the most bytes of a shard")
    parser.add_argument("--folder", type=Path, help="for models and scratch files; kept if given")
    parser.add_argument(
        "--json", type=Path, default=Path("out/scale.json"), help="results; cases in it are not repeated"
    )
    parser.add_argument("--into", type=Path, help="page of the documentation that gets table and picture")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(convert(**json.loads(options.worker))))
        return
    report = json.loads(options.json.read_text()) if options.json.exists() else {"cases": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for billions in map(float, options.billions.split(",")):
            for way in options.ways.split(","):
                measure(report, options, folder, billions, way)
    if options.into:
        show(report, options.into)


def measure(report: dict[str, Any], options: argparse.Namespace, folder: Path, billions: float, way: str) -> None:
    """Measure one case that the report lacks, and write the report."""
    key = {"billions": billions, "way": way, "recipe": options.recipe, "calls": options.calls}
    if any(case.items() >= key.items() for case in report["cases"]):
        _say(f"{billions:g} billion, {way}: measured before")
        return
    weights = int(billions * 2e9)
    if way == "memory" and weights > 0.4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        _say(f"{billions:g} billion, {way}: does not fit")
        return
    model = folder / f"flux-{billions:g}b"
    if not (model / "config.json").exists():
        write_model(model, billions, options.shard)
    _say(f"{billions:g} billion, {way}: converting")
    bound = BOUNDS[billions] if way == "bounded" else None
    task = {"model": str(model), "out": str(folder / "out"), "bound": bound, "recipe": options.recipe}
    case = key | {"bound": bound} | run({**task, "calls": options.calls, "threads": options.threads})
    report["cases"].append(case)
    report["versions"] = versions(("torch", "diffusers", "safetensors"))
    write(options.json, json.dumps(report, indent=1) + "\n")
    _say(
        f"{billions:g} billion, {way}: {case['seconds']:.0f} s, peak {case['total'] / 1e9:.2f} GB, of it anonymous "
        f"{case['anonymous'] / 1e9:.2f} GB"
    )


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Convert in a new process; returns what it measured."""
    command = [sys.executable, "-m", "benchmarks.scale", "--worker", json.dumps(task)]
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "OMP_NUM_THREADS": str(task["threads"])}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    shutil.rmtree(task["out"], ignore_errors=True)
    if done.returncode:
        sys.exit(f"the conversion of {task['model']} failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_model(folder: Path, billions: float, shard: str) -> None:
    """Write a FLUX-shaped model with random weights; one shard is in memory at a time."""
    import torch
    from diffusers import FluxTransformer2DModel
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    double, single, heads = SHAPES[billions]
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=double, num_single_layers=single, num_attention_heads=heads, guidance_embeds=True
        ).to(torch.bfloat16)
    state = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in model.state_dict().items()}
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=shard)
    folder.mkdir(parents=True)
    for number, (file, names) in enumerate(split.filename_to_tensors.items(), 1):
        _say(f"writing {folder.name}, shard {number} of {len(split.filename_to_tensors)}")
        save_file({name: _random(name, state[name]) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    model.save_config(folder)  # Last: a folder with a config is complete.


def _random(name: str, like: Any) -> Any:
    """Values of a weight, the same in each run: its outputs are about as large as its inputs; norms multiply by one."""
    import torch

    generator = torch.Generator().manual_seed(sum(map(ord, name)) * 7919 + like.numel())
    if like.dim() < 2:
        return torch.full_like(like, float(name.endswith("weight")))
    return (torch.randn(like.shape, generator=generator) / like.shape[1] ** 0.5).to(like.dtype)


# --- in the processes of the cases ----------------------------------------------------------------------------------


class Peaks(threading.Thread):
    """Samples the resident set of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.total = self.anonymous = 0
        self.phase = "reading"
        self.phases: dict[str, int] = {}
        """The largest total of each phase."""
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(_SECONDS):
            total, anonymous = resident()
            self.total, self.anonymous = max(self.total, total), max(self.anonymous, anonymous)
            self.phases[self.phase] = max(self.phases.get(self.phase, 0), total)


def resident() -> tuple[int, int]:
    """Bytes in memory, and those of them that no file holds."""
    total, of_files = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    page = os.sysconf("SC_PAGE_SIZE")
    return total * page, (total - of_files) * page


def convert(model: str, out: str, bound: str | None, recipe: str, calls: int, threads: int) -> dict[str, Any]:
    """Read, convert and write a model, and measure the memory meanwhile."""
    import torch
    from diffusers import FluxTransformer2DModel

    import fxquant
    from fxquant.pipeline.pipeline import PASSES

    _ = [PASSES[name] for name in PASSES]  # Imported on first use.
    torch.set_num_threads(threads)
    before = resident()
    peaks = Peaks()
    peaks.start()
    began = time.perf_counter()
    with fxquant.limit_memory(bound, Path(out).parent):
        read = FluxTransformer2DModel.from_pretrained(model, torch_dtype=torch.bfloat16).eval()
        weights = sum(parameter.nbytes for parameter in read.parameters())

        def calibrate() -> None:
            for number in range(calls):
                peaks.phase = "calibration"
                _say(f"call {number + 1} of {calls}")
                call(read, 1 - number / calls, number)

        made = fxquant.compile(read, recipe=recipe, calibrate=calibrate, measure=1, instruments=[_Told(peaks)])
        peaks.phase = "saving"
        fxquant.save(made, out, overwrite=True)
    peaks.ended.set()
    peaks.join()
    assert made.plan is not None
    return {
        "seconds": time.perf_counter() - began,
        "float_bytes": weights,
        "total": peaks.total,
        "anonymous": peaks.anonymous,
        "imports": before[0],
        "anonymous_imports": before[1],
        "phases": peaks.phases,
        "passes": {entry["pass"].partition("{")[0]: entry["seconds"] for entry in made.plan.passes},
        "sqnr_db": list(made.plan.output_sqnr_db.values()),
    }


class _Told:
    """Prints the passes, which are phases of their own."""

    def __init__(self, peaks: Peaks) -> None:
        self.peaks = peaks

    def before(self, step: Any, module: Any) -> None:
        self.peaks.phase = step.name
        _say(f"pass {step.name}")

    def after(self, step: Any, module: Any, record: Any) -> None:
        self.peaks.phase = "between passes"

    def failed(self, step: Any, module: Any, error: Exception) -> None: ...


def call(model: Any, timestep: float, seed: int) -> None:
    """Run one sample of 64 image tokens and 16 text tokens."""
    import torch

    generator, config = torch.Generator().manual_seed(seed), model.config
    dtype, tokens = model.dtype, _SIDE * _SIDE

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator).to(dtype)

    places = torch.zeros(tokens, 3)
    places[:, 1] = torch.arange(_SIDE).repeat_interleave(_SIDE)
    places[:, 2] = torch.arange(_SIDE).repeat(_SIDE)
    with torch.no_grad():
        model(
            hidden_states=normal(1, tokens, config.in_channels),
            encoder_hidden_states=normal(1, _TEXT_TOKENS, config.joint_attention_dim),
            pooled_projections=normal(1, config.pooled_projection_dim),
            timestep=torch.full((1,), timestep, dtype=dtype),
            img_ids=places.to(dtype),
            txt_ids=torch.zeros(_TEXT_TOKENS, 3, dtype=dtype),
            guidance=torch.full((1,), 3.5),
        )


# --- the page -------------------------------------------------------------------------------------------------------


def show(report: dict[str, Any], page: Path) -> None:
    """Write the table and the picture."""
    text = page.read_text(encoding="utf-8")
    if text.count(_START) != 1 or text.count(_END) != 1:
        raise SystemExit(f"{page} lacks the lines {_START!r} and {_END!r}")
    cases = sorted(report["cases"], key=lambda case: (case["billions"], case["way"]))
    picture = page.parent / "pictures" / "scale.svg"
    draw(cases, picture)
    body = f"![Peak memory against size](pictures/{picture.name})\n\n{table(cases)}\n\n{table_of_phases(cases)}"
    before, after = text.partition(_START)[0], text.partition(_END)[2]
    write(page, f"{before}{_START}\n\n{body}\n\n{_END}{after}")


def table(cases: list[dict[str, Any]]) -> str:
    """The cases as Markdown."""
    lines = [
        "| billions | float weights | way | peak, total | peak, anonymous | own peak / float | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        way = "in memory" if case["bound"] is None else f"within {case['bound']}"
        peaks = f"{case['total'] / 1e9:.2f} GB | {case['anonymous'] / 1e9:.2f} GB"
        size = f"{case['billions']:g} | {case['float_bytes'] / 1e9:.2f} GB"
        lines.append(f"| {size} | {way} | {peaks} | {_own(case, case['total'])} | {case['seconds'] / 60:.1f} |")
    return "\n".join(lines)


def table_of_phases(cases: list[dict[str, Any]]) -> str:
    """Where each case takes how much: own peak over float weights, as Markdown."""
    phases = list(dict.fromkeys(phase for case in cases for phase in case["phases"]))
    ways = {"memory": "in memory", "bounded": "bounded"}
    titles = [f"{case['billions']:g}, {ways[case['way']]}" for case in cases]
    lines = [f"| phase | {' | '.join(titles)} |", "|---" * (len(cases) + 1) + "|"]
    for phase in phases:
        peaks = [case["phases"].get(phase) for case in cases]
        own = ["" if peak is None else _own(case, peak) for peak, case in zip(peaks, cases, strict=True)]
        lines.append(f"| {phase} | {' | '.join(own)} |")
    return "\n".join(lines)


def _own(case: dict[str, Any], peak: int) -> str:
    """A peak without what the imports take, over the float weights."""
    return f"{(peak - case['imports']) / case['float_bytes']:.2f}"


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """Peak memory against size, for both ways."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    for way, color in (("memory", "#b33"), ("bounded", "#36c")):
        own = [case for case in cases if case["way"] == way]
        x = [case["billions"] for case in own]
        axes.plot(x, [case["total"] / 1e9 for case in own], "o-", color=color, label=f"{way}, total")
        axes.plot(x, [case["anonymous"] / 1e9 for case in own], "o:", color=color, label=f"{way}, anonymous")
    axes.set(xscale="log", yscale="log", xlabel="billions of parameters", ylabel="peak, GB")
    for axis, places in ((axes.xaxis, sorted({case["billions"] for case in cases})), (axes.yaxis, (0.5, 1, 2, 4, 8))):
        axis.set_major_locator(ticker.FixedLocator(places))
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_minor_locator(ticker.NullLocator())
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
