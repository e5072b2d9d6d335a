"""Number formats of weights and activations, and which of them each layer gets.

Layers are distinguished by their role in the network. The role is derived from the graph, so no model needs a table:

========  ============================================================================================
role      what it is
========  ============================================================================================
block     a linear that works on tokens, inside a block: a module in a list, or one with attention or a residual
adaln     a linear that makes the blocks' modulation vectors from the conditioning
embedder  a linear or table that makes the conditioning (timestep, label, text), wherever it is
patch     a convolution, or a linear outside the blocks that reads the noisy input before them
final     a linear outside the blocks, after them
========  ============================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import fx

from fxquant.errors import ConfigurationError, UnknownNameError, shortened
from fxquant.ir.arguments import args
from fxquant.ir.meta import ITEM, LAYER
from fxquant.numerics.formats import FORMATS, Format, format_of, is_integer

ROLES = ("block", "adaln", "embedder", "patch", "final")
_FORM = re.compile(r"w(?P<pair>\w+)(?:-g(?P<group>\d+)|-b(?P<rows>\d+)(?:x(?P<columns>\d+))?|-(?P<one>tensor))?")
_BLOCK = re.compile(r"\.\d+\.")
_ATTENTION = (
    *(torch.ops.aten.scaled_dot_product_attention.default, torch.ops.aten.softmax.int),
    *(torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default),
)


class _NotRead(ConfigurationError):
    """A text does not have the form of a precision."""


@dataclass(frozen=True)
class Precision:
    """Number formats of one layer. Prints and parses as ``w4a8``, ``w4a16-g64``, ``wmxfp4amxfp8``, ``float``.

    Attributes:
        weight_bits: Bits per weight; None stands for float.
        activation_bits: Bits per activation; None stands for float.
        group_size: Input channels that share a scale of the weight; 0 for all. For formats with blocks, the block.
        weight_format: Name of the weights' format; None for integers.
        activation_format: Name of the activations' format; None for integers.
        group_rows: Output channels that share a scale of the weight; 0 for all.
    """

    weight_bits: int | None
    activation_bits: int | None
    group_size: int = 0
    weight_format: str | None = None
    activation_format: str | None = None
    group_rows: int = 1

    def __post_init__(self) -> None:
        for what, bits in (("weights", self.weight_bits), ("activations", self.activation_bits)):
            if bits is not None and not 2 <= bits <= 8:
                unrounded = "float for a layer that stays float" if what == "weights" else "16 for float activations"
                raise ConfigurationError(f"{bits} bits for {what}: 2 to 8 are possible, and {unrounded}")
        if self.weight_bits is None and self.activation_bits is not None:
            raise ConfigurationError("quantized activations need quantized weights: give w2 to w8")
        if self.group_size < 0 or self.group_rows < 0:
            what = f"{self.group_size} input" if self.group_size < 0 else f"{self.group_rows} output"
            raise ConfigurationError(f"a group of {what} channels is not possible")
        weights = _checked("weight", self.weight_bits, self.weight_format)
        activations = _checked("activation", self.activation_bits, self.activation_format)
        if activations is not None and activations.weights_only:
            raise ConfigurationError(
                f"{activations.name} is a format of weights only; keep the activations float (a16), or choose another "
                "format for them"
            )
        if weights is not None and weights.block and (self.group_size, self.group_rows) != (weights.block, 1):
            raise ConfigurationError(
                f"{weights.name} has a scale per {weights.block} input channels of each output channel: set "
                f"group_size to {weights.block} and group_rows to 1, and write no groups behind the precision"
            )

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Read ``w4a8``, ``w4a16-g64``, ``wfp8afp8-b128``, ``wnvfp4anvfp4``, ``wfp8afp8-tensor`` or ``float``.

        Each side is a number of bits, for integers, or the name of a number format; ``a16`` keeps activations float.
        Behind them, ``-g64`` gives each 64 input channels of a weight a scale, ``-b128`` each block of 128 output and
        128 input channels (``-b64x128``: of 64 and 128), and ``-tensor`` the whole weight.

        Raises:
            ConfigurationError: If the text is none of these or the bits are out of range. If it is nearly one, as
                ``W4A8``, ``w4a8g64`` or ``wnvfp4``, the message says which.
        """
        try:
            return cls._read(text)
        except _NotRead as error:
            meant = " or ".join(_meant(text))
            raise ConfigurationError(f"{error}. Did you mean {meant}?" if meant else str(error)) from None

    @classmethod
    def _read(cls, text: str) -> Precision:
        if text == "float":
            return FLOAT
        match = _FORM.fullmatch(text)
        if match is None:
            raise _NotRead(
                f"{shortened(text)!r} is not a precision; write w4a8, w8a16 (float activations), w4a8-g64 or float, or "
                "formats by name as in wfp8afp8"
            )
        weights, activations = _sides(match["pair"], text)
        rows, columns = (int(match[name] or 0) for name in ("rows", "columns"))
        group, rows = (columns or rows, rows) if match["rows"] else (int(match["group"] or 0), 0 if match["one"] else 1)
        block = 0 if weights[1] is None else FORMATS[weights[1]].block
        if block and match["pair"] != text[1:]:
            raise ConfigurationError(
                f"{shortened(text)!r} is not a precision: {weights[1]} has blocks of {block} input channels; write "
                f"w{match['pair']}"
            )
        found = cls(weights[0], activations[0], block or group, weights[1], activations[1], rows)
        if str(found) != text:  # Each precision has exactly one name, because results are compared by it.
            raise ConfigurationError(f"{shortened(text)!r} is not a precision; write {found}")
        return found

    def __str__(self) -> str:
        if self.weight_bits is None:
            return "float"
        weights = self.weight_format or self.weight_bits
        activations = (self.activation_format or self.activation_bits) if self.activation_bits else 16
        return f"w{weights}a{activations}{self._groups()}"

    def _groups(self) -> str:
        if self.weight_format is not None and FORMATS[self.weight_format].block:
            return ""
        if self.group_rows == 1:
            return f"-g{self.group_size}" if self.group_size else ""
        if self.group_rows == self.group_size:
            return f"-b{self.group_size}" if self.group_size else "-tensor"
        return f"-b{self.group_rows}x{self.group_size}"


