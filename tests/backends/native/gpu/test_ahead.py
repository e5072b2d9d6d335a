"""Every kernel compiles for GPUs, without one: for Hopper, those of block formats for Blackwell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxquant.backends.native.gpu import machine
from fxquant.backends.native.gpu.ahead import compile_kernel
from fxquant.errors import BackendError

pytestmark = pytest.mark.skipif(machine.missing_triton() is not None, reason="there is no Triton")

LINEARS = """
from fxquant.backends.native.gpu.ahead import all_linears, linear_resources
for kind, group, config in [*all_linears()][::{step}]:
    for fused in (True, False):
        used = linear_resources(kind, config, group, fused, rank={rank})
        name = f"{{kind}}-g{{group}} {{config}} {{'codes' if fused else 'values'}}"
        print(json.dumps([name, config.block_m, used.spilled, used.shared, used.instructions]))
"""
ROWS = """
from fxquant.backends.native.gpu.ahead import compile_kernel
from fxquant.backends.native.gpu.kernels import hadamard, rows
codes = {"int8": "*i8", "fp8": "*fp8e4nv"}
grid = {"scale": "*fp32", "zero_point": "*u8"}
none = dict.fromkeys(grid)
vectors = dict.fromkeys(("x", "weight", "bias", "factor", "shift"), "*bf16")
numbers = {"eps": "fp32", "plus": "fp32", "sums": "*i32"}
tile = {"BLOCK_M": 8, "BLOCK_N": 128}
found = []
for kind, held in codes.items():
    types = {"x": "*bf16", "out": held} | grid
    found.append(compile_kernel(rows.quantize_kernel, types, tile | {"FP8": kind == "fp8"}, 4, 1))
for kind, norm, tokens in [*itertools.product(codes, ("none", "rms", "layer"), (True, False))][::{step}]:
    turn = {"STEPS": 7, "FACTOR": 2**-3.5} | ({} if tokens else {"signs": None})
    options = {"NORM": norm, "TOKENS": tokens, "BLOCK": 2048, "FP8": kind == "fp8", **turn}
    types = vectors | grid | numbers | {"out": codes[kind], "signs": "*i8"}
    found.append(compile_kernel(rows.quantize_rows_kernel, types, options, 4, 1, ("C",)))
