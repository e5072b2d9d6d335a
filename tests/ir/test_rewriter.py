from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.capture.trace import Architecture
from fxquant.errors import ArgumentError, NonFiniteError, PassError
from fxquant.ir.arguments import args
from fxquant.ir.meta import LAYER, PROVENANCE
from fxquant.ir.places import Origin, place_of
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import SPECS, Stage, verify
from fxquant.ir.tensors import bind, read_tensors, weights_of
from tests.support import captured, golden, layer_node, nodes_of, text

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(F.relu(self.a(x)))


@pytest.fixture
def module() -> fx.GraphModule:
    return captured(Model(), x=torch.randn(2, 4)).module


@pytest.fixture
def rewriter(module: fx.GraphModule) -> Rewriter:
    return Rewriter(module, "test")


def test_a_new_node_has_shape_layer_and_provenance(module: fx.GraphModule, rewriter: Rewriter) -> None:
    relu, last = nodes_of(module, aten.relu.default)[0], layer_node(module, "a@2")
    with rewriter.before(last):
        node = rewriter.call(aten.mul.Tensor, (relu, 2.0), sources=[relu, last], name="twice", layer=True)
    rewriter.redirect(last, relu, node)
    assert (node.meta["val"].shape[1], node.meta["val"].dtype) == (4, torch.float32)
    assert str(node.meta["val"].shape[0]) == str(relu.meta["val"].shape[0])
    assert node.meta[LAYER] == "a@2"
    assert node.meta[PROVENANCE] == (Origin("test", ("relu", "linear_1")),)
    assert str(node.meta[PROVENANCE][0]) == "test(relu, linear_1)"
    assert rewriter.edits == 2
    module.recompile()
    verify(module, SPECS[Stage.CAPTURED])


def test_the_name_of_a_layer_is_handed_on_only_where_asked(module: fx.GraphModule, rewriter: Rewriter) -> None:
    first, last = layer_node(module, "a"), layer_node(module, "a@2")
    with rewriter.after(last):
        plain = rewriter.call(aten.neg.default, (last,), [first, last])
        own = rewriter.call(aten.neg.default, (last,), [first, last], layer=True)
    assert LAYER not in plain.meta and plain.meta["nn_module_stack"] == last.meta["nn_module_stack"]
    assert own.meta[LAYER] == "a@2"
    with rewriter.after(own):
        assert LAYER not in rewriter.call(aten.neg.default, (own,), [plain], layer=True).meta


def test_an_argument_is_set_by_name(module: fx.GraphModule, rewriter: Rewriter) -> None:
    node, relu = layer_node(module, "a@2"), nodes_of(module, aten.relu.default)[0]
    with rewriter.before(node):
        bias = rewriter.call(aten.sum.default, (relu,), [relu])
        total = rewriter.call(aten.add.Tensor, (relu, relu), [relu])
    old, before = node.args, rewriter.edits
    rewriter.set_argument(node, "bias", bias)
    assert node.args == (*old[:2], bias)
    assert node.meta[PROVENANCE][-1] == Origin("test", (node.name,))
    rewriter.set_argument(total, "alpha", 2)
    assert (total.args, total.kwargs) == ((relu, relu), {"alpha": 2})
    assert rewriter.edits == before + 2
    with pytest.raises(ArgumentError, match="no argument 'gamma'"):
        rewriter.set_argument(node, "gamma", bias)


def test_an_argument_is_left_out(module: fx.GraphModule, rewriter: Rewriter) -> None:
    node = layer_node(module, "a")
    weight, bias = node.args[1:]
    rewriter.leave_out(node, "bias")
    assert node.args == (node.args[0], weight) and node not in bias.users
    node.kwargs = {"bias": bias}
    rewriter.leave_out(node, "bias")
    assert node.kwargs == {} and len(node.args) == 2
    assert PROVENANCE not in node.meta and rewriter.edits == 2
    with pytest.raises(ArgumentError, match="has no default"):
        rewriter.leave_out(node, "weight")
    module.recompile()
    module.graph.eliminate_dead_code()
    verify(module, SPECS[Stage.CAPTURED])


def test_provenance_is_inherited(module: fx.GraphModule) -> None:
    relu = nodes_of(module, aten.relu.default)[0]
    with Rewriter(module, "first").after(relu):
        one = Rewriter(module, "first").call(aten.neg.default, (relu,), [relu])
    with Rewriter(module, "second").after(one):
        two = Rewriter(module, "second").call(aten.neg.default, (one,), [one])
    assert [origin.pass_name for origin in two.meta[PROVENANCE]] == ["first", "second"]