def _checked(what: str, bits: int | None, name: str | None) -> Format | None:
    """The format of one side.

    Raises:
        ConfigurationError: If it is unknown, or has another number of bits.
    """
    try:
        format = None if bits is None else format_of(bits, name)
    except UnknownNameError as error:
        raise ConfigurationError(f"{what}_format: {error}") from None
    if name is not None and is_integer(name):
        raise ConfigurationError(f"integers have no {what}_format; set it to null, and {what}_bits to their bits")
    if format is not None and format.bits != bits:
        raise ConfigurationError(
            f"{name} has {format.bits} bits, not {bits}; set {what}_bits to {format.bits}, or {what}_format to null "
            "for integers"
        )
    return format


def _sides(pair: str, text: str) -> tuple[tuple[int, str | None], tuple[int | None, str | None]]:
    """Bits and format of weights and of activations, from ``4a8`` or ``fp8afp8``.

    Raises:
        ConfigurationError: If one of the formats is unknown.
    """
    splits = [(pair[:at], pair[at + 1 :]) for at, letter in enumerate(pair) if letter == "a"]
    fitting = [(left, right) for left, right in splits if _is_side(left) and _is_side(right)]
    if len(fitting) > 1:
        found = " or ".join(f"weights in {left} and activations in {right}" for left, right in fitting)
        raise ConfigurationError(f"{shortened(text)!r} may mean {found}; give one of these formats another name")
    for left, right in fitting:
        return _side(left), (None, None) if right.isdecimal() and int(right) == 16 else _side(right)
    known = [name for name in FORMATS if not is_integer(name)]
    raise _NotRead(
        f"{shortened(text)!r} is not a precision; write w4a8, w8a16 (float activations), w4a8-g64 or float. Formats by "
        f"name: {', '.join(known)}"
    )


def _is_side(text: str) -> bool:
    return text.isdecimal() or text in FORMATS


def _side(text: str) -> tuple[int, str | None]:
    if text.isdecimal():
        return int(text), None
    return FORMATS[text].bits, None if is_integer(text) else text


def _meant(text: str) -> list[str]:
    """The precisions that a text may stand for: one in other letters or without the hyphen, or with activations."""
    plain = re.sub(r"[\s_]+", "-", text.strip().lower())
    side = plain.removeprefix("w")
    for tries in ([plain], [re.sub(r"-?g?(\d+)$", r"-g\1", plain)], [f"w{side}a{side}", f"w{side}a16"]):
        found = []
        for one in tries:
            try:
                found.append(str(Precision._read(one)))
            except ConfigurationError:
                continue
        if found:
            return found
    return []


FLOAT = Precision(None, None)


def precision_of(name: str, role: str, default: Precision, layers: str, overrides: str) -> Precision:
    """The precision of one layer.

    Args:
        name: Stable name of the layer.
        role: Its role.
        default: Precision that the recipe asks for.
        layers: ``default`` (blocks and adaLN; embedders get 8-bit weights and float arithmetic), ``blocks`` (blocks
            and adaLN, all else float), ``all`` (the papers' setting).
        overrides: Patterns with precisions, as in ``blocks.0.*=w8a8;proj_out=float``; the first match decides.

    Raises:
        ConfigurationError: If an option cannot be read.
    """
    exception = overridden(name, overrides)
    if exception is not None:
        return exception
    if layers not in ("default", "blocks", "all"):
        raise ConfigurationError(f"layers={shortened(str(layers))!r} is not known; choose default, blocks or all")
    if layers == "all" or role in ("block", "adaln"):
        return default
    if role == "embedder" and layers == "default":
        return Precision(8, None)
    return FLOAT


