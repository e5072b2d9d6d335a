"""Which number formats and groups the layers of a plan can have."""

from __future__ import annotations

from collections.abc import Iterable

from fxquant.errors import ConfigurationError, PluginError
from fxquant.numerics.formats import FORMATS, is_integer
from fxquant.numerics.packing import MAX_BITS, MIN_BITS
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


def check_attention(name: str, attention: AttentionPlan) -> None:
    """Refuse bits and number formats that an attention cannot have.

    Raises:
        ConfigurationError: Names the attention and says what to set.
    """
    for bits in (attention.bits, attention.softmax_bits):
        if bits is not None and not MIN_BITS <= bits <= MAX_BITS:
            raise ConfigurationError(
                f"attention {name}: {bits} bits; {MIN_BITS} to {MAX_BITS} are possible, and null for float"
            )
    if attention.format is None or attention.bits is None:
        return
    if attention.format not in FORMATS:
        raise ConfigurationError(
            f"attention {name}: unknown format {attention.format!r}. Known: {', '.join(FORMATS)}; or null for integers"
        )
    format = FORMATS[attention.format]
    if is_integer(format.name):
        raise ConfigurationError(f"attention {name}: integers have no format; set it to null, and bits to their bits")
    if format.bits != attention.bits:
        raise ConfigurationError(
            f"attention {name}: {format.name} has {format.bits} bits, not {attention.bits}; set bits to {format.bits}, "
            "or format to null for integers"
        )
    if format.weights_only or not format.plain_scales:
        why = "is a format of weights only" if format.weights_only else "needs other scales than one per q, k and v"
        fitting = [own for own in FORMATS if FORMATS[own].plain_scales and not FORMATS[own].weights_only]
        listed = ", ".join(own for own in fitting if not is_integer(own))
        raise ConfigurationError(
            f"attention {name}: {format.name} {why}; set format to null for integers, or to one of {listed}"
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
        instead = f"choose another format for it: overrides={name}=w8a8" if weights.block else "set its group_size to 0"
        raise ConfigurationError(
            f"layer {name}: weights {groups} are possible for linears only, but this is {_KINDS[layer.kind]}; {instead}"
        )
    if layer.kind != "linear" and layer.group_rows != 1:
        raise ConfigurationError(
            f"layer {name}: a scale for several output channels is possible for linears only, but this is "
            f"{_KINDS[layer.kind]}; set its group_rows to 1"
        )
    if layer.kind == "conv" and inputs is not None:
        for format, what in ((inputs, "its input"), (weights, "each output channel")):
            if not format.plain_scales:
                has = f"one per {format.block} channels" if format.block else "one of 8 bits"
                raise ConfigurationError(
                    f"layer {name}: a convolution has one float32 scale for {what}, and {format.name} has {has}; keep "
                    f"its activations float: {name}=w{layer.weight_format or layer.weight_bits}a16"
                )
    try:
        row_count(layer.shape[0], layer.group_rows)
    except ConfigurationError as error:
        raise ConfigurationError(f"layer {name}: {error}") from None
