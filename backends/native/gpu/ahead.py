"""Compiles kernels for a GPU that need not be present: whether they compile, and which resources they use.

``python -m fxquant.backends.native.gpu.ahead`` prints one row per tiling of the matrix-product kernel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fxquant.backends.native.gpu import machine
from fxquant.backends.native.gpu.configs import Config, candidates
from fxquant.errors import BackendError
from fxquant.numerics.formats import bits_of

HOPPER = 90

_POINTERS = {
    "x": "*i8",
    "w": "*i8",
    "out": "*bf16",
    "x_scale": "*fp32",
    "x_zero_point": "*u8",
    "w_scale": "*fp32",
    "w_zero_point": "*u8",
    "w_sums": "*i32",
    "bias": "*bf16",
}
_ALIGNED = ("M", "N", "K", "gate_stride", "bias_stride")


@dataclass(frozen=True)
class Resources:
    """Resources that a compiled kernel uses.

    Attributes:
        registers: Registers per thread.
        spilled: Bytes of local memory per thread, which registers spill to.
        shared: Bytes of shared memory per program.
        instructions: The matrix instructions of the kernel, by the first words of their names in PTX.
    """

    registers: int
    spilled: int
    shared: int
    instructions: tuple[str, ...]


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    warps: int,
    stages: int,
    aligned: tuple[str, ...] = (),
    capability: int = HOPPER,
) -> Resources:
    """Compile a kernel for an NVIDIA GPU, which need not be present.

    Args:
        kernel: The Triton function.
        types: Types of its arguments as Triton writes them. Pointers are assumed to be aligned.
        constants: Values of its constants, and None for arguments that are None.
        warps: Warps per program.
        stages: Pipeline stages.
        aligned: Names of the integer arguments that are multiples of 16.
        capability: Compute capability, times ten.

    Raises:
        BackendError: If Triton is missing, or if it runs as an interpreter.
    """
    reason = machine.missing_triton()
    if reason is not None or machine.interprets():
        raise BackendError(f"kernels cannot be compiled: {reason or 'TRITON_INTERPRET is set'}")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    divisible = [name for name in names if signature[name].startswith("*") or name in aligned]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible if name not in constants},
    )
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )
    ptx = made.asm["ptx"]
    found = sorted(set(re.findall(r"(wgmma\.mma_async|mma\.sync)\.\S*?\.(m\d+n\d+k\d+)\S*", ptx)))
    kinds = sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)\S*?\.(s32\.s8|f32\.e4m3|s32\.u8|f32\.bf16)", ptx)))
    words = tuple(f"{name.split('.')[0]} {shape}" for name, shape in found) + tuple(kinds)
    return Resources(*_usage(made.asm["cubin"]), int(made.metadata.shared), words)


def linear_resources(kind: str, config: Config, group_size: int = 0, fused: bool = True, rank: int = 0) -> Resources:
    """Resources of the matrix-product kernel with one tiling, on Hopper GPUs.

    Args:
        kind: ``int8``, ``fp8`` or ``int4``.
        config: The tiling.
        group_size: Inputs per group of the weight.
        fused: True if GELU and the next quantization follow the product; False if a gate and a residual do.
        rank: Rank of a branch of bfloat16 that is added, a power of two of at least 16; 0 for no branch.
    """
    from fxquant.backends.native.gpu.configs import step_of
    from fxquant.backends.native.gpu.kernels.linear import linear_kernel
    from fxquant.backends.native.gpu.weights import half_of

    held = {"int8": "*i8", "fp8": "*fp8e4nv", "int4": "*u8"}[kind]
    codes = "*fp8e4nv" if kind == "fp8" else "*i8"
    types = _POINTERS | {"x": codes, "w": held}
    if group_size:
        types["w_sums"] = "*fp32"
    constants: dict[str, Any] = {
        "w_offset": None,
        "x_sums": None,
        "ACTIVATION": "gelu_tanh" if fused else "none",
        "HALF": half_of(group_size) if kind == "int4" else 0,
        "GROUP": group_size,
        "FP8": kind == "fp8",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": step_of(config, group_size),
        "SUPER_M": config.super_m,
        "WARPS": config.warps,
        "RANK": rank,
    }
    if rank:
        types |= dict.fromkeys(("inner", "up"), "*bf16")
    else:
        constants |= {"inner": None, "up": None}
    if kind == "fp8":
        constants |= dict.fromkeys(("x_zero_point", "w_zero_point", "w_sums"))
    if fused:
        types |= {"out": codes, "out_scale": "*fp32", "out_zero_point": "*u8", "out_sums": "*i32"}
        constants |= {"gate": None, "residual": None} | (
            {"out_sums": None, "out_zero_point": None} if kind == "fp8" else {}
        )
    else:
        types |= {"gate": "*bf16", "residual": "*bf16"}
        constants |= {"out_scale": None, "out_zero_point": None, "out_sums": None}
    return compile_kernel(linear_kernel, types, constants, config.warps, config.stages, _ALIGNED)


def weight_only_resources(dtype: str, bits: int, group_size: int, rows: int) -> Resources:
    """Resources of the weight-only product, which multiplies float activations, on Hopper GPUs.

    Args:
        dtype: Dtype of the activations, as Triton writes it: ``bf16``, ``fp16`` or ``fp32``.
        bits: Bits of the weight. Weights of up to 4 bits are stored two per byte.
        group_size: Inputs per group of the weight.
        rows: Rows of the activations.
    """
    from fxquant.backends.native.gpu.kernels.weight_only import weight_only_kernel
    from fxquant.backends.native.gpu.weight_only import choose
    from fxquant.backends.native.gpu.weights import half_of, in_halves

    halves, config = in_halves(bits, packed=True), choose(rows, group_size)
    types = dict.fromkeys(("x", "out", "bias"), f"*{dtype}")
    types |= {"w": "*u8" if halves else "*i8", "w_scale": "*fp32", "w_zero_point": "*u8"}
    constants = {
        "WHOLE": bits == 8,
        "HALF": half_of(group_size) if halves else 0,
        "GROUP": group_size,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    return compile_kernel(weight_only_kernel, types, constants, config.warps, config.stages, ("M", "N", "K"))


def float_weight_resources(dtype: str, format: str, group_size: int, rows: int) -> Resources:
    """Resources of the product of float activations and a weight in a float format, on Hopper GPUs.

    Args:
        dtype: Dtype of the activations, as Triton writes it: ``bf16``, ``fp16`` or ``fp32``.
        format: Name of the format of the weight. Weights of 4 bits are stored two per byte.
        group_size: Inputs per group of the weight.
        rows: Rows of the activations.
    """
    from fxquant.backends.native.gpu.float_weights import LAYOUTS, choose
    from fxquant.backends.native.gpu.kernels.float_weights import float_weight_kernel
    from fxquant.backends.native.gpu.weights import half_of, in_halves

    halves, config, layout = in_halves(bits_of(format), packed=True), choose(rows, group_size), LAYOUTS[format]
    types = dict.fromkeys(("x", "out", "bias"), f"*{dtype}") | dict.fromkeys(("w_global", "numbers"), "*fp32")
    types |= {"w": "*u8" if halves else "*i8", "w_scale": "*fp32" if layout.scales == "float32" else "*u8"}
    constants: dict[str, Any] = {
        "EXPONENT": layout.exponent,
        "MANTISSA": layout.mantissa,
        "SCALES": layout.scales,
        "HALF": half_of(group_size) if halves else 0,
        "GROUP": group_size,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    if layout.scales != "e4m3":
        constants["w_global"] = None
    if layout.exponent:
        constants["numbers"] = None
    return compile_kernel(float_weight_kernel, types, constants, config.warps, config.stages, ("M", "N", "K"))


def all_linears() -> Iterator[tuple[str, int, Config]]:
    """Every kind of product, group size and tiling."""
    for kind, group in (("int8", 0), ("int8", 128), ("fp8", 0), ("int4", 0), ("int4", 64), ("int4", 32)):
        for rows in (16, 4096):
            ways = candidates(f"{kind}-g{group}" if group else kind, rows)
            yield from ((kind, group, config) for config in ways)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory, per thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise BackendError(f"cuobjdump printed no register usage: {text.strip()[:200]}")
    return int(found[1]), int(found[2]) + int(found[3])


def main() -> None:
    """Print a table of all tilings of the product."""
    rows = []
    for kind, group, config in all_linears():
        for fused in (True, False):
            used = linear_resources(kind, config, group, fused)
            cut = f"{config.block_m}x{config.block_n}x{config.block_k}, {config.warps} warps, {config.stages} stages"
            epilogue = "GELU, codes" if fused else "gate, residual"
            name = f"{kind}-g{group}" if group else kind
            rows.append(
                [name, cut, epilogue, used.registers, used.spilled, used.shared >> 10, ", ".join(used.instructions)]
            )
    header = ["product", "tiling", "epilogue", "registers", "spilled B", "shared KiB", "instructions"]
    print(tabulate(rows, header))


if __name__ == "__main__":
    main()