def test_nodes_after_a_node_have_the_order_in_which_they_are_made(module: fx.GraphModule, rewriter: Rewriter) -> None:
    node = layer_node(module, "a")
    with rewriter.after(node):
        made = [rewriter.call(aten.neg.default, (node,), [node])]
        made += [rewriter.call(aten.neg.default, (made[0],), [node])]
    order = list(module.graph.nodes)
    place = order.index(node)
    assert order[place + 1 : place + 3] == made
    module.graph.lint()


def test_replace_erases_what_is_left_unread(module: fx.GraphModule, rewriter: Rewriter) -> None:
    relu = nodes_of(module, aten.relu.default)[0]
    rewriter.replace(relu, relu.args[0])
    module.recompile()
    assert text(module) == golden(
        """
        x: float32[B, 4]
        linear: float32[B, 4] = linear(x, @a.weight, @a.bias)
        linear_1: float32[B, 4] = linear(linear, @a.weight, @a.bias)
        return linear_1
        """
    )


def test_a_node_that_is_read_cannot_be_erased(module: fx.GraphModule, rewriter: Rewriter) -> None:
    with pytest.raises(PassError, match="test: relu is still read by linear_1"):
        rewriter.erase(nodes_of(module, aten.relu.default)[0])


def test_folding_a_shared_weight_leaves_the_other_reader_alone(module: fx.GraphModule, rewriter: Rewriter) -> None:
    first, second = layer_node(module, "a"), nodes_of(module, aten.linear.default)[1]
    old = rewriter.tensor(first.args[1]).clone()
    rewriter.fold(second, "weight", lambda w: w.double() * 2)
    assert torch.equal(rewriter.tensor(first.args[1]), old)
    assert torch.equal(rewriter.tensor(second.args[1]), old * 2)
    assert rewriter.tensor(second.args[1]).dtype == torch.float32
    rewriter.fold(second, "weight", lambda w: w.double() * 2)  # It is private by now.
    assert torch.equal(rewriter.tensor(second.args[1]), old * 4)
    assert len({str(node.target) for node in module.graph.nodes if node.op == "get_attr"}) == 3


def test_folding_never_writes_into_the_model(module: fx.GraphModule, rewriter: Rewriter) -> None:
    node = layer_node(module, "a")
    held = rewriter.tensor(node.args[2])
    old = held.clone()
    rewriter.fold(node, "bias", lambda b: b + 1)
    assert torch.equal(held, old)


def test_a_function_that_folds_in_place_does_not_write_into_the_model(
    module: fx.GraphModule, rewriter: Rewriter
) -> None:
    node = next(node for node in module.graph.nodes if node.target is aten.linear.default)
    weight = rewriter.tensor(node.args[1])
    before = weight.clone()
    rewriter.fold(node, "weight", lambda w: w.mul_(2))
    assert torch.equal(weight, before)
    assert torch.equal(rewriter.tensor(args(node).node("weight")), 2 * before)


