"""Edits past the rewriter are found and named, and a graph is restored when a pass fails."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.errors import FxquantError, PassError
from fxquant.ir import rewriter as rewriting
from fxquant.ir.arguments import args, source_of
from fxquant.ir.meta import LAYER
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.ir.tensors import read_tensors, set_tensor
from fxquant.pipeline.pipeline import Pass, Pipeline, Tier
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan
from tests.support import captured, count, layer_node, nodes_of, outputs, text

aten = torch.ops.aten


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.register_buffer("table", torch.arange(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x))) + y + self.table


Edit = Callable[[fx.Graph, Rewriter], Any]


@dataclass(frozen=True)
class Does(Pass):
    """A pass that does what a test says."""

    name: ClassVar[str] = "does"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.LOWERED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    edit: ClassVar[Edit]

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        type(self).edit(graph, rewriter)


def module() -> fx.GraphModule:
    return captured(Feed(), x=torch.randn(2, 4), y=torch.randn(2, 4)).module


def run(module: fx.GraphModule, edit: Edit) -> None:
    step = type("Does", (Does,), {"edit": staticmethod(edit)})()
    Pipeline([step]).run(module, Plan("", "", None))


def gelu(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.target is aten.gelu.default)


def removed(graph: fx.Graph, rewriter: Rewriter) -> None:
    node = gelu(graph)
    node.replace_all_uses_with(source_of(node))


def removed_and_erased(graph: fx.Graph, rewriter: Rewriter) -> None:
    removed(graph, rewriter)
    graph.erase_node(gelu(graph))


def argument(graph: fx.Graph, rewriter: Rewriter) -> None:
    gelu(graph).kwargs = {"approximate": "tanh"}


def target(graph: fx.Graph, rewriter: Rewriter) -> None:
    gelu(graph).target = aten.relu.default


def added(graph: fx.Graph, rewriter: Rewriter) -> None:
    with graph.inserting_after(gelu(graph)):
        new = graph.call_function(aten.neg.default, (gelu(graph),))
    new.meta["val"] = gelu(graph).meta["val"]


def behind_an_edit(graph: fx.Graph, rewriter: Rewriter) -> None:
    with rewriter.after(gelu(graph)):
        new = rewriter.call(aten.neg.default, (gelu(graph),), [gelu(graph)])
    new.args = (source_of(gelu(graph)),)


def erased(graph: fx.Graph, rewriter: Rewriter) -> None:
    with rewriter.after(gelu(graph)):
        new = rewriter.call(aten.neg.default, (gelu(graph),), [gelu(graph)])
    graph.erase_node(new)
    removed_and_erased(graph, rewriter)


def up(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.target == "up.weight")


def assigned(graph: fx.Graph, rewriter: Rewriter) -> None:
    set_tensor(rewriter.module, "up.weight", rewriter.tensor(up(graph)) * 2)


def in_place(graph: fx.Graph, rewriter: Rewriter) -> None:
    with torch.no_grad():
        rewriter.tensor(up(graph)).mul_(1.1)


def through_a_view(graph: fx.Graph, rewriter: Rewriter) -> None:
    rewriter.tensor(up(graph)).detach()[0].zero_()


def buffer_in_place(graph: fx.Graph, rewriter: Rewriter) -> None:
    rewriter.module.table.add_(1)


def through_data(graph: fx.Graph, rewriter: Rewriter) -> None:
    rewriter.tensor(up(graph)).data.mul_(1.1)


def other_data(graph: fx.Graph, rewriter: Rewriter) -> None:
    rewriter.tensor(up(graph)).data = torch.zeros(8, 4)


def through_numpy(graph: fx.Graph, rewriter: Rewriter) -> None:
    rewriter.tensor(up(graph)).detach().numpy()[...] = 7


def trained(graph: fx.Graph, rewriter: Rewriter) -> None:
    weight = rewriter.tensor(up(graph))
    weight.requires_grad_(not weight.requires_grad)


def hooked_weight(graph: fx.Graph, rewriter: Rewriter) -> None:
    trained(graph, rewriter)
    rewriter.tensor(up(graph)).register_hook(lambda gradient: gradient * 2)
    rewriter.tensor(up(graph)).detach_()


def moved(graph: fx.Graph, rewriter: Rewriter) -> None:
    gelu(graph).append(layer_node(rewriter.module, "up"))


def of_no_layer(graph: fx.Graph, rewriter: Rewriter) -> None:
    del layer_node(rewriter.module, "down").meta[LAYER]


def other_shape(graph: fx.Graph, rewriter: Rewriter) -> None:
    gelu(graph).meta["val"] = gelu(graph).meta["val"].double()


def renamed(graph: fx.Graph, rewriter: Rewriter) -> None:
    gelu(graph).name = "linear"


def without_readers(graph: fx.Graph, rewriter: Rewriter) -> None:
    gelu(graph).users.clear()


def other_forward(graph: fx.Graph, rewriter: Rewriter) -> None:
    rewriter.module.forward = lambda x, y: (x,)


def hooked(graph: fx.Graph, rewriter: Rewriter) -> None:
    rewriter.module.register_forward_hook(lambda module, given, found: (found[0] * 2,))


def uncounted(graph: fx.Graph, rewriter: Rewriter) -> None:
    rewriter.replace(gelu(graph), source_of(gelu(graph)))
    rewriter.edits = 0


def added_and_removed(graph: fx.Graph, rewriter: Rewriter) -> None:
    with rewriter.after(gelu(graph)):
        rewriter.call(aten.neg.default, (gelu(graph),), [gelu(graph)])
    graph.eliminate_dead_code()


def with_input(graph: fx.Graph, rewriter: Rewriter) -> None:
    with graph.inserting_before(next(iter(graph.nodes))):
        graph.placeholder("z").meta["val"] = gelu(graph).meta["val"]


def fewer_outputs(graph: fx.Graph, rewriter: Rewriter) -> None:
    (output,) = (node for node in rewriter.graph.nodes if node.op == "output")
    rewriter.redirect(output, output.args[0][0], gelu(rewriter.graph))


def other_dtype(graph: fx.Graph, rewriter: Rewriter) -> None:
    (output,) = (node for node in rewriter.graph.nodes if node.op == "output")
    last = output.args[0][0]
    with rewriter.before(output):
        wide = rewriter.call(aten.to.dtype, (last, torch.float64), [last])
    rewriter.redirect(output, last, wide)


def no_y(graph: fx.Graph, rewriter: Rewriter) -> None:
    x, y = (node for node in graph.nodes if node.op == "placeholder")
    rewriter.redirect(next(iter(y.users)), y, x)
    rewriter.erase(y)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            removed,
            r"does: node linear_1 \(layer down\) was changed past the rewriter: its arguments were \(gelu.*redir",
        ),
        (removed_and_erased, r"node linear_1 \(layer down\) was changed past the rewriter"),
        (argument, r"node gelu was changed past the rewriter: its keyword arguments were \{\} and are now \{'approx"),
        (target, r"node gelu was changed past the rewriter: it was aten.gelu.default and is now aten.relu.default"),
        (added, r"node neg\w* was added to the graph past the rewriter.*rewriter\.call"),
        (behind_an_edit, r"node neg\w* was changed past the rewriter"),
        (erased, r"was changed past the rewriter"),
        (added_and_removed, r"node neg\w* was erased past the rewriter; use rewriter.erase"),
        (assigned, r"does: the tensor up.weight was set past the rewriter; use rewriter.put or rewriter.fold"),
        (in_place, r"does: the values of the tensor up.weight were changed in place.*rewriter.fold"),
        (through_a_view, r"the values of the tensor up.weight were changed in place"),
        (buffer_in_place, r"the values of the tensor table were changed in place"),
        (through_data, r"the values of the tensor up.weight were changed in place"),
        (other_data, r"the values of the tensor up.weight were changed in place"),
        (through_numpy, r"the values of the tensor up.weight were changed in place"),
        (trained, r"does: requires_grad of the tensor up.weight was set.*tensor.detach\(\).clone\(\)"),
        (hooked_weight, r"does: the gradient or a hook of the tensor up.weight was set"),
        (moved, r"does: node gelu was moved past the rewriter|does: node linear .*was moved past the rewriter"),
        (of_no_layer, r"node linear_1 was of layer down and is now of layer None"),
        (other_shape, r"the recorded shape or dtype of node gelu was set past the rewriter"),
        (renamed, r"the name or the readers of node gelu were set past the rewriter"),
        (without_readers, r"the name or the readers of node linear_1 were set past"),
        (other_forward, r"the forward of the graph module changed"),
        (hooked, r"_forward_hooks of the graph module changed"),
        (uncounted, r"the number of edits only grows"),
        (with_input, r"node z was added to the graph past the rewriter"),
        (
            fewer_outputs,
            r"does: the outputs of the graph were \(float32\[s\d+, 4\]",
        ),
        (other_dtype, r"the outputs of the graph were .*are now \(float64"),
        (no_y, r"does: the inputs of the graph were \(x float32.*; y float32"),
    ],
)
def test_an_edit_that_is_refused_and_undone(edit: Edit, message: str) -> None:
    graph = module()
    inputs = torch.randn(2, 4), torch.randn(2, 4)
    before, tensors, expected = text(graph), read_tensors(graph), outputs(graph, *inputs)
    names = [node.name for node in graph.graph.nodes]
    with pytest.raises(PassError, match=message):
        run(graph, edit)
    assert text(graph) == before
    assert [node.name for node in graph.graph.nodes] == names
    assert {name: id(tensor) for name, tensor in read_tensors(graph).items()} == {
        name: id(tensor) for name, tensor in tensors.items()
    }
    if edit not in (in_place, through_a_view, buffer_in_place, through_data, other_data, through_numpy):
        assert torch.equal(outputs(graph, *inputs)[0], expected[0])
    run(graph, lambda graph, rewriter: rewriter.replace(gelu(graph), source_of(gelu(graph))))  # It can be edited.
    assert count(graph, aten.gelu.default) == 0


def test_requires_grad_is_restored() -> None:
    graph = module()
    before = {name: tensor.requires_grad for name, tensor in read_tensors(graph).items()}
    with pytest.raises(PassError, match="requires_grad"):
        run(graph, trained)
    assert {name: tensor.requires_grad for name, tensor in read_tensors(graph).items()} == before


def test_any_failure_restores_the_graph() -> None:
    graph = module()
    before, tensors = text(graph), read_tensors(graph)

    def crashes(of: fx.Graph, rewriter: Rewriter) -> None:
        rewriter.fold(layer_node(graph, "up"), "weight", lambda w: w * 2)
        rewriter.constant("new.one", torch.ones(4), [gelu(of)])
        rewriter.replace(gelu(of), source_of(gelu(of)))
        raise ZeroDivisionError

    with pytest.raises(PassError, match="ZeroDivisionError"):
        run(graph, crashes)
    assert text(graph) == before
    assert all(read_tensors(graph)[name] is tensor for name, tensor in tensors.items())
    assert not hasattr(graph, "new")


def test_the_forward_of_the_class_is_compared_and_restored() -> None:
    def patch(_: fx.Graph, rewriter: Rewriter) -> None:
        type(rewriter.module).forward = lambda self, *inputs: inputs  # type: ignore[method-assign]

    graph = module()
    calls = torch.randn(2, 4), torch.randn(2, 4)
    before = graph(*calls)
    with pytest.raises(PassError, match="does: the forward of the class of the graph module changed"):
        Pipeline([type("Does", (Does,), {"edit": staticmethod(patch)})()]).run(graph, Plan("", "", None))
    assert torch.equal(graph(*calls)[0], before[0])


def test_a_pass_may_recompile_the_graph() -> None:
    step = type("Does", (Does,), {"edit": staticmethod(lambda _, rewriter: rewriter.module.recompile())})()
    (record,) = Pipeline([step]).run(module(), Plan("", "", None))
    assert record.edits == 0


@pytest.mark.parametrize("what", ["a buffer", "a module"])
def test_tensors_added_past_the_rewriter_are_refused_and_removed(what: str) -> None:
    def add(_: fx.Graph, rewriter: Rewriter) -> None:
        if what == "a buffer":
            rewriter.module.register_buffer("extra", torch.zeros(3))
        else:
            rewriter.module.add_module("extra", nn.Linear(2, 2))

    graph = module()
    names = set(graph.state_dict())
    with pytest.raises(PassError, match=r"does: the tensor extra(\.weight)? was added past the rewriter"):
        Pipeline([type("Does", (Does,), {"edit": staticmethod(add)})()]).run(graph, Plan("", "", None))
    assert set(graph.state_dict()) == names


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interruption_restores_the_graph_and_the_plan(interruption: type[BaseException]) -> None:
    graph, plan = module(), Plan("", "", None)
    before = text(graph)

    def interrupted(of: fx.Graph, rewriter: Rewriter) -> None:
        rewriter.replace(gelu(of), source_of(gelu(of)))
        plan.vectors["up"] = torch.ones(4)
        raise interruption

    step = type("Does", (Does,), {"edit": staticmethod(interrupted)})()
    with pytest.raises(interruption):
        Pipeline([step]).run(graph, plan)
    assert text(graph) == before and not plan.vectors


def test_an_instrument_that_fails_at_a_failure_does_not_hide_it() -> None:
    class Full:
        def before(self, *_: Any) -> None: ...
        def after(self, *_: Any) -> None: ...
        def failed(self, *_: Any) -> None:
            raise OSError("the disk is full")

    graph = module()
    before = text(graph)

    def crashes(of: fx.Graph, rewriter: Rewriter) -> None:
        rewriter.replace(gelu(of), source_of(gelu(of)))
        raise ZeroDivisionError

    step = type("Does", (Does,), {"edit": staticmethod(crashes)})()
    with pytest.raises(PassError, match="ZeroDivisionError") as error:
        Pipeline([step], [Full()]).run(graph, Plan("", "", None))
    assert text(graph) == before
    assert "the instrument Full failed as well: OSError('the disk is full')" in error.value.__notes__


def test_one_value_written_past_versions_is_found_by_a_proof() -> None:
    def one_value(of: fx.Graph, rewriter: Rewriter) -> None:
        rewriter.tensor(next(node for node in of.nodes if node.target == "wide.weight")).data[3, 7] += 1

    step, inputs = type("Does", (Does,), {"edit": staticmethod(one_value)})(), torch.randn(2, 64)
    graph = captured(nn.Sequential(OrderedDict(wide=nn.Linear(64, 64))), inputs).module
    with pytest.raises(PassError, match=r"the values of the tensor wide.weight were changed in place"):
        Pipeline([step], prove=True).run(graph, PassContext(Plan("", "", None), inputs=[[inputs]]))


def test_a_pass_that_returns_something_or_changes_its_options_is_refused() -> None:
    class Returns(Does):
        def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> Any:
            yield

    class Itself(Does):
        def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
            object.__setattr__(self, "rank", 5)

    Itself.__annotations__["rank"] = int
    Itself.rank = 3
    with pytest.raises(PassError, match=r"run\(\) returned a generator, which nothing reads"):
        Pipeline([Returns()]).run(module(), Plan("", "", None))
    with pytest.raises(PassError, match=r"pass does changed its own options to does\{rank=5\} while it ran"):
        Pipeline([dataclass(frozen=True)(Itself)()]).run(module(), Plan("", "", None))


def test_names_of_tensors_do_not_become_code() -> None:
    graph = module()

    def names(of: fx.Graph, rewriter: Rewriter) -> None:
        for name in ('x"); print("made', "a..b", "", "a\nb"):
            made = rewriter.constant(name, torch.zeros(8), [gelu(of)])
            with rewriter.before(layer_node(graph, "down")):
                node = source_of(layer_node(graph, "down"))
                total = rewriter.call(aten.add.Tensor, (node, made), [node])
            rewriter.redirect(layer_node(graph, "down"), node, total)

    run(graph, names)
    assert {"x_); print(_made", "a._.b", "_", "a_b"} <= set(read_tensors(graph))
    outputs(graph, torch.randn(2, 4), torch.randn(2, 4))


def test_a_graph_that_does_not_verify_is_restored() -> None:
    graph = module()
    before = text(graph)

    def observes(of: fx.Graph, rewriter: Rewriter) -> None:
        node = gelu(of)
        with rewriter.after(node):
            new = rewriter.call(aten.relu_.default, (node,), [node])
        rewriter.redirect(layer_node(graph, "down"), node, new)

    with pytest.raises(FxquantError, match="writes into its input"):
        run(graph, observes)
    assert text(graph) == before


def test_weights_that_were_dropped_are_named() -> None:
    graph = module()

    def drops(of: fx.Graph, rewriter: Rewriter) -> None:
        rewriter.forget(up(of))
        raise ZeroDivisionError

    with pytest.raises(PassError) as error:
        run(graph, drops)
    assert "without the values of up.weight" in str(error.value.__notes__)


def test_a_pass_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewriting, "_FEWEST_EDITS", 100)
    monkeypatch.setattr(rewriting, "_EDITS_PER_NODE", 10)
    graph = module()
    before = text(graph)

    def never_ends(of: fx.Graph, rewriter: Rewriter) -> None:
        for node in of.nodes:
            if node.target in (aten.gelu.default, aten.neg.default):
                with rewriter.after(node):
                    rewriter.call(aten.neg.default, (node,), [node])

    with pytest.raises(PassError, match=r"does: stopped after 1\d0 edits, 10 or more per node .*list\(graph.nodes\)"):
        run(graph, never_ends)
    assert text(graph) == before


def test_edits_by_the_rewriter_are_no_fault() -> None:
    graph = module()

    def edits(of: fx.Graph, rewriter: Rewriter) -> None:
        node, down = gelu(of), layer_node(graph, "down")
        rewriter.fold(layer_node(graph, "up"), "weight", lambda w: w * 2)
        rewriter.set_argument(node, "approximate", "tanh")
        with rewriter.after(node):
            one, two = (rewriter.call(aten.neg.default, (node,), [node]) for _ in range(2))
            rewriter.erase(one)
        rewriter.redirect(down, node, two)
        rewriter.leave_out(down, "bias")
        rewriter.give(down, "bias", torch.ones(4))
        rewriter.replace(two, node)

    run(graph, edits)
    assert args(nodes_of(graph, aten.gelu.default)[0]).approximate == "tanh"
