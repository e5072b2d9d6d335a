from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx

from fxquant.errors import (
    CalibrationError,
    ConfigurationError,
    FxquantError,
    PassError,
    UnknownNameError,
    VerificationError,
)
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.passes.balance_channels import BalanceChannels, Salience
from fxquant.passes.remove_noops import RemoveNoOps
from fxquant.pipeline.pipeline import Pass, PassRecord, Pipeline, Tier, parse_pass
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan
from tests.passes.models import Patches, patches
from tests.support import captured, nodes_of, text


@dataclass(frozen=True)
class Step(Pass):
    """A pass of the tests: does what its option says."""

    name: ClassVar[str] = "step"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.LOWERED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    way: str = "nothing"

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        node = nodes_of(rewriter.module, torch.ops.aten.transpose.int)[0]
        if self.way == "double":
            with rewriter.after(node):
                new = rewriter.call(torch.ops.aten.clone.default, (node,), [node])
            for user in [user for user in node.users if user is not new]:
                rewriter.redirect(user, node, new)
        elif self.way == "early":
            with rewriter.before(node):
                new = rewriter.call(torch.ops.aten.clone.default, (node,), [node])
            for user in [user for user in node.users if user is not new]:
                rewriter.redirect(user, node, new)
        elif self.way == "unread":
            with rewriter.after(node):
                rewriter.call(torch.ops.aten.clone.default, (node,), [node])
            rewriter.constant("unread", torch.ones(1), [node])
        elif self.way == "crash":
            raise ZeroDivisionError("one by zero")
        elif self.way == "refuse":
            raise CalibrationError("no statistics")
        elif self.way == "break":
            node.meta["val"] = node.meta["val"].double()
            rewriter.edits += 1


def module() -> fx.GraphModule:
    return captured(Patches(), **patches()).module


def plan() -> Plan:
    return Plan("", "", "timestep")


class Watcher:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str, object]] = []

    def before(self, step: Pass, module: fx.GraphModule) -> None:
        self.seen.append(("before", str(step), text(module)))

    def after(self, step: Pass, module: fx.GraphModule, record: PassRecord) -> None:
        self.seen.append(("after", str(step), record.edits))

    def failed(self, step: Pass, module: fx.GraphModule, error: Exception) -> None:
        self.seen.append(("failed", str(step), type(error)))


class TestOrder:
    def test_a_pass_that_comes_too_late(self) -> None:
        with pytest.raises(
            ConfigurationError,
            match="insert-observers works on observed graphs but comes after quantize-linears, which makes them "
            "quantized; move it to the front",
        ):
            Pipeline.parse("remove-no-ops,quantize-linears,insert-observers")

    def test_nothing_runs_before_the_order_is_checked(self) -> None:
        with pytest.raises(ConfigurationError):
            Pipeline.parse("insert-observers,balance-channels,assign-precision")

    def test_the_last_stage_counts(self) -> None:
        pipeline = Pipeline.parse("quantize-linears,remove-no-ops")
        assert pipeline.stage is Stage.QUANTIZED

    def test_a_graph_that_has_come_further_is_refused(self) -> None:
        with pytest.raises(
            ConfigurationError, match="insert-observers works on observed graphs, this one is quantized"
        ):
            Pipeline.parse("insert-observers").run(module(), plan(), Stage.QUANTIZED)


