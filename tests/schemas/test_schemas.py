"""Schemas say of plans what the classes say: the same entries, of which the same may be left out."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from typing import Any

import pytest
from pydantic import ValidationError

from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.planning import plan
from fxquant.planning.plan import _NEW_IN_JSON, _NOT_IN_JSON
from fxquant.schemas import plan as schemas

PAIRS = [
    (plan.LayerPlan, schemas.Layer),
    (plan.AttentionPlan, schemas.Attention),
    (plan.ActivationRange, schemas.Range),
    (plan.Balance, schemas.Balance),
    (plan.Shift, schemas.Shift),
    (plan.TimestepGroups, schemas.Groups),
]
REQUIRED = object()


def defaults_of(kept: Any) -> dict[str, Any]:
    """What an entry is that is left out."""
    return {
        field.name: field.default_factory()
        if field.default_factory is not MISSING
        else REQUIRED
        if field.default is MISSING
        else field.default
        for field in fields(kept)
    }


@pytest.mark.parametrize(("kept", "schema"), PAIRS)
def test_a_schema_has_the_entries_of_its_class(kept: Any, schema: Any) -> None:
    stated = {
        name: REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
        for name, field in schema.model_fields.items()
    }
    assert stated == defaults_of(kept)


def test_the_file_has_the_entries_of_a_plan() -> None:
    """All that the first plans held is required; what came later need not be there."""
    stated = schemas.PlanFile.model_fields
    assert stated.keys() == defaults_of(plan.Plan).keys() - set(_NOT_IN_JSON)
    assert {name for name, field in stated.items() if not field.is_required()} == _NEW_IN_JSON


@pytest.mark.parametrize("bits", [1, 2, 8, 9, None])
def test_a_schema_takes_the_bits_that_a_precision_takes(bits: int | None) -> None:
    made = plan.LayerPlan("linear", "block", [4, 4], bits, None)
    try:
        _ = made.precision
    except ConfigurationError:
        with pytest.raises(ValidationError):
            schemas.Layer.model_validate(asdict(made))
    else:
        schemas.Layer.model_validate(asdict(made))


@pytest.mark.parametrize(
    ("entry", "place"),
    [("weight_bit", "weight_bit"), ("balance", "balance > balanced"), ("timesteps", "timesteps > boundary")],
)
def test_an_entry_that_is_not_known_is_refused_by_name(entry: str, place: str) -> None:
    made = plan.Plan("", "", "timestep", layers={"a": plan.LayerPlan("linear", "block", [4, 4], 4, 8)}).to_json()
    made["layers"]["a"][entry] = {
        "weight_bit": 4,
        "balance": {"cost": "free", "balanced": True},
        "timesteps": {"boundaries": [], "boundary": 1},
    }[entry]
    with pytest.raises(CheckpointError) as refused:
        plan.Plan.from_json(made, {})
    assert f"at layers > a > {place}: there is no such entry" in str(refused.value).replace("'", "")
