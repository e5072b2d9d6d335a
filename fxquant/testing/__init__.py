"""Helpers for the tests of passes, recipes and backends, of this package and of others.

``prove`` proves the tier of a pass, ``check_lifecycle`` runs a recipe through saving, loading, other shapes and
backends, ``assert_golden`` compares graphs with files, ``assert_not_fired`` holds where a pass must leave a graph
alone, ``tiny_dit`` and its sisters make small models of every layout of adaLN, ``tiny_linears`` one whose graph is
short, and ``graphs`` random ones. ``docs/write-a-pass.md`` has examples.
"""

from fxquant.errors import LifecycleError, ProofError
from fxquant.ir.printing import graph_text
from fxquant.pipeline.proving import Proof
from fxquant.testing.golden import UPDATE, assert_golden
from fxquant.testing.lifecycle import Lifecycle, check_lifecycle
from fxquant.testing.models import (
    STEPS,
    TINY,
    calibration,
    example_call,
    example_calls,
    tiny_dit,
    tiny_flux,
    tiny_linears,
    tiny_lumina2,
    tiny_pixart,
    tiny_sd3,
    tiny_wan,
)
from fxquant.testing.own import own_backends, own_passes, own_recipes
from fxquant.testing.proving import Trial, assert_not_fired, prove, try_pass
from fxquant.testing.random_models import RandomGraph, graphs, random_graph

__all__ = [
    "STEPS",
    "TINY",
    "UPDATE",
    "Lifecycle",
    "LifecycleError",
    "Proof",
    "ProofError",
    "RandomGraph",
    "Trial",
    "assert_golden",
    "assert_not_fired",
    "calibration",
    "check_lifecycle",
    "example_call",
    "example_calls",
    "graph_text",
    "graphs",
    "own_backends",
    "own_passes",
    "own_recipes",
    "prove",
    "random_graph",
    "tiny_dit",
    "tiny_flux",
    "tiny_linears",
    "tiny_lumina2",
    "tiny_pixart",
    "tiny_sd3",
    "tiny_wan",
    "try_pass",
]
