"""Verification leaves out what it proved before, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import fx, nn

from fxquant.capture.graph import CapturedGraph
from fxquant.capture.trace import Architecture
from fxquant.errors import VerificationError
from fxquant.ir.doubles import in_float64
from fxquant.ir.proofs import _PROVEN, is_proven
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import SPECS, Stage, verify
from fxquant.testing.models import (
    example_call,
    tiny_dit,
    tiny_flux,
    tiny_lumina2,
    tiny_pixart,
    tiny_sd3,
    tiny_wan,
)
from tests.conversions import checked_anew


@pytest.fixture(scope="module", autouse=True)
def shared_traces() -> Iterator[None]:
    """In place of the fixture of other tests: these change values in place that copies of a graph share.

    Verification is that of users, which finds nothing proven in other graphs.
    """
    with checked_anew():
        yield


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def forward(self, x, timestep):
        first, second = torch.chunk(self.linear(x), 2, dim=-1)
        return (first * (1 + second)).transpose(1, 2)


def captured() -> CapturedGraph:
    architecture = Architecture.of(Model().eval(), "timestep")
    return architecture.capture(architecture.canonical((torch.randn(2, 4, 8), torch.zeros(2)), {}))


def check(module: fx.GraphModule) -> None:
    verify(module, SPECS[Stage.CAPTURED])


def nodes(module: fx.GraphModule, name: str) -> list[fx.Node]:
    return [node for node in module.graph.nodes if name in str(node.target)]


@pytest.fixture
def module() -> fx.GraphModule:
    module = captured().module
    check(module)
    return module


def counted(module: fx.GraphModule) -> int:
    """How many ops a verification runs."""
    ran = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal ran
            ran += 1
            return function(*args, **(kwargs or {}))

    with Count():
        check(module)
    return ran


def forget_proofs(module: fx.GraphModule) -> fx.GraphModule:
    for node in module.graph.nodes:
        node.meta.pop(_PROVEN, None)
    return module


def test_second_verification_runs_nothing(module):
    assert counted(forget_proofs(captured().module)) > 0
    assert counted(module) == 0
    assert counted(fx.GraphModule(module, copy.deepcopy(module.graph))) == 0


def test_a_trace_proves_what_it_ran():
    assert counted(captured().module) == 0


@pytest.mark.parametrize(
    ("make", "writes"),
    [
        (tiny_dit, False),
        (tiny_pixart, False),
        (tiny_sd3, False),
        (tiny_flux, False),
        (tiny_wan, True),
        (tiny_lumina2, True),
    ],
)
def test_what_a_trace_proves_is_true(make, writes):
    model = make()
    architecture = Architecture.of(model, "timestep")
    module = architecture.capture(architecture.canonical((), example_call(model))).module
    assert {is_proven(node) for node in nodes(module, "aten.linear")} == {not writes}
    assert counted(forget_proofs(module)) > 0


class InFloat64(Model):
    """Its table has another dtype when the graph runs, where the default dtype is another one."""

    def forward(self, x, timestep):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            table = torch.arange(8) / 3
        finally:
            torch.set_default_dtype(before)
        return self.linear(x * table.to(x.dtype))


class GivesOtherData(Model):
    def forward(self, x, timestep):
        y = self.linear(x).clone()
        y.data = y.data.double()
        return y * 2


class UnderAutocast(Model):
    def forward(self, x, timestep):
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_dtype("cpu", torch.bfloat16)
        try:
            return self.linear(x)
        finally:
            torch.set_autocast_enabled("cpu", False)


@pytest.mark.parametrize("cls", [InFloat64, GivesOtherData, UnderAutocast])
def test_a_trace_does_not_prove_what_depends_on_where_its_code_ran(cls):
    architecture = Architecture.of(cls().eval(), "timestep")
    call = architecture.canonical((torch.randn(2, 4, 8), torch.zeros(2)), {})
    with pytest.raises(VerificationError, match="but is recorded as"):
        check(architecture.capture(call).module)


class Writes(Model):
    def forward(self, x, timestep):
        return self.linear(x).mul_(2).unsqueeze(0)


def test_a_trace_proves_nothing_if_its_code_writes():
    architecture = Architecture.of(Writes().eval(), "timestep")
    module = architecture.capture(architecture.canonical((torch.randn(2, 4, 8), torch.zeros(2)), {})).module
    assert not any(map(is_proven, module.graph.nodes))
    check(module)


def wrong_shape(module: fx.GraphModule) -> None:
    (node,) = nodes(module, "mul")
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty(2, 4, 5)


def wrong_dtype(module: fx.GraphModule) -> None:
    (node,) = nodes(module, "add")
    node.meta["val"] = node.meta["val"].half()


def wrong_argument(module: fx.GraphModule) -> None:
    (node,) = nodes(module, "transpose")
    node.args = (node.args[0], 0, 1)


def wrong_op(module: fx.GraphModule) -> None:
    (node,) = nodes(module, "transpose")
    node.target = torch.ops.aten.select.int


def wrong_input(module: fx.GraphModule) -> None:
    (mul,) = nodes(module, "mul")
    (linear,) = nodes(module, "linear.default")
    mul.replace_input_with(mul.all_input_nodes[0], linear)


def resized_in_place(module: fx.GraphModule) -> None:
    (node,) = nodes(module, "mul")
    node.meta["val"].unsqueeze_(0)


def narrower_parameter(module: fx.GraphModule) -> None:
    (weight,) = nodes(module, "linear.weight")
    Rewriter(module, "test").put(weight, torch.zeros(6, 7))


def lost_metadata(module: fx.GraphModule) -> None:
    del nodes(module, "add")[0].meta["val"]


@pytest.mark.parametrize("copied", [False, True], ids=["same", "copied"])
@pytest.mark.parametrize(
    "spoil",
    [wrong_shape, wrong_dtype, wrong_argument, wrong_op, wrong_input, resized_in_place, narrower_parameter],
)
def test_what_changed_since_is_caught(module, spoil, copied):
    if copied:
        module = fx.GraphModule(module, copy.deepcopy(module.graph))
    spoil(module)
    with pytest.raises(VerificationError):
        check(module)


def test_lost_metadata_is_caught(module):
    lost_metadata(module)
    with pytest.raises(VerificationError, match="not recorded"):
        check(module)


def test_parameters_of_one_shape_leave_proofs_standing(module):
    (weight,) = nodes(module, "linear.weight")
    Rewriter(module, "test").put(weight, torch.zeros(6, 8))
    assert counted(module) == 0


def test_what_the_rewriter_made_is_proven_until_it_changes(module):
    (mul,) = nodes(module, "mul")
    rewriter = Rewriter(module, "test")
    with rewriter.after(mul):
        made = rewriter.call(torch.ops.aten.neg.default, (mul,), [mul])
    assert counted(module) == 0
    made.meta["val"] = made.meta["val"].half()
    with pytest.raises(VerificationError):
        check(module)


def test_values_that_an_op_cannot_tell_apart_leave_proofs_standing(module):
    """Also with an open batch size, which stays open."""
    (chunk,) = nodes(module, "chunk")
    source = chunk.all_input_nodes[0]
    source.meta["val"] = source.meta["val"].clone()
    assert [type(size) for size in source.meta["val"].shape] == [torch.SymInt, int, int]
    assert is_proven(source) and is_proven(chunk)
    assert counted(module) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.half(),
        lambda value: value.transpose(1, 2),
        lambda value: value.transpose(1, 2).contiguous().transpose(1, 2),  # Only the strides differ.
        lambda value: value[:1],
        lambda value: value.to("meta"),
    ],
    ids=["dtype", "shape", "strides", "batch", "device"],
)
def test_values_that_differ_are_proven_again(module, change):
    (chunk,) = nodes(module, "chunk")
    before = is_proven(chunk)
    source = chunk.all_input_nodes[0]
    source.meta["val"] = change(source.meta["val"])
    assert (before, is_proven(chunk)) == (True, False)


class Modulated(nn.Module):
    def forward(self, x, timestep):
        return torch.addcmul(timestep[:, None], x, timestep[:, None] + 1)


def test_an_op_that_broadcasts_the_open_batch_is_verified():
    """torch cannot run its meta kernel on open sizes without the dispatcher in Python."""
    architecture = Architecture.of(Modulated().eval(), "timestep")
    found = architecture.capture(architecture.canonical((torch.randn(2, 4), torch.zeros(2)), {}))
    assert found.static_batch is None and nodes(found.module, "addcmul")
    check(found.module)
    check(in_float64(found.module))
