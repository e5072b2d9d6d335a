"""The format pow4: its grid, and models whose weights have it."""

from __future__ import annotations

import torch
from example_passes.powers import POW4

import fxquant
from fxquant.authoring import Scales, make_recipe
from fxquant.testing import example_calls, tiny_dit


def test_every_code_decodes_to_its_value_and_back() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    one = Scales(torch.ones(()))
    assert torch.equal(POW4.decode(codes, one, torch.float32), POW4.values())
    assert torch.equal(POW4.encode(POW4.values(), one), codes)


def test_precision_and_recipe_name_it() -> None:
    assert "precision=wpow4a8-g16" in str(make_recipe("ptq4dit-wpow4a8-g16"))


def test_lifecycle(lifecycle) -> None:
    found = lifecycle(
        "assign-precision{precision=wpow4a8} ; balance-channels,absorb-affines,quantize-linears{rounding=gptq}",
        backends=("fake-quant",),
    )
    assert found.output_sqnr_db > 15


def test_a_report_names_it() -> None:
    model = tiny_dit()
    calls = example_calls(model)
    made = fxquant.compile(model, recipe="rtn-wpow4a16", measure=0, calibrate=lambda: [model(**call) for call in calls])
    assert "wpow4a16" in str(fxquant.report(made))
