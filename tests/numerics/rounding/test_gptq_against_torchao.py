"""GPTQ against torchao's, on the same second moments and the same scales: the same codes."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fxquant.numerics.formats import Scales
from fxquant.numerics.rounding import gptq as module
from fxquant.numerics.rounding.feedback import ErrorFeedback
from fxquant.numerics.rounding.gptq import gptq
from fxquant.numerics.weights import weight_scales
from tests.numerics.rounding.test_gptq import correlated, moments_of, output_error

api = pytest.importorskip("torchao.prototype.gptq.api")
pytestmark = pytest.mark.filterwarnings("ignore")

DAMPING = 0.01


class _AnyDevice(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.Assert | None:
        return None if "cuda" in ast.unparse(node) else node


def on_cpu() -> Callable[..., Any]:
    """torchao's function without the assertion that it runs on a GPU, and without its compiled helpers."""
    tree = ast.fix_missing_locations(_AnyDevice().visit(ast.parse(inspect.getsource(api.gptq_quantize))))
    plain = {
        "_nvfp4_qdq_fn": api._nvfp4_with_precalculated_scales_qdq,
        "_nvfp4_q_fn": api._nvfp4_with_precalculated_scales_q,
    }
    names = {**vars(api), **plain}
    exec(compile(tree, "gptq_quantize", "exec"), names)
    return names["gptq_quantize"]


def of_torchao(weight: Tensor, moments: Tensor, base: Any, block: int) -> Any:
    config = api.GPTQConfig("convert", base, DAMPING, block)
    with mock.patch.object(torch.cuda, "synchronize"):
        return on_cpu()(moments.float().clone(), weight.clone(), config)


def of_ours(weight: Tensor, moments: Tensor, scales: Scales, **options: Any) -> Any:
    """In the order of the channels, as torchao rounds, and with these scales in place of its own."""
    with mock.patch.object(module, "weight_scales", lambda *args, **kwargs: scales):
        return gptq(weight, ErrorFeedback.of(moments, DAMPING, activation_order=False), **options)


def case(channels: int) -> tuple[Tensor, Tensor]:
    weight = torch.randn(24, channels, generator=torch.Generator().manual_seed(channels))
    return weight, moments_of(correlated(channels, seed=channels))


@pytest.mark.parametrize("channels", [24, 96, 200])
def test_integers(channels: int) -> None:
    from torchao.quantization.granularity import PerRow

    weight, moments = case(channels)
    theirs = of_torchao(weight, moments, api.Int8WeightOnlyConfig(granularity=PerRow()), 256)
    own = weight_scales(weight, format="int8", symmetric=True)
    scales = dataclasses.replace(own, scale=theirs.scale.reshape(own.scale.shape))
    ours = of_ours(weight, moments, scales, format="int8", symmetric=True)
    assert torch.equal(ours.codes().int() - 128, theirs.qdata.int())
    nearest = (weight / theirs.scale).round().clamp(-128, 127)
    assert (nearest != theirs.qdata).float().mean() > 0.1, "nothing was compensated"


@pytest.mark.parametrize(("channels", "block"), [(16, 256), (96, 256), (208, 64)])
def test_blocks_of_nvfp4(channels: int, block: int) -> None:
    from torchao.prototype.mx_formats.utils import from_blocked

    weight, moments = case(channels)
    base = api.NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False)
    theirs = of_torchao(weight, moments, base, block)
    blocks = from_blocked(theirs.scale.flatten(), len(weight), channels // 16)
    outer = theirs.per_tensor_scale
    scales = Scales(blocks.contiguous().view(torch.uint8), None, outer)
    ours = of_ours(weight, moments, scales, format="nvfp4", group_size=16)
    expected = theirs.dequantize(torch.float32)
    assert torch.equal(ours.dequantize(torch.float32), expected)
    # With scales of the weight as it was, where torchao takes those of a block when its turn comes.
    alone = gptq(weight, ErrorFeedback.of(moments, DAMPING, activation_order=False), format="nvfp4", group_size=16)
    error, other = (output_error(weight, w, moments) for w in (alone.dequantize(torch.float64), expected.double()))
    assert error < 1.12 * other
    if channels == 16:
        assert torch.equal(alone.dequantize(torch.float32), expected)
