"""Everything that a pass of another package needs, under one name: ``from fxquant.authoring import Pass, args``.

These names stay when modules move. What they do is described where they are defined.

==========================  ==========================================================================================
to write a pass             ``Pass``, ``Tier``, ``Stage``, ``register_pass``, ``PassContext``, ``BackendLimits``,
                            ``Rewriter``, ``Plan``, ``LayerPlan``, ``Decision`` (what the pass decides)
to run and print passes     ``Pipeline``, ``PassRecord``, ``Instrument``, ``parse_pass``, ``Recipe``, ``make_recipe``,
                            ``register_recipe``, ``graph_text``
to read a graph             ``args(node).weight``, ``source_of``, ``layer_of``, ``layer_kind``, ``layer_kinds``,
                            ``stored_weight``, ``provenance_of``, ``find_attentions``, ``Attention``, ``behind``,
                            ``reached``, ``linears_to_quantize``, ``FloatLinear``, ``changed_by`` (what a pass has
                            rewritten already), ``run_with`` (runs a graph with other tensors)
what calibration saw        ``Statistics``, ``ChannelStatistics``, ``layer_input`` (a layer's input as the plan has
                            shifted and balanced it so far), ``LayerInput``, ``moments``
to quantize                 ``quantize_weight``, ``dequantize_weight``, ``QuantizedWeight``, ``gptq``,
                            ``ErrorFeedback``, ``Precision``, ``FLOAT``, ``activation_range``, ``weight_range``,
                            ``affine_parameters``, ``fake_quantize``, ``sqnr_db``
number formats              ``Format``, ``Scales``, ``FORMATS``, ``register_format``: formats of yours
to derive tensors           ``History``, ``made_from``: what a tensor is made from, so that graphs share it
ops and stages              ``register_op``: let graphs hold an op of yours; ``register_stage``: a stage of yours
                            between two others; ``stage_named``, ``unregister_stage``
errors                      ``PassError``, ``ConfigurationError``, ``CalibrationError``, ``ProofError``
==========================  ==========================================================================================
"""

from fxquant.errors import CalibrationError, ConfigurationError, PassError, ProofError
from fxquant.ir.arguments import args, item_of, source_of
from fxquant.ir.attention import Attention, find_attentions
from fxquant.ir.dataflow import behind, reached
from fxquant.ir.histories import History, made_from
from fxquant.ir.layers import layer_of, provenance_of, stored_weight
from fxquant.ir.places import Origin
from fxquant.ir.printing import graph_text
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.running import run_with
from fxquant.ir.stages import Stage, register_op, register_stage, stage_named, unregister_stage
from fxquant.numerics.formats import FORMATS, Format, Scales, register_format
from fxquant.numerics.grids import affine_parameters, fake_quantize
from fxquant.numerics.ranges import activation_range, weight_range
from fxquant.numerics.rounding.feedback import ErrorFeedback
from fxquant.numerics.rounding.gptq import gptq
from fxquant.numerics.sqnr import sqnr_db
from fxquant.numerics.weights import QuantizedWeight, dequantize_weight, quantize_weight
from fxquant.pipeline.pipeline import Instrument, Pass, PassRecord, Pipeline, Tier, parse_pass, register_pass
from fxquant.pipeline.recipes import Recipe, make_recipe, register_recipe
from fxquant.planning.context import BackendLimits, PassContext
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.kinds import layer_kind, layer_kinds
from fxquant.planning.layer_inputs import LayerInput, layer_input, moments
from fxquant.planning.linears import FloatLinear, changed_by, linears_to_quantize
from fxquant.planning.pass_decisions import Decision
from fxquant.planning.plan import Plan
from fxquant.planning.precision import FLOAT, Precision
from fxquant.statistics.channels import ChannelStatistics
from fxquant.statistics.collection import Statistics

__all__ = [
    "FLOAT",
    "FORMATS",
    "Attention",
    "BackendLimits",
    "CalibrationError",
    "ChannelStatistics",
    "ConfigurationError",
    "Decision",
    "ErrorFeedback",
    "FloatLinear",
    "Format",
    "History",
    "Instrument",
    "LayerInput",
    "LayerPlan",
    "Origin",
    "Pass",
    "PassContext",
    "PassError",
    "PassRecord",
    "Pipeline",
    "Plan",
    "Precision",
    "ProofError",
    "QuantizedWeight",
    "Recipe",
    "Rewriter",
    "Scales",
    "Stage",
    "Statistics",
    "Tier",
    "activation_range",
    "affine_parameters",
    "args",
    "behind",
    "changed_by",
    "dequantize_weight",
    "fake_quantize",
    "find_attentions",
    "gptq",
    "graph_text",
    "item_of",
    "layer_input",
    "layer_kind",
    "layer_kinds",
    "layer_of",
    "linears_to_quantize",
    "made_from",
    "make_recipe",
    "moments",
    "parse_pass",
    "provenance_of",
    "quantize_weight",
    "reached",
    "register_format",
    "register_op",
    "register_pass",
    "register_recipe",
    "register_stage",
    "run_with",
    "source_of",
    "sqnr_db",
    "stage_named",
    "stored_weight",
    "unregister_stage",
    "weight_range",
]
