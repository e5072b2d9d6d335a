"""Where the blocks of a model begin and end in its graphs, as the caches of diffusers see them."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.errors import ConfigurationError
from fxquant.ir.borders import Border, borders, changes_of
from fxquant.reconstruction.segments import block_of
from fxquant.runtime.caches.cutting import Cut, cut, dependent


@dataclass(frozen=True)
class Block:
    """What a block does with the values that the blocks hand on.

    Attributes:
        path: Path of its module.
        arguments: Names of the arguments that it receives them as: the image first, then maybe the text.
        positions: Positions among its results; None for the second if it returns no text. None if diffusers does not
            say, and the shapes have to tell.
    """

    path: str
    arguments: tuple[str, str]
    positions: tuple[int, int | None] | None


@dataclass(frozen=True, eq=False)
class Blocks:
    """A graph that is cut around its blocks.

    Attributes:
        cut: The parts.
        received: What the first block receives as the image.
        streams: For the image, and for the text if it is needed later: the value that the head makes, and the value
            that the last block returns.
        between: What is added to the image between blocks and does not depend on them: residuals of a ControlNet.
    """

    cut: Cut
    received: fx.Node
    streams: tuple[tuple[fx.Node, fx.Node], ...]
    between: tuple[fx.Node, ...] = ()

    def total(self, values: Mapping[fx.Node, Any]) -> list[Any]:
        """For each stream, the sum of what is added between blocks in this step, or None if that is nothing."""
        added = [values[node] for node in self.between]
        return [functools.reduce(operator.add, added) if added else None, *(None for _ in self.streams[1:])]

    def reused(self, values: Mapping[fx.Node, Any]) -> list[Tensor]:
        """For each stream, what the blocks added to it in a step in which they ran."""
        pairs = zip(self.streams, self.total(values), strict=True)
        return [_minus(values[result] - values[source], total).detach() for (source, result), total in pairs]


def _minus(value: Any, total: Any) -> Any:
    return value if total is None else value - total


def blocks_of(model: nn.Module) -> list[Block]:
    """The blocks of a model in the order in which they run.

    Raises:
        ConfigurationError: If the model has no list of blocks under a name that diffusers knows.
        MissingPackageError: If diffusers is not installed.
    """
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS as names

    found = [
        _block(f"{name}.{number}", block)
        for name, part in model.named_children()
        if name in names and isinstance(part, nn.ModuleList)
        for number, block in enumerate(part)
    ]
    if len(found) < 2:
        raise ConfigurationError(
            f"caches of steps skip blocks, and {type(model).__name__} has {len(found)} in lists named "
            f"{', '.join(sorted(names))}, where diffusers looks for them; at least two are needed. Leave the cache out"
        )
    return found


def _block(path: str, block: nn.Module) -> Block:
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    try:
        known = TransformerBlockRegistry.get(type(block))
    except ValueError:
        known = TransformerBlockMetadata()
    takes = list(inspect.signature(block.forward).parameters)
    image = known.hidden_states_argument_name
    positions = known.return_hidden_states_index, known.return_encoder_hidden_states_index
    return Block(
        path,
        (image if image in takes else takes[0], known.encoder_hidden_states_argument_name),
        None if positions[0] is None else positions,
    )


def cut_blocks(module: fx.GraphModule, blocks: Sequence[Block], behind_first: bool) -> Blocks:
    """Cut a graph around its blocks.

    Args:
        module: The graph.
        blocks: The blocks of the model, of which some may be left out in this graph.
        behind_first: Whether the head computes the first block too.

    Raises:
        ConfigurationError: If the graph cannot be cut there. Says why, and what to do.
    """
    marked, first, last = _Marked(module), blocks[0], blocks[-1]
    received = marked.one(first, first.arguments[0])
    made, given = marked.returned(last), marked.returned(first) if behind_first else marked.received(first)
    streams: list[tuple[fx.Node, fx.Node]] = []
    for source, whole in zip(given, made, strict=True):
        if whole is None:
            continue
        _check_alike(first, last, [source, whole] if streams else [received, source, whole])
        result = _trimmed(whole, source)
        if source is None or _looks(source) != _looks(result):
            raise _refusal(
                f"{last.path} returns another shape than {first.path}, so the result of one step cannot be added to "
                "that of another"
            )
        streams.append((source, result))
    sources = [received, *(source for source, _ in streams)]
    between = marked.between(blocks, dependent(module.graph, sources).union(sources))
    parts = cut(module, sources, [result for _, result in streams], between)
    skipped = {block.path for block in (blocks[1:] if behind_first else blocks)}
    passed = next((block for node in parts.bypassing if (block := block_of(node)) in skipped), None)
    if passed is not None:
        raise _refusal(f"what follows the blocks also reads from within {passed}, not only what {last.path} returns")
    return Blocks(parts, received, tuple(pair for pair in streams if pair[1] in parts.middle.made), between)


def _check_alike(first: Block, last: Block, values: Sequence[fx.Node | None]) -> None:
    """Refuse values to which passes did different things: they cannot be added to each other.

    Raises:
        ConfigurationError: Names the blocks.
    """
    found = [changes_of(value) for value in values if value is not None]
    if any(change.moves for changes in found for change in changes) or len(set(found)) > 1:
        raise _refusal(
            f"the recipe scales, shifts or rotates the channels of what {first.path} gets and of what {last.path} "
            "returns differently, so the result of one step cannot be added to that of another"
        )


Streams = tuple[fx.Node, fx.Node | None]
"""The values of the image and of the text; None if there is no text, or nothing reads it any more."""


class _Marked:
    """The marks of a graph, and the refusals of graphs that lack some."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._found = borders(module.graph)

    def one(self, block: Block, argument: str | None, position: int = 0) -> fx.Node:
        nodes = self._found.get(Border(block.path, argument, position), [])
        if len(nodes) != 1:
            what = "returns" if argument is None else f"gets as {argument}"
            why = "is called several times" if nodes else f"is not called, or what it {what} is not one value"
            raise _refusal(f"{block.path} {why} in this graph")
        return nodes[0]

    def received(self, block: Block) -> Streams:
        """What a block receives."""
        image, text = block.arguments
        return self.one(block, image), self.one(block, text) if Border(block.path, text, 0) in self._found else None

    def returned(self, block: Block) -> Streams:
        """What a block returns."""
        image, text = self._positions(block)
        there = Border(block.path, None, -1 if text is None else text) in self._found
        return self.one(block, None, image), self.one(block, None, text) if there and text is not None else None

    def between(self, blocks: Sequence[Block], following: Container[fx.Node]) -> tuple[fx.Node, ...]:
        """What is added to the image between two blocks, and does not follow from what blocks compute."""
        found: list[fx.Node] = []
        for before, block in itertools.pairwise(blocks):
            made = {
                node for border, nodes in self._found.items() if border[:2] == (before.path, None) for node in nodes
            }
            value, added = next(iter(self._found.get(Border(block.path, block.arguments[0], 0), ())), None), []
            while value is not None and value not in made:
                value, other = _summands(value, following)
                added.append(other)
            found += added if value is not None else []  # Else something else than a sum.
        return tuple(found)

    def _positions(self, block: Block) -> tuple[int, int | None]:
        """The positions of image and text; if diffusers does not say, those that have the shapes of the inputs."""
        if block.positions is not None:
            return block.positions
        count = range(max((b.position for b in self._found if b[:2] == (block.path, None)), default=0) + 1)
        here = [position for position in count if Border(block.path, None, position) in self._found]
        if len(here) < 2:
            return (here or [0])[0], None
        found = []
        for value in self.received(block):
            like = [p for p in here if value is not None and _looks(self.one(block, None, p)) == _looks(value)]
            if value is None or len(like) != 1:
                raise _refusal(
                    f"{block.path} returns several values, and neither diffusers (TransformerBlockRegistry) nor their "
                    "shapes say which is the image"
                )
            found += like
        return found[0], found[1]


def _trimmed(result: fx.Node, source: fx.Node | None) -> fx.Node:
    """The image alone, if the last block returns text and image in one value, and all that is read is the image."""
    while source is not None and _looks(result) != _looks(source) and len(result.users) == 1:
        (reader,) = result.users
        if reader.target is not torch.ops.aten.slice.Tensor:
            break
        result = reader
    return result


def _summands(node: fx.Node, following: Container[fx.Node]) -> tuple[fx.Node | None, Any]:
    """The two summands of a sum, first the one that follows from blocks; None if it is not a sum of two such values."""
    if node.target is torch.ops.aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
        left, right = node.args[:2]
        for one, other in ((left, right), (right, left)):
            if isinstance(one, fx.Node) and isinstance(other, fx.Node) and one in following and other not in following:
                return one, other
    return None, None


def _looks(node: fx.Node) -> tuple[object, ...]:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.dtype, *(str(size) for size in value.shape)


def _refusal(reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"this cache of steps cannot be used: {reason}. Call disable_cache(), or leave the cache out; to be faster "
        "without one, use fewer steps or compile the model"
    )
