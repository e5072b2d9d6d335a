"""Which parameters graphs of one model share."""

from __future__ import annotations

import pytest
import torch

import fxquant
from fxquant.channels.rules import RULES, ends
from fxquant.errors import CaptureError
from fxquant.ir.shared import _PARAMETERS
from tests.test_two_kinds_of_call import BALANCE, Two, call, compiled, error


def test_all_ops_into_which_rules_fold_are_known() -> None:
    own = {op for op, rule in RULES.items() if rule.__module__ == ends.__name__}
    assert own - {"get_attr", "placeholder"} == _PARAMETERS.keys()


def test_a_fold_of_an_op_that_is_not_known_is_stored_in_no_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a call of another kind would read the folded parameter without a correction."""
    monkeypatch.delitem(_PARAMETERS, torch.ops.aten.conv1d.padding)
    model = Two("convolved")
    made = compiled(model, fxquant.Recipe.parse(BALANCE), "p")
    assert error(made, model, "p") < 1e-12
    with pytest.raises(CaptureError, match="calibrate with a call like this one"):
        made(**call("e"))
