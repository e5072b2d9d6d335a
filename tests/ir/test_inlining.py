"""Functions that become nodes, keyword arguments, shapes that are inferred again, and ops of other packages."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.backends.fake_quant import FakeQuant
from fxquant.backends.native import Native
from fxquant.errors import BackendError, ConfigurationError, DuplicateNameError, PassError, VerificationError
from fxquant.ir import stages
from fxquant.ir.meta import LAYER, PROVENANCE
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import SPECS, Stage, register_op, verify
from fxquant.planning.plan import Plan
from tests.support import captured, layer_node, nodes_of, outputs, text

aten = torch.ops.aten


TABLE = torch.ones(6)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


def prepared() -> tuple:
    module = captured(Model(), x=torch.randn(2, 3, 4)).module
    return module, Rewriter(module, "test"), layer_node(module, "b")


def branch(x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    batch, tokens, channels = x.shape
    low = (x.reshape(batch * tokens, channels) @ down).unflatten(0, (batch, tokens))
    return F.linear(low, up) * scale


def test_a_function_becomes_nodes() -> None:
    module, rewriter, node = prepared()
    model, x = Model(), torch.randn(5, 3, 4)
    down, up = torch.randn(6, 2), torch.randn(4, 2)
    attributes = [rewriter.constant(name, value, [node]) for name, value in (("down", down), ("up", up))]
    with rewriter.after(node):
        low = rewriter.inline(branch, [node.args[0], *attributes, 0.5], [node], layer=True)
        total = rewriter.call(aten.add.Tensor, (node, low), [node], kwargs={"alpha": 2})
    (output,) = nodes_of(module, "output")
    rewriter.redirect(output, node, total)
    module.recompile()
    verify(module, SPECS[Stage.CAPTURED])
    read = F.relu(model.a(x))
    torch.testing.assert_close(outputs(module, x)[0], model.b(read) + 2 * branch(read, down, up, 0.5))
    assert low.meta[LAYER] == "b" and low.meta[PROVENANCE][-1].pass_name == "test"
    assert str(total.meta["val"].shape[0]) == str(node.meta["val"].shape[0])  # The batch is open: 5 instead of 2.


def test_several_results() -> None:
    module, rewriter, node = prepared()
    with rewriter.after(node):
        low, high = rewriter.inline(lambda x: torch.aminmax(x, dim=-1), [node], [node])
    assert low is not high and tuple(low.meta["val"].shape)[1:] == (3,)
    module.graph.eliminate_dead_code()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x * TABLE, "reads a tensor that is not an argument; add it by Rewriter.constant"),
        (lambda x: x * 2 if x.sum() > 0 else x, "cannot be traced"),
        (lambda x: x @ x, "<lambda> cannot be traced: "),
        (lambda x: 3, "does not return tensors"),
    ],
)
def test_functions_that_cannot_become_nodes(function: object, message: str) -> None:
    _, rewriter, node = prepared()
    with rewriter.before(node), pytest.raises(PassError, match=f"test: .*{message}"):
        rewriter.inline(function, [node.args[0]], [node])  # type: ignore[arg-type]


def test_shapes_after_an_argument_changed() -> None:
    module, rewriter, node = prepared()
    with rewriter.before(node):
        part = rewriter.call(aten.narrow.default, (node.args[0], 1, 0, 2), [node])
        wide = rewriter.call(aten.to.dtype, (part, torch.float32), [node])
    rewriter.redirect(node, node.args[0], wide)
    rewriter.set_argument(part, "length", 1)
    assert [tuple(one.meta["val"].shape)[1:] for one in (part, wide, node)] == [(1, 6), (1, 6), (1, 4)]
    module.recompile()
    verify(module, SPECS[Stage.CAPTURED])
    with pytest.raises(PassError, match=r"test: aten.narrow.default does not accept the arguments of node narrow\w*: "):
        rewriter.set_argument(part, "length", 7)


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> object:
    """An op of another package."""
    monkeypatch.setattr(stages, "_REGISTERED", {})
    if not hasattr(torch.ops.fxquant_test, "twice"):
        torch.library.define("fxquant_test::twice", "(Tensor x) -> Tensor")
        torch.library.impl("fxquant_test::twice", "CompositeExplicitAutograd", lambda x: 2 * x)
        torch.library.register_fake("fxquant_test::twice", torch.empty_like)
    return torch.ops.fxquant_test.twice


def with_op(op: object) -> tuple:
    module, rewriter, node = prepared()
    with rewriter.after(node):
        new = rewriter.call(op.default, (node,), [node], layer=True)  # type: ignore[attr-defined]
    (output,) = nodes_of(module, "output")
    rewriter.redirect(output, node, new)
    module.recompile()
    return module


def test_graphs_hold_ops_that_others_registered(twice: object) -> None:
    module = with_op(twice)
    with pytest.raises(VerificationError, match="does not belong in a graph of stage 'quantized'"):
        verify(module, SPECS[Stage.QUANTIZED])
    register_op(Stage.QUANTIZED, twice)
    register_op(Stage.QUANTIZED, twice.default)  # type: ignore[attr-defined]  # Again, as a notebook does.
    verify(module, SPECS[Stage.QUANTIZED])
    with pytest.raises(VerificationError, match="does not belong in a graph of stage 'transformed'"):
        verify(module, SPECS[Stage.TRANSFORMED])
    FakeQuant().finish(module, Plan("", "", None))
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(outputs(module, x)[0], 2 * Model()(x))
    assert text(module).endswith("= fxquant_test::twice(linear_1)\nreturn twice_default")


def test_backends_refuse_them_by_name(twice: object) -> None:
    register_op(Stage.TRANSFORMED, twice)
    message = (
        r"'native' cannot run the op fxquant_test::twice of 1 layers \(b\), made by test; use backend 'fake-quant'"
    )
    with pytest.raises(BackendError, match=message):
        Native().finish(with_op(twice), Plan("", "", None))


def test_what_cannot_be_registered(twice: object) -> None:
    for op, message in [
        (torch.relu, "is not an op"),
        (aten.relu, "aten::relu belongs to aten"),
        (torch.ops.fxquant.linear, "belongs to fxquant"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            register_op(Stage.QUANTIZED, op)
    with pytest.raises(ConfigurationError, match="not lowered"):
        register_op(Stage.LOWERED, twice)
    register_op(Stage.QUANTIZED, twice)
    with pytest.raises(DuplicateNameError, match="is registered for quantized graphs already"):
        register_op(Stage.TRANSFORMED, twice)


def define(name: str, schema: str, kernel: object, fake: object = None) -> object:
    """An op of the namespace of the tests, defined once per process."""
    if not hasattr(torch.ops.fxquant_test, name):
        torch.library.define(f"fxquant_test::{name}", schema)
        torch.library.impl(f"fxquant_test::{name}", "CPU", kernel)
        if fake is not None:
            torch.library.register_fake(f"fxquant_test::{name}", fake)
    return getattr(torch.ops.fxquant_test, name)


def test_an_op_without_a_fake_kernel(twice: object) -> None:
    op = define("shapeless", "(Tensor x) -> Tensor", lambda x: x + 1)
    with pytest.raises(ConfigurationError, match=r"fxquant_test::shapeless does not say .*register_fake"):
        register_op(Stage.QUANTIZED, op)
    for other in (torch.ops.fxquant_test, torch.ops.higher_order.cond, "fxquant_test::twice", None):
        with pytest.raises(ConfigurationError, match="is not an op"):
            register_op(Stage.QUANTIZED, other)
    with pytest.raises(ConfigurationError, match="not quantized"):
        register_op("quantized", twice)  # type: ignore[arg-type]


def test_an_op_that_writes_or_returns_a_list(twice: object) -> None:
    writes = define("writes", "(Tensor(a!) x) -> Tensor(a!)", lambda x: x.add_(1), lambda x: x)
    with pytest.raises(ConfigurationError, match="fxquant_test::writes writes into an argument"):
        register_op(Stage.QUANTIZED, writes)
    parts = define("parts", "(Tensor x) -> Tensor[]", lambda x: [x + 1, x * 2], lambda x: [x.new_empty(x.shape)] * 2)
    register_op(Stage.QUANTIZED, parts)
    module, rewriter, node = prepared()
    with rewriter.after(node):
        both = rewriter.call(parts.default, (node,), [node])  # type: ignore[attr-defined]
        first = rewriter.call(operator.getitem, (both, 0), [node])
    (output,) = nodes_of(module, "output")
    rewriter.redirect(output, node, first)
    module.recompile()
    verify(module, SPECS[Stage.QUANTIZED])
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(outputs(module, x)[0], Model()(x) + 1)


def test_a_function_that_fails_without_a_word() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError

    _, rewriter, node = prepared()
    with pytest.raises(PassError, match=r"test: fails cannot be traced: ValueError$"):
        rewriter.inline(fails, [node], [node])