def test_what_is_not_a_tensor_is_refused_by_name(module: fx.GraphModule, rewriter: Rewriter) -> None:
    node = next(node for node in module.graph.nodes if node.target is aten.linear.default)
    with pytest.raises(PassError, match=r"the function that folds into .* returned a NoneType"):
        rewriter.fold(node, "weight", lambda _: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(PassError, match="the constant 'scale' is a list; give a tensor"):
        rewriter.constant("scale", [1.0], [node])  # type: ignore[arg-type]
    with pytest.raises(PassError, match=r"the arguments of aten.neg.default are a list; give a tuple"):
        rewriter.call(aten.neg.default, [node], [node])  # type: ignore[arg-type]


def test_a_fold_that_overflows_is_refused_by_name(module: fx.GraphModule, rewriter: Rewriter) -> None:
    with pytest.raises(NonFiniteError, match=r"a.weight_of_a does not fit torch.float32 after test"):
        rewriter.fold(layer_node(module, "a"), "weight", lambda w: w.double() * 1e300)


def test_names_of_constants_do_not_collide(module: fx.GraphModule, rewriter: Rewriter) -> None:
    nodes = [rewriter.constant("a.weight", torch.ones(1), []), rewriter.constant("new.one", torch.ones(1), [])]
    nodes.append(rewriter.constant("new.one", torch.zeros(1).int(), []))
    assert [str(node.target) for node in nodes] == ["a.weight_2", "new.one", "new.one_2"]
    assert "new.one_2" in dict(module.named_buffers())


def test_a_parameter_that_was_lacking_is_given(rewriter: Rewriter, module: fx.GraphModule) -> None:
    class NoBias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    module = captured(NoBias(), x=torch.randn(2, 4)).module
    Rewriter(module, "test").give(layer_node(module, "a"), "bias", torch.ones(4, dtype=torch.float64))
    module.recompile()
    verify(module, SPECS[Stage.CAPTURED])
    assert module.get_parameter("a.bias").dtype == torch.float32


class Norms(nn.Module):
    """With the option, a norm more, before the others."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.LayerNorm(4, elementwise_affine=False) for _ in range(2)])
        self.extra = nn.LayerNorm(4, elementwise_affine=False)
        self.row = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, extra: bool = False) -> Tensor:
        if extra:
            x = self.extra(x) * self.row
        for block in self.blocks:
            x = block(x) * self.row
        return x


def test_what_is_given_has_one_name_in_all_graphs_of_a_model() -> None:
    model = Norms().eval()
    architecture = Architecture.of(model, None)
    names = []
    for extra in (False, True):
        found = architecture.capture(architecture.canonical((torch.randn(2, 4), extra), {}))
        bind(found.module, weights_of(model))
        rewriter = Rewriter(found.module, "test")
        for node in nodes_of(found.module, aten.layer_norm.default):
            rewriter.give(node, "weight", torch.ones(4))
        for node in nodes_of(found.module, aten.mul.Tensor)[-1:]:
            rewriter.fold_attribute(node.args[1], lambda p: p * 2, [node])
        names.append({name for name in read_tensors(found.module) if name != "row"})
    assert names[1] == names[0] | {"extra.layer_norm.weight"}
    assert names[0] == {"blocks.0.layer_norm.weight", "blocks.1.layer_norm.weight", "row_of_mul"}


def test_place_of(module: fx.GraphModule) -> None:
    assert place_of(layer_node(module, "a")) == "a"
    assert place_of(nodes_of(module, aten.relu.default)[0]) == "relu"


@pytest.mark.parametrize("name", ["meta", "training", "code", "graph", "class", "forward.weight"])
def test_a_constant_replaces_no_attribute_of_the_module(name: str) -> None:
    module = captured(nn.Linear(4, 4), torch.randn(3, 4)).module
    meta, code, training, rewriter = module.meta, module.code, module.training, Rewriter(module, "test")
    node = rewriter.constant(name, torch.ones(4), [])
    assert module.meta is meta and module.code == code and module.training is training
    assert torch.equal(rewriter.tensor(node), torch.ones(4))
    with rewriter.after(node):
        total = rewriter.call(aten.add.Tensor, (node, 1.0), [node])
    next(iter(reversed(module.graph.nodes))).args = ((total,),)
    module.recompile()
    assert torch.equal(module(torch.randn(3, 4))[0], torch.full((4,), 2.0))


def test_a_tensor_among_the_arguments_is_refused() -> None:
    module = captured(nn.Linear(4, 4), torch.randn(3, 4)).module
    linear = nodes_of(module, aten.linear.default)[0]
    with pytest.raises(PassError, match=r"an argument of aten.add.Tensor is a tensor; add it by Rewriter.constant"):
        Rewriter(module, "test").call(aten.add.Tensor, (linear, torch.ones(4)), [linear])


def test_an_argument_is_given_once() -> None:
    module = captured(nn.Linear(4, 4), torch.randn(3, 4)).module
    linear = nodes_of(module, aten.linear.default)[0]
    rewriter = Rewriter(module, "test")
    node = module.graph.call_function(aten.add.Tensor, (linear,), {"other": 2.0, "alpha": 3})
    rewriter.set_argument(node, "other", 4.0)
    assert (node.args, node.kwargs) == ((linear,), {"other": 4.0, "alpha": 3})
    given = module.graph.call_function(aten.layer_norm.default, (linear,), {"normalized_shape": [4], "eps": 1e-3})
    rewriter.set_argument(given, "weight", None)
    assert not set(given.kwargs) & {"normalized_shape", "weight"} and given.args == (linear, [4], None)


def test_tensors_are_contiguous_as_files_store_them() -> None:
    module = captured(nn.Linear(4, 4), torch.randn(3, 4)).module
    linear, rewriter = nodes_of(module, aten.linear.default)[0], Rewriter(module, "test")
    expanded, transposed = torch.randn(1).expand(4), torch.randn(4, 4).t()
    rewriter.fold(linear, "weight", lambda _: transposed)
    node = rewriter.constant("row", expanded, [linear])
    rewriter.set_argument(linear, "bias", node)
    for attribute, value in ((linear.args[1], transposed), (node, expanded)):
        held, recorded = rewriter.tensor(attribute), attribute.meta["val"]
        assert torch.equal(held, value)
        assert held.is_contiguous() and recorded.stride() == held.stride()
    module.recompile()
    verify(module, SPECS[Stage.CAPTURED])
