"""Balances the float models of a pipeline together: one run of the pipeline calibrates all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fxquant.errors import ConfigurationError, FxquantError
from fxquant.export.balance import balance


def balance_pipeline(
    pipe: Any,
    *,
    calibrate: Callable[[], Any],
    components: Sequence[str] = ("transformer", "transformer_2"),
    for_component: Callable[[str], Mapping[str, Any]] = lambda _: {},
    **options: Any,
) -> dict[str, nn.Module]:
    """Balance several models of a pipeline in one calibration, such as the two experts of Wan 2.2.

    Each model is calibrated on the calls that it gets. The pipeline does not change: set the results where you want
    them.

    Args:
        pipe: A pipeline of diffusers, or any object with the models as attributes.
        calibrate: Runs the pipeline in the way in which it will be used.
        components: Names of the models. Those that the pipeline does not have, or that are None, are left out.
        for_component: Further options of :func:`~fxquant.export.balance.balance` for the model of a name.
        options: For all models, as for :func:`~fxquant.export.balance.balance`.

    Returns:
        The balanced models by name, each with its ``balance_report``. One model under two names is one result.

    Raises:
        ConfigurationError: If the pipeline has none of the models, or ``statistics`` is given, which belong to one
            model.
        FxquantError: What :func:`~fxquant.export.balance.balance` raises; the message begins with the name of the
            model if there are several.
    """
    if "statistics" in options:
        raise ConfigurationError("statistics belong to one model; give them to fxquant.balance for each model")
    parts = {name: part for name in components if (part := getattr(pipe, name, None)) is not None}
    if not parts:
        raise ConfigurationError(
            f"{type(pipe).__name__} has no {' or '.join(components)}; name its models: components=(...)"
        )
    first_names = {id(part): name for name, part in reversed(parts.items())}
    made: dict[str, nn.Module] = {}

    def run(names: Sequence[str]) -> None:
        first, *rest = names
        inner = (lambda: run(rest)) if rest else calibrate
        try:  # The calls of the first model are recorded while the others are balanced.
            made[first] = balance(parts[first], calibrate=inner, **{**options, **for_component(first)})
        except FxquantError as error:
            if error.component is None and len(first_names) > 1:
                error.component = first
                error.args = (f"{first}: {error}", *error.args[1:])
            raise

    run([name for name, part in parts.items() if first_names[id(part)] == name])
    return {name: made[first_names[id(part)]] for name, part in parts.items()}