class TestText:
    def test_parses_and_prints(self) -> None:
        line = "remove-no-ops,assign-precision{precision=w4a8-g64},balance-channels{exponent=0.3 salience=max}"
        assert str(Pipeline.parse(line)) == line
        assert parse_pass(" balance-channels{salience=max} ") == BalanceChannels(salience=Salience.MAX)
        assert str(BalanceChannels()) == "balance-channels"

    @pytest.mark.parametrize(
        ("line", "error", "message"),
        [
            ("Balance Channels", ConfigurationError, "'Balance Channels' is not a pass; write name or name{option=v"),
            ("balance-channels{exponent=0.5", ConfigurationError, "is not a pass"),
            (
                "balance",
                UnknownNameError,
                "unknown pass 'balance'. Known: absorb-affines, absorb-shifts, assign-precision, balance-ch",
            ),
            (
                "balance-channels{power=1}",
                ConfigurationError,
                "has no option 'power=1'. Its options: dearest, exponent",
            ),
            ("balance-channels{exponent}", ConfigurationError, "the option 'exponent' has no value"),
            ("remove-no-ops{x=1}", ConfigurationError, "has no option 'x=1'. Its options: none"),
            ("balance-channels{exponent=half}", ConfigurationError, "exponent='half' cannot be read as float"),
            ("balance-channels{salience=min}", ConfigurationError, r"Salience \(spearman, mean, max, moving-average\)"),
            ("quantize-linears{symmetric=yes}", ConfigurationError, "symmetric='yes' cannot be read as bool"),
        ],
    )
    def test_what_cannot_be_read(self, line: str, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            Pipeline.parse(line)


class TestRun:
    def test_instruments_see_every_pass(self) -> None:
        watcher, graph = Watcher(), module()
        before = text(graph)
        Pipeline([Step(), Step("double")], [watcher]).run(graph, plan())
        assert [(what, step) for what, step, _ in watcher.seen] == [
            ("before", "step"),
            ("after", "step"),
            ("before", "step{way=double}"),
            ("after", "step{way=double}"),
        ]
        assert watcher.seen[2][2] == before
        assert [watcher.seen[1][2], watcher.seen[3][2]] == [0, 3]

    def test_records_say_what_changed(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="fxquant"):
            first, second = Pipeline([Step("double"), RemoveNoOps()]).run(module(), plan())
        assert first.ops == {"aten::clone": 1}
        assert str(first).startswith("step{way=double}: 3 edits in 0.")
        assert str(first).endswith("aten::clone:+1")
        assert second.edits == 0
        assert [message.partition(" ")[0] for message in caplog.messages if "edits in" in message] == ["1/2", "2/2"]

    def test_what_is_left_unread_is_removed(self) -> None:
        graph = module()
        before = text(graph)
        Pipeline([Step("unread")]).run(graph, plan())
        assert text(graph) == before
        assert not hasattr(graph, "unread")

    def test_a_crash_becomes_a_typed_error_that_names_the_pass(self) -> None:
        watcher = Watcher()
        with pytest.raises(PassError, match=r"pass step{way=crash} failed: ZeroDivisionError: one by zero") as error:
            Pipeline([Step("crash")], [watcher]).run(module(), plan())
        assert isinstance(error.value.__cause__, ZeroDivisionError)
        assert watcher.seen[-1] == ("failed", "step{way=crash}", ZeroDivisionError)

    def test_the_message_of_a_broken_order_does_not_hold_the_whole_graph(self) -> None:
        with pytest.raises(PassError, match="used before it has been defined") as error:
            Pipeline([Step("early")]).run(module(), plan())
        assert len(str(error.value).splitlines()) == 1

    def test_a_typed_error_keeps_its_type_and_names_the_pass_in_a_note(self) -> None:
        with pytest.raises(CalibrationError, match="no statistics") as error:
            Pipeline([Step("refuse")]).run(module(), plan())
        assert error.value.__notes__ == ["in pass step{way=refuse}"]

    def test_a_graph_that_a_pass_breaks_is_found_at_once(self) -> None:
        watcher = Watcher()
        with pytest.raises(VerificationError, match="node transpose: it yields float32") as error:
            Pipeline([Step("break"), Step()], [watcher]).run(module(), plan())
        assert error.value.__notes__ == ["in pass step{way=break}"]
        assert len(watcher.seen) == 2

    def test_a_broken_graph_is_found_before_the_first_pass(self) -> None:
        graph = module()
        del graph.q.bias
        with pytest.raises(FxquantError, match=r"there is no tensor 'q.bias'"):
            Pipeline([Step()]).run(graph, plan())
