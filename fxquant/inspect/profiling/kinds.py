"""The kind of work that a node does, derived from the name of its op, so that it works for ops of any backend."""

from __future__ import annotations

import re

from torch import fx

from fxquant.ir.names import qualified_name

_WORDS = {
    "linear": r"q?linear|addmm",
    "attention": r"attention|sdpa|matmul|b?mm|softmax",
    "convolution": r"q?conv\w*",
    "embedding": r"embedding",
    "norm": r"norm",
    "quantize": r"(de)?quantize|token_grid|token_scale|block_scale|bucketize",
    "layout": r"view|reshape|permute|transpose|t|expand|slice|select|index|chunk|split|unbind|getitem|(un)?squeeze"
    r"|(un)?flatten|cat|stack|contiguous|clone|copy|to|sym|size|alias|detach|movedim|unfold|repeat|roll|pad",
}
_PATTERNS = {kind: re.compile(rf"(?:^|_)(?:{words})(?:_|$)") for kind, words in _WORDS.items()}

POINTWISE = "pointwise"
KINDS = (*_WORDS, POINTWISE)
"""All kinds, in the order in which they are tried; an op that matches no other kind is pointwise."""


def kind_of(node: fx.Node) -> str:
    """The kind of a node's work, one of :data:`KINDS`.

    The first kind that matches counts: a linear that quantizes its result is ``linear``, and a norm that quantizes its
    result is ``norm``. Products of two activations and softmax are ``attention``; casts are ``layout``.
    """
    name = qualified_name(node.target).rpartition("::")[2].partition(".")[0]
    return next((kind for kind, pattern in _PATTERNS.items() if pattern.search(name)), POINTWISE)