def overridden(name: str, overrides: str) -> Precision | None:
    """The precision that ``overrides`` (see :func:`precision_of`) give to a name; None if no pattern matches.

    Raises:
        ConfigurationError: If an entry has no precision.
    """
    return next((precision for pattern, precision in entries_of(overrides) if fnmatchcase(name, pattern)), None)


def entries_of(overrides: str) -> list[tuple[str, Precision]]:
    """The patterns and precisions of overrides, in order.

    Raises:
        ConfigurationError: If an entry has no precision.
    """
    found = []
    for entry in filter(None, (part.strip() for part in overrides.split(";"))):
        pattern, equals, text = entry.partition("=")
        if not equals:
            raise ConfigurationError(f"override {shortened(entry)!r} has no precision; write pattern=w8a8")
        found.append((pattern, Precision.parse(text)))
    return found


def roles(graph: fx.Graph) -> dict[str, str]:
    """Role of every linear, convolution and embedding, by its stable name.

    The first tensor input is the noisy sample; if it is an item of a list, so are the other items. Values that depend
    only on the other inputs are conditioning.
    """
    first, *others = (node for node in graph.nodes if node.op == "placeholder")
    items = [node for node in others if ITEM in first.meta and node.meta.get(ITEM) == first.meta[ITEM]]
    sample = _reached(first, *items)
    layers = {node: str(node.meta[LAYER]) for node in graph.nodes if LAYER in node.meta}
    blocks = _block_modules(graph, sample, layers)
    in_block = [node for node, name in layers.items() if _BLOCK.search(name) or _inside(name, blocks)]
    behind = _reached(*(node for node in in_block if node in sample))
    found = {}
    for node, name in layers.items():
        if node in sample:
            if node in in_block:
                found[name] = "block"
            else:
                found[name] = "final" if node in behind else "patch"
        elif "embedding" in str(node.target):
            found[name] = "embedder"
        elif node in in_block and _has_tokens(node):
            found[name] = "block"
        else:
            met = _first_met(node, sample, layers)
            if not met or _has_tokens(node):
                found[name] = "embedder"
            elif node in in_block or met - behind:
                found[name] = "adaln"
            else:
                found[name] = "final"
    return found


def _block_modules(graph: fx.Graph, sample: set[fx.Node], layers: Mapping[fx.Node, str]) -> set[str]:
    """Paths of modules that work as blocks whatever their name, such as ``mid_block``.

    In a block's own code, the sample's stream goes through an attention, or around a layer by a residual connection. A
    module that contains other blocks and all layers of the stream is the network itself, not a block.
    """
    found: set[str] = set()
    for node in graph.nodes:
        path = _module_of(node)
        if not path or path in found or node not in sample or _BLOCK.search(f"{path}."):
            continue
        if node.target in _ATTENTION or (
            node.target is torch.ops.aten.add.Tensor and _is_residual(node, sample, layers)
        ):
            found.add(path)
    stream = [name for node, name in layers.items() if node in sample]
    listed = {name for name in stream if _BLOCK.search(name)}
    return {
        path
        for path in found
        if not (stream and _inside(stream[0], {path}) and _inside(stream[-1], {path}))
        or not any(_inside(name, {path}) for name in listed | (found - {path}))
    }


def _is_residual(node: fx.Node, sample: set[fx.Node], layers: Mapping[fx.Node, str]) -> bool:
    """Whether an addition adds a value to the result of layers that read this value."""
    left, right = args(node).self, args(node).other
    if not (left in sample and right in sample):
        return False
    for start, end in ((left, right), (right, left)):
        between = _reached(start)
        todo, seen = [end], set()
        while todo:
            part = todo.pop()
            if part in between and part not in seen:
                if part in layers:
                    return True
                seen.add(part)
                todo += part.all_input_nodes
    return False


def _module_of(node: fx.Node) -> str:
    modules = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return modules[-1] if modules else ""


def _inside(name: str, paths: Iterable[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _reached(*starts: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = [*starts]
    while todo:
        node = todo.pop()
        for user in node.users:
            if user not in found and not str(user.target).startswith("aten.sym_size"):
                found.add(user)
                todo.append(user)
    return found


def _has_tokens(node: fx.Node) -> bool:
    """Whether a layer works on tokens, as the key and value layers of cross-attention work on the text tokens.

    The positions of a convolution are tokens too, even if there is only one.
    """
    shape = node.meta["val"].shape
    return len(shape) >= 3 and (shape[-2] != 1 or "conv" in str(node.target))


def _first_met(node: fx.Node, sample: set[fx.Node], layers: dict[fx.Node, str]) -> set[fx.Node]:
    """The nodes that a conditioning layer's output reaches first.

    These are nodes of the sample's stream or layers on tokens; the set is empty if it reaches a layer on vectors.
    """
    todo, seen = list(node.users), set()
    met: set[fx.Node] = set()
    while todo:
        user = todo.pop()
        if user in seen:
            continue
        seen.add(user)
        if user in sample or (user in layers and _has_tokens(user)):
            met.add(user)
        elif user in layers:
            return set()
        else:
            todo += user.users
    return met
