"""Time of a quantized DiT on the processor, beside float and beside other quantizers; output SQNR beside each.

    python benchmarks/cpu.py --layers 4 --rounds 15 --json out/cpu.json

The model is `DiTTransformer2DModel` at the width of DiT-XL (16 heads of 72) on 256 tokens, batch 2, with random weights
that no call leaves unused. All systems are made first; then every round calls each of them once, in turn, so that a
machine that slows down for a while slows all of them. A row shows the median, the quartiles, the ratio to eager float
(the median over rounds of the ratio within a round) and the SQNR of the output against float. Inputs are those of
calibration. torchao joins where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from diffusers import DiTTransformer2DModel
from tabulate import tabulate
from torch import Tensor, nn

import fxquant
from fxquant.quantizer import sqnr_db
from fxquant.recipes import Recipe, make_recipe

System = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks; DiT-XL/2 has 28")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each system, by turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="systems whose names hold one of these texts, joined by commas")
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with torch.no_grad():
        rows = measure(systems(options.layers, options.only.split(",")), options.rounds)
    show(rows)
    if options.json:
        report = {"machine": machine(options.threads), "layers": options.layers, "rounds": options.rounds, "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def make_model(layers: int) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def make_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 32, 32, generator=generator),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 1000]),
    }


def systems(layers: int, only: list[str]) -> dict[str, System]:
    """What is compared, by name, each ready to be called: float first."""
    model, call = make_model(layers), make_inputs()
    compiled = torch.compile(make_model(layers))
    made: dict[str, System] = {"eager fp32": lambda: model(**call).sample}

    def ours(recipe: Recipe) -> nn.Module:
        quantized = fxquant.compile(model, recipe=recipe, backend="native", calibrate=lambda: model(**call), measure=0)
        return quantized

    symmetric = make_recipe("rtn-w8a8", "blocks").with_options("quantize-linears", symmetric=True)
    every = make_recipe("rtn-w8a8", "all").with_options("quantize-linears", symmetric=True)
    every = every.with_options("assign-precision", attention="float")
    makers: dict[str, Callable[[], System]] = {
        "compiled fp32": lambda: lambda: compiled(**call).sample,
        "native W8A8, eager": lambda: _call(ours(make_recipe("rtn-w8a8", "blocks")), call),
        "native W8A8, compiled": lambda: _call(torch.compile(ours(make_recipe("rtn-w8a8", "blocks"))), call),
        "native W8A8 symmetric, eager": lambda: _call(ours(symmetric), call),
        "native W8A8 symmetric, compiled": lambda: _call(torch.compile(ours(symmetric)), call),
        "native W8A8 symmetric, all linears, compiled": lambda: _call(torch.compile(ours(every)), call),
        "native W4A8, compiled": lambda: _call(torch.compile(ours(make_recipe("rtn-w4a8", "blocks"))), call),
        "native W8A8 HTG, compiled": lambda: _call(torch.compile(_binned(model, call)), call),
    }
    if importlib.util.find_spec("torchao"):
        makers["torchao pt2e x86 static, frozen"] = lambda: torchao_static(layers, call)
    for name, make in makers.items():
        if any(text in name for text in only):
            began = time.perf_counter()
            made[name] = make()
            called = time.perf_counter()
            made[name]()  # Which compiles what is to be compiled.
            ended = time.perf_counter()
            print(f"{name}: made in {called - began:.0f} s, first call {ended - called:.0f} s", flush=True)
    return made


def _call(model: Any, call: dict[str, Any]) -> System:
    return lambda: model(**call).sample


def _binned(model: nn.Module, call: dict[str, Any]) -> nn.Module:
    """Calibrated at several timesteps, so that there are bins."""

    def calibrate() -> None:
        for step in range(950, 0, -100):
            model(**call | {"timestep": torch.tensor([step, step])})

    recipe = make_recipe("htg-w8a8", "blocks").with_options("quantize-linears", symmetric=True)
    return fxquant.compile(model, recipe=recipe, backend="native", calibrate=calibrate, measure=0)


def torchao_static(layers: int, call: dict[str, Any]) -> System:
    """Static int8 of torchao's x86 quantizer, exported, and compiled by inductor with frozen weights."""
    # The import registers the fusions without which this is slow.
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    arguments = call | {"return_dict": False}
    exported = torch.export.export(make_model(layers), (), arguments, strict=False).module()
    prepared = prepare_pt2e(exported, quantizer)
    prepared(**arguments)
    made = torch.compile(convert_pt2e(prepared))
    with torch._inductor.config.patch(freezing=True):
        made(**arguments)
    return lambda: made(**arguments)[0]


def measure(made: dict[str, System], rounds: int) -> list[dict[str, Any]]:
    """Medians and quartiles of rounds in which each system has one turn."""
    outputs = {name: system() for name, system in made.items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, system in made.items():
            system()  # So that none finds the caches as its neighbour left them.
            began = time.perf_counter()
            system()
            seconds[name].append(time.perf_counter() - began)
    first = next(iter(made))
    rows = []
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        ratio = statistics.median(base / own for base, own in zip(seconds[first], times, strict=True))
        rows.append(
            {
                "system": name,
                "median_ms": middle * 1e3,
                "quartiles_ms": [low * 1e3, high * 1e3],
                "best_ms": min(times) * 1e3,
                "speedup": ratio,
                "speedup_of_best": min(seconds[first]) / min(times),
                "sqnr_db": None if name == first else sqnr_db(outputs[first].float(), outputs[name].float()),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    header = ["system", "median ms", "quartiles", "best", "x eager fp32", "by best", "SQNR dB"]
    table = [
        [
            row["system"],
            f"{row['median_ms']:.1f}",
            "{:.1f} to {:.1f}".format(*row["quartiles_ms"]),
            f"{row['best_ms']:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['speedup_of_best']:.2f}",
            "" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}",
        ]
        for row in rows
    ]
    print(tabulate(table, header, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 6)))


def machine(threads: int) -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "torchao": version("torchao") if importlib.util.find_spec("torchao") else None,
    }


if __name__ == "__main__":
    main()