assert all(used.spilled == 0 for used in found), found
for steps, out in ((14, {"out": "*bf16"}), (9, {"out": "*i8"} | grid)):
    shape = {"FP8": False, "BLOCK": 2**steps, "TILE": max(1, 1024 >> steps), "STEPS": steps, "FACTOR": 0.125}
    warps, types = min(16, max(1024, 2**steps) // 512), {"x": "*bf16", "signs": "*i8"} | out
    used = compile_kernel(hadamard.hadamard_kernel, types, shape | ({} if "scale" in out else none), warps, 1)
    assert used.spilled == 0, (steps, used)
assert compile_kernel(rows.row_sums_kernel, {"x": "*i8", "out": "*i32"}, {"BLOCK": 2048}, 4, 1).spilled == 0
"""
BLOCKS = """
from fxquant.backends.native.gpu.ahead import compile_kernel
from fxquant.backends.native.gpu.kernels.blocks import quantize_blocks_kernel
types = {"x": "*bf16", "signs": "*i8", "scales": "*u8", "global_scale": "*fp32"}
mxfp8 = {"FP8": True, "BLOCK": 32, "EXPONENT": 8, "STEPS": 7, "global_scale": None}
nvfp4 = {"FP8": False, "BLOCK": 16, "EXPONENT": 0, "STEPS": 0, "signs": None}
for codes, format in (("*fp8e4nv", mxfp8), ("*u8", nvfp4)):
    constants = format | {"FACTOR": 0.125, "ROWS": 32, "COLUMNS": 4}
    used = compile_kernel(quantize_blocks_kernel, types | {"codes": codes}, constants, 4, 1, ("K", "held"), 100)
    assert used.spilled <= 8, used  # The stack of a function that divides.
"""
WEIGHTS_ALONE = """
from fxquant.backends.native.gpu.ahead import weight_only_resources
for dtype, bits, group, rows in [*itertools.product(("bf16", "fp16", "fp32"), (4, 8), (0, 32), (2, 300))][::{step}]:
    used = weight_only_resources(dtype, bits, group, rows)
    print(json.dumps([f"{{dtype}} {{bits}} {{group}} {{rows}}", used.spilled, used.shared, used.instructions]))
"""
FLOAT_WEIGHTS = """
from fxquant.backends.native.gpu.ahead import float_weight_resources
formats = [("nf4", 0), ("nf4", 64), ("mxfp4", 32), ("nvfp4", 16), ("fp8", 16), ("fp8e5m2", 0), ("mxfp6", 32)]
for (format, group), dtype, rows in [*itertools.product(formats, ("bf16", "fp16", "fp32"), (2, 300))][::{step}]:
    used = float_weight_resources(dtype, format, group, rows)
    name = f"{{format}} {{group}} {{dtype}} {{rows}}"
    print(json.dumps([name, used.spilled, used.shared, used.instructions]))
"""


ALL = """
import itertools, json, sys, traceback
for name, code in json.loads(sys.argv[1]).items():
    print("=====" + name)
    try:
        exec(code, {"itertools": itertools, "json": json})
    except Exception:
        print(traceback.format_exc(), file=sys.stderr)
        print("failed")
"""
Compiled = Callable[..., list[Any]]


def compiled(folder: Path, **scripts: str) -> dict[str, list[str]]:
    """The lines that each script prints in another process: this one may have imported Triton as an interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", ALL, json.dumps(scripts)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    sys.stderr.write(ran.stderr)
    parts = [part.splitlines() for part in ran.stdout.split("=====")[1:]]
    return {name: lines for name, *lines in parts}


SAMPLE = {
    "linears": LINEARS.format(step=9, rank=0),
    "rows": ROWS.replace("{step}", "5"),
    "blocks": BLOCKS,
    "weights_alone": WEIGHTS_ALONE.format(step=5),
    "float_weights": FLOAT_WEIGHTS.format(step=5),
}
"""What `make test` compiles."""


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return compiled(tmp_path_factory.mktemp("triton"), **SAMPLE)


@pytest.fixture
def made(sample: dict[str, list[str]], tmp_path: Path) -> Compiled:
    """What a script prints, from the process that runs all scripts of the sample or from one of its own."""

    def make(name: str, script: str) -> list[Any]:
        lines = sample[name] if script == SAMPLE[name] else compiled(tmp_path, **{name: script})[name]
        assert lines[-1:] != ["failed"], "the traceback is in the captured output of the process"
        return [json.loads(line) for line in lines]

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "rank"), [(9, 0), *(pytest.param(*given, marks=pytest.mark.exhaustive) for given in ((1, 0), (7, 32)))]
)
def test_ways_to_cut_a_product_compile_into_tensor_core_instructions(step: int, rank: int, made: Compiled) -> None:
    found = made("linears", LINEARS.format(step=step, rank=rank))
    assert len(found) >= 50 // step
    for name, rows, spilled, shared, instructions in found:
        assert spilled == 0, name
        assert shared <= 227 * 1024, name
        assert {word.split()[0] for word in instructions if " " in word} == {"mma" if rows < 64 else "wgmma"}, name


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.exhaustive), 5])
def test_kernels_of_rows_compile(step: int, made: Compiled) -> None:
    """Every fifth combination holds every kind of codes and of norm, with and without ranges of tokens."""
    assert not made("rows", ROWS.replace("{step}", str(step)))


def test_codes_of_blocks_compile_for_the_devices_that_multiply_them(made: Compiled) -> None:
    assert not made("blocks", BLOCKS)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.exhaustive), 5])
def test_products_of_float_activations_compile(step: int, made: Compiled) -> None:
    """Every fifth combination holds every dtype, number of bits, group and number of rows."""
    results = made("weights_alone", WEIGHTS_ALONE.format(step=step))
    assert len(results) == -(-24 // step)
    for place, values in enumerate(("bf16 fp16 fp32", "4 8", "0 32", "2 300")):
        assert {name.split()[place] for name, *_ in results} == set(values.split())
    for name, spilled, shared, instructions in results:
        assert spilled == 0, name
        assert shared <= 227 * 1024, name
        found = {word.split()[0] for word in instructions if " " in word}
        assert found == {"mma" if name.endswith(" 2") else "wgmma"}, name


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.exhaustive), 5])
def test_products_of_float_weights_compile(step: int, made: Compiled) -> None:
    """Every fifth combination holds every dtype, number of rows and format."""
    results = made("float_weights", FLOAT_WEIGHTS.format(step=step))
    assert len(results) == -(-42 // step)
    for place, values in {0: "nf4 mxfp4 nvfp4 fp8 fp8e5m2", 2: "bf16 fp16 fp32", 3: "2 300"}.items():
        assert {name.split()[place] for name, *_ in results} >= set(values.split())
    for name, spilled, shared, instructions in results:
        assert spilled == 0, name
        assert shared <= 227 * 1024, name
        found = {word.split()[0] for word in instructions if " " in word}
        assert found == {"mma" if name.endswith(" 2") else "wgmma"}, name


@pytest.mark.skipif(not machine.interprets(), reason="Triton is not interpreted here")
def test_nothing_is_compiled_in_the_interpreter() -> None:
    with pytest.raises(BackendError, match="TRITON_INTERPRET"):
        compile_kernel(None, {}, {}, 4, 1)
