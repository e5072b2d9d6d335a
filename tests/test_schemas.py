"""Schemas know every entry that plans hold."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from fxquant import plan
from fxquant.plan import _NOT_IN_JSON
from fxquant.schemas import plan as schemas


@pytest.mark.parametrize(
    ("kept", "schema"),
    [
        (plan.Plan, schemas.PlanFile),
        (plan.LayerPlan, schemas.Layer),
        (plan.AttentionPlan, schemas.Attention),
        (plan.ActivationRange, schemas.Range),
        (plan.Balance, schemas.Change),
        (plan.Shift, schemas.Change),
        (plan.TimestepGroups, schemas.Groups),
    ],
)
def test_a_schema_has_the_fields_of_its_class(kept: Any, schema: Any) -> None:
    assert {field.name for field in fields(kept)} - set(_NOT_IN_JSON) <= schema.model_fields.keys()
