"""Which number formats and groups the layers of a plan can have."""

from __future__ import annotations

from collections.abc import Iterable

from fxquant.errors import ConfigurationError, PluginError
from fxquant.numerics.formats import FORMATS
from fxquant.numerics.weights import row_count
from fxquant.planning.decisions import AttentionPlan, LayerPlan

_KINDS = {"conv": "a convolution", "embedding": "an embedding"}


def blocks_of(layer: LayerPlan) -> list[int]:
    """How many input channels share a scale, of the weight and of the input; without those that are not in groups."""
    weights, inputs = layer.format_of_weight, layer.format_of_input
    found = [] if weights is None else [layer.group_size]
    return [block for block in (*found, 0 if inputs is None else inputs.block) if block]


def check_known(decided: Iterable[LayerPlan | AttentionPlan]) -> None:
    """Refuse number formats that no installed package offers.

    Raises:
        PluginError: Names the format and says what to do.
    """
    for entry in decided:
        found = (entry.weight_format, entry.activation_format) if isinstance(entry, LayerPlan) else (entry.format,)
        for name in found:
            if name is not None and name not in FORMATS:
                raise PluginError(
                    f"the plan has the number format {name!r}, which is not known here; install the package that "
                    f"offers it, or import the module that registers it first. Known: {', '.join(FORMATS)}"
                )


def check_formats(name: str, layer: LayerPlan) -> None:
    """Refuse groups and blocks that a layer cannot have.

    Raises:
        ConfigurationError: Names the layer and says what to set.
    """
    weights, inputs = layer.format_of_weight, layer.format_of_input
    if weights is None:
        return
    if layer.kind != "linear" and layer.group_size:
        groups = f"in the format {weights.name}" if weights.block else f"in groups of {layer.group_size}"
        instead = "choose another format for it" if weights.block else "set its group_size to 0"
        raise ConfigurationError(
            f"layer {name}: weights {groups} are possible for linears only, but this is {_KINDS[layer.kind]}; {instead}"
        )
    if layer.kind != "linear" and layer.group_rows != 1:
        raise ConfigurationError(
            f"layer {name}: a scale for several output channels is possible for linears only, but this is "
            f"{_KINDS[layer.kind]}; set its group_rows to 1"
        )
    if layer.kind == "conv" and inputs is not None and inputs.block:
        raise ConfigurationError(
            f"layer {name}: a convolution has one scale for its input, and {inputs.name} has one per {inputs.block} "
            f"channels; keep its activations float: {name}=w{layer.weight_format or layer.weight_bits}a16"
        )
    try:
        row_count(layer.shape[0], layer.group_rows)
    except ConfigurationError as error:
        raise ConfigurationError(f"layer {name}: {error}") from None
