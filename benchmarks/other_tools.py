"""What `fxquant.balance` gains for quantizers of other packages: `python -m benchmarks.other_tools`.

Each tool quantizes the digits model as it is, and after balancing, in a process that computes in float32. The error is
that of the predicted noise against the float model, on a trajectory that calibration has not seen. Tools that are not
installed are left out; see the extra `bench`, and the extra `bench-more`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxquant
from benchmarks.digits import digits_task
from benchmarks.figures import is_installed
from benchmarks.models import Task
from benchmarks.shapes import Call
from examples.digits.salience import plant_salience
from fxquant.numerics.sqnr import sqnr_db

Run = Callable[[Call], Tensor]


@dataclass(frozen=True)
class Tool:
    """A quantizer of another package.

    Attributes:
        name: Name in the table.
        packages: Packages that it needs.
        quantize: Quantizes the model of a task, which it may change, and returns a function that runs a call.
    """

    name: str
    packages: tuple[str, ...]
    quantize: Callable[[nn.Module, Task], Run]

    @property
    def installed(self) -> bool:
        return all(map(is_installed, self.packages))


def _module(model: nn.Module) -> Run:
    return lambda call: model(**call)[0]


def _torchao(model: nn.Module, task: Task) -> Run:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return _module(model)


def _sdnq(model: nn.Module, task: Task) -> Run:
    from sdnq import sdnq_post_load_quant

    return _module(sdnq_post_load_quant(model, weights_dtype="int8", use_quantized_matmul=True))


def _quanto(model: nn.Module, task: Task) -> Run:
    from optimum.quanto import Calibration, freeze, qint8, quantize

    quantize(model, weights=qint8, activations=qint8)
    with Calibration():
        for call in task.calls:
            model(**call)
    freeze(model)
    return _module(model)


def _openvino(model: nn.Module, task: Task, smooth: bool = True, ends: bool = True) -> Run:
    """NNCF's static int8.

    Args:
        model: The float model.
        task: Its calls.
        smooth: Whether NNCF runs SmoothQuant, its default.
        ends: Whether the patch convolution and the last linear are quantized too, its default.
    """
    import nncf
    import openvino

    from benchmarks.cpu.peers import Positional, tensors_of

    module = Positional(model, task.timed).eval()
    converted = openvino.convert_model(torch.export.export(module, tensors_of(task.timed), strict=False))
    inputs = [[tensor.numpy() for tensor in tensors_of(call)] for call in task.calls]
    advanced = None
    if not smooth:
        alphas = nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
        advanced = nncf.AdvancedQuantizationParameters(smooth_quant_alphas=alphas)
    quantized = nncf.quantize(
        converted,
        nncf.Dataset(inputs, list),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(inputs),
        ignored_scope=None if ends else nncf.IgnoredScope(types=["Convolution"], names=[_last_product(converted)]),
        advanced_parameters=advanced,
    )
    compiled = openvino.Core().compile_model(quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(call: Call) -> Tensor:
        found = compiled([tensor.numpy() for tensor in tensors_of(call)])
        return torch.from_numpy(next(iter(found.values())).copy())

    return run


def _last_product(converted: Any) -> str:
    """Name of the matrix product that is nearest to the output."""
    nodes = [converted.get_results()[0]]
    while nodes[0].get_type_name() != "MatMul":
        node = nodes.pop(0)
        nodes += [value.get_node() for value in node.input_values()]
    return str(nodes[0].get_friendly_name())


_NNCF = ("openvino", "nncf")
TOOLS = (
    Tool("torchao, dynamic int8", ("torchao",), _torchao),
    Tool("SDNQ, dynamic int8", ("sdnq",), _sdnq),
    Tool("quanto, static int8", ("optimum.quanto",), _quanto),
    Tool("OpenVINO + NNCF, static int8", _NNCF, _openvino),
    Tool("NNCF, first and last layer float", _NNCF, partial(_openvino, ends=False)),
    Tool("NNCF without its SmoothQuant", _NNCF, partial(_openvino, smooth=False)),
    Tool(
        "NNCF without its SmoothQuant, first and last layer float", _NNCF, partial(_openvino, smooth=False, ends=False)
    ),
)


def balanced_task(task: Task, recipe: str) -> Task:
    """The task with its model balanced on the calibration calls."""
    model = task.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = fxquant.balance(model, recipe=recipe, calibrate=lambda: task.calibrate(model))
    return replace(task, make=partial(copy.deepcopy, made))


def mean_sqnr(tool: Tool, task: Task, reference: Sequence[Tensor]) -> float:
    """SQNR in dB of what a tool makes of a task's model, averaged over the test calls."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        run = tool.quantize(task.model(), task)
        pairs = zip(reference, task.tests, strict=True)
        return statistics.fmean(sqnr_db(expected, run(call).float()) for expected, call in pairs)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="smoothquant-w8a8", help="recipes of fxquant.balance, with commas between")
    parser.add_argument("--models", default="plain,planted")
    parser.add_argument("--tools", default="", help="only tools whose name contains this")
    options = parser.parse_args(arguments)
    plain = digits_task()
    made = {"plain": plain, "planted": replace(plain, make=partial(copy.deepcopy, plant_salience(plain.model())))}
    with torch.no_grad():
        reference = [plain.model()(**call)[0] for call in plain.tests]
    tools = [tool for tool in TOOLS if tool.installed and options.tools in tool.name]
    rows = []
    for name in options.models.split(","):
        tasks = {"": made[name], **{recipe: balanced_task(made[name], recipe) for recipe in options.recipes.split(",")}}
        for tool in tools:
            figures = [mean_sqnr(tool, task, reference) for task in tasks.values()]
            rows.append([name, tool.name, *(f"{figure:.1f}" for figure in figures)])
            print(*rows[-1], sep=" | ", flush=True)
    print(tabulate(rows, ["model", "quantizer", "alone", *options.recipes.split(",")], tablefmt="github"))


if __name__ == "__main__":
    main()
