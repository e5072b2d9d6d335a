"""Proofs that a pass does to numerics what its tier says, by running the graph before and after the pass.

A graph after an ``EXACT`` pass gives the same bits. A graph after an ``ALGEBRAIC`` pass gives, in float64, the same
outputs to a relative 1e-12; the pass runs again on a copy of the graph in float64, where it carries out what it has
decided. If there is no memory for that copy, a copy in float32 is taken, or else the model's own dtype. The outputs may
then differ by as much as rounding each weight anew would change them; in 16 bits this can hide a mistake in a small
layer, and a :class:`~fxquant.errors.ProofWarning` says so. A graph after a ``LOSSY`` pass is measured.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxquant.disk.files import dtype_name
from fxquant.errors import FxquantError, ProofError, ProofWarning
from fxquant.ir.doubles import as_wide, widened
from fxquant.ir.meta import PROVENANCE
from fxquant.ir.ops import recording
from fxquant.ir.places import label
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.tensors import copy_graph, drop_unread_tensors, read_tensors, set_tensor
from fxquant.numerics.sqnr import sqnr_db
from fxquant.planning.context import PassContext

if TYPE_CHECKING:
    from fxquant.pipeline.pipeline import Pass

ALGEBRAIC_ERROR = 1e-12
"""Largest relative error of an output in float64 that counts as rounding."""

_NOISE = 8.0  # Rounding each weight anew may change outputs by this times less than the pass does.
_SAMPLED = 4096  # Elements of each value that are compared to find where two graphs part.

Inputs = Sequence[Sequence[Tensor]]
"""Inputs of calls of a graph: for each call one tensor per graph input."""


@dataclass(frozen=True)
class Proof:
    """What was measured about one pass.

    Attributes:
        step: The pass with its options.
        tier: ``exact``, ``algebraic`` or ``lossy``.
        edits: Number of changes that the pass made; 0 if it did not match.
        calls: Number of calls that were compared.
        dtype: Dtype in which the outputs were compared.
        error: Largest relative error of an output: the largest difference against the largest element.
        allowed: The largest relative error that the tier allows; infinite for ``lossy``.
        sqnr_db: Signal to quantization noise of the first output in dB, the worst of all calls; infinite if equal.
        checked: What else was checked, in words.
    """

    step: str
    tier: str
    edits: int
    calls: int
    dtype: str
    error: float
    allowed: float
    sqnr_db: float
    checked: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.tier == "lossy":
            shown = f"SQNR {self.sqnr_db:.1f} dB"
        elif self.error == 0:
            shown = "equal bit for bit"
        else:
            shown = f"relative error {self.error:.1e}, at most {self.allowed:.1e} allowed"
        text = f"{self.step}: {self.tier}, {self.edits} edits; {shown} in {self.dtype} on {self.calls} calls"
        return "; ".join((text, *self.checked))


class Prover:
    """Keeps a graph from before a pass, to compare it with the graph after the pass.

    Args:
        step: The pass.
        module: The graph before the pass.
        context: What the pass is given. Its ``inputs`` are the calls that are compared.
    """

    def __init__(self, step: Pass, module: fx.GraphModule, context: PassContext) -> None:
        self.step = step
        self.context = context
        self.before = copy_graph(module)
        self._shared = copy.deepcopy(context.shared)
        self._transforms = {name: list(found) for name, found in context.transforms.items()}

    def check(self, module: fx.GraphModule, edits: int, inputs: Inputs | None = None) -> Proof:
        """Compare the graph after the pass with the graph before.

        Args:
            module: The graph after the pass.
            edits: Number of changes that the pass made.
            inputs: Calls; those of the context if None.

        Raises:
            ProofError: If the outputs differ by more than the tier allows.
        """
        inputs = self.context.inputs if inputs is None else inputs
        own = _dtype_of(self.before)
        if self.step.tier.value != "algebraic":
            return self._compare(self.before, module, inputs, own, edits)
        wider = [dtype for dtype in (torch.float64, torch.float32) if torch.finfo(dtype).eps < torch.finfo(own).eps]
        dtype = next((dtype for dtype in wider if _fits_in_memory(self.before, dtype)), own)
        if dtype is own and wider:
            proof = self._compare(self.before, module, inputs, own, edits)
            _warn_if_coarse(proof, own)
            return proof
        before = widened(self.before, dtype)
        wide = [[as_wide(tensor, dtype) for tensor in call] for call in inputs]
        proof = self._compare(before, self._again(before), wide, dtype, edits)
        # That graph was made from the plan. The one that the pass itself made is compared as far as its dtype allows.
        self._compare(self.before, module, inputs, own, edits)
        return proof

    def _compare(
        self, before: fx.GraphModule, after: fx.GraphModule, inputs: Inputs, dtype: torch.dtype, edits: int
    ) -> Proof:
        error, worst, tier = 0.0, math.inf, self.step.tier.value
        for call in inputs:
            expected, actual = run_graph(before, call), run_graph(after, call)
            error = max([error, *map(relative_error, actual, expected)])
            worst = min([worst, *map(sqnr_db, expected[:1], actual[:1])])
        allowed = {"exact": 0.0, "lossy": math.inf}.get(tier, ALGEBRAIC_ERROR)
        if tier == "algebraic" and error > allowed:
            allowed = max(ALGEBRAIC_ERROR, _NOISE * rounding_noise(before, inputs[0]))
        proof = Proof(str(self.step), tier, edits, len(inputs), dtype_name(dtype), error, allowed, worst)
        if error > allowed or (tier == "exact" and math.isnan(error)):
            raise self._refusal(proof, before, after, inputs)
        return proof

    def _again(self, before: fx.GraphModule) -> fx.GraphModule:
        """The graph after the pass carried out its decisions on another graph."""
        after = copy_graph(before)
        context = replace(self.context.for_trial(), shared=copy.deepcopy(self._shared), progress=None)
        context.transforms = {name: list(found) for name, found in self._transforms.items()}
        try:
            rewrite(self.step, after, context)
        except FxquantError as error:
            raise ProofError(
                f"pass {self.step} cannot be proved: with its own decisions in the plan, it fails on the same graph in "
                f"a wider dtype: {error}. Write every decision into the plan, and read it there",
                str(self.step),
            ) from error
        return after

    def _refusal(self, proof: Proof, before: fx.GraphModule, after: fx.GraphModule, inputs: Inputs) -> ProofError:
        node = first_difference(before, after, inputs[0], proof.allowed, proof.step.partition("{")[0])
        shown = None if node is None else describe(node, self.step.name)
        where = f"; the first value that differs on the way to the output: {shown}" if shown else ""
        claim = {"exact": "the same bits", "algebraic": f"a relative error of at most {proof.allowed:.1e}"}[proof.tier]
        return ProofError(
            f"pass {proof.step} is not {proof.tier}: in {proof.dtype} an output is off by {proof.error:.2e} of its "
            f"largest element ({proof.sqnr_db:.1f} dB SQNR), and its tier promises {claim}{where}. Mend the pass, or "
            "declare the tier that it has",
            proof.step,
            proof.error,
            None if node is None else node.name,
        )


def rewrite(step: Pass, module: fx.GraphModule, context: PassContext) -> int:
    """Run a pass on a graph without verification; returns the number of edits."""
    rewriter = Rewriter(module, step.name)
    step.run(module.graph, context, rewriter)
    module.graph.eliminate_dead_code()
    drop_unread_tensors(module)
    module.recompile()
    return rewriter.edits


@torch.no_grad()
def run_graph(module: fx.GraphModule, call: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that a graph returns; what observers see is not recorded."""
    with recording(lambda *_: None):
        return [leaf for leaf in module(*call) if isinstance(leaf, Tensor)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference against the largest element, 0 only if all bits are equal; infinite if NaNs differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return math.inf
    wide = torch.complex128 if expected.is_complex() else torch.float64
    one, other = actual.detach().to(wide), expected.detach().to(wide)
    finite = other.isfinite()
    same = torch.equal(one[~finite].nan_to_num(), other[~finite].nan_to_num())
    if not torch.equal(finite, one.isfinite()) or not same:
        return math.inf
    difference = (one - other)[finite].abs()
    if not difference.numel() or not difference.any():  # NaNs at the same places.
        signs = one.is_complex() or torch.equal(one.signbit()[finite], other.signbit()[finite])
        return 0.0 if signs else torch.finfo(torch.float64).tiny  # 0 and -0 are not the same bits.
    return float(difference.max() / other[finite].abs().max().clamp_min(torch.finfo(torch.float64).tiny))


# --- where two graphs part ---


def first_difference(
    before: fx.GraphModule, after: fx.GraphModule, call: Sequence[Tensor], allowed: float, pass_name: str
) -> fx.Node | None:
    """The first node of a graph after a pass that makes an output differ from that of the graph before the pass.

    Nodes of the same name are compared. The walk goes from the outputs back through values that differ, up to values
    that are equal. Of these nodes, the first that the pass made or whose tensors it changed is returned; if there is
    none, the first.
    """
    old, new = _values(before, call), _values(after, call)
    allowed = max(allowed, 1e-9 if _dtype_of(before) is torch.float64 and allowed else allowed)

    def is_equal(node: fx.Node) -> bool:
        return node.name in old and relative_error(new[node.name], old[node.name]) <= allowed

    (output,) = (node for node in after.graph.nodes if node.op == "output")
    left, seen = list(output.all_input_nodes), set()
    while left:
        node = left.pop()
        if node in seen or node.op in ("placeholder", "get_attr") or node.name not in new or is_equal(node):
            continue
        seen.add(node)
        left += node.all_input_nodes
    ordered = [node for node in after.graph.nodes if node in seen]
    return next((node for node in ordered if _touched(node, pass_name)), next(iter(ordered), None))


def describe(node: fx.Node, pass_name: str) -> str:
    """A node with its layer, its op and the tensors that the pass changed, for messages."""
    changed = [f"@{read.target}" for read in node.all_input_nodes if read.op == "get_attr" and _made(read, pass_name)]
    reads = f", which reads {', '.join(changed)}, changed by the pass" if changed else ""
    return f"{label(node)}, {node.target}{reads}"


def _touched(node: fx.Node, pass_name: str) -> bool:
    return any(_made(one, pass_name) for one in (node, *(n for n in node.all_input_nodes if n.op == "get_attr")))


def _made(node: fx.Node, pass_name: str) -> bool:
    return any(origin.pass_name == pass_name for origin in node.meta.get(PROVENANCE, ())[-1:])


class _Sampling(fx.Interpreter):
    """Runs a graph and keeps a sample of every floating-point value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point():
            flat = result.detach().flatten()
            self.found[n.name] = flat[:: max(1, flat.numel() // _SAMPLED)].clone()
        return result


@torch.no_grad()
def _values(module: fx.GraphModule, call: Sequence[Tensor]) -> dict[str, Tensor]:
    interpreter = _Sampling(module)
    with recording(lambda *_: None):
        interpreter.run(*call)
    return interpreter.found


# --- precision ---


def _dtype_of(module: fx.GraphModule) -> torch.dtype:
    """The narrowest floating-point dtype of the tensors of a graph."""
    found = [tensor.dtype for tensor in read_tensors(module).values() if tensor.is_floating_point()]
    wide = [dtype for dtype in found if dtype.itemsize > 1]
    return max(wide, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _warn_if_coarse(proof: Proof, own: torch.dtype) -> None:
    """Warn if the outputs differ, and the dtype is too narrow to tell rounding from a mistake in a small layer."""
    if proof.error > ALGEBRAIC_ERROR and torch.finfo(own).eps > torch.finfo(torch.float32).eps:
        warnings.warn(
            f"pass {proof.step} was compared in {proof.dtype} only, because there is no memory for the weights in "
            f"float32: outputs differ by {proof.error:.1e}, and up to {proof.allowed:.1e} counts as rounding. A "
            "mistake that changes outputs by less is not found. Free memory, or prove the pass on a smaller model with "
            "fxquant.testing.prove",
            ProofWarning,
            stacklevel=1,
        )


def _fits_in_memory(module: fx.GraphModule, dtype: torch.dtype) -> bool:
    """Whether three copies of the tensors in this dtype take at most half of the free memory."""
    size = sum(dtype.itemsize * tensor.numel() for tensor in read_tensors(module).values())
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # The system does not say.
        return size < 1 << 30
    return 3 * size <= free / 2


def rounding_noise(module: fx.GraphModule, call: Sequence[Tensor], least: float = 0.0) -> float:
    """The relative error of an output if each weight moves by up to one unit in its last place, or by ``least``."""
    moved, generator = copy_graph(module), torch.Generator().manual_seed(0)
    for target, tensor in read_tensors(moved).items():
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            part = 2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device) - 1
            factor = 1 + max(torch.finfo(tensor.dtype).eps, least) * part
            set_tensor(moved, target, (tensor.detach().double() * factor).to(tensor.dtype))
    return max(map(relative_error, run_graph(moved, call), run_graph(module, call)), default=0.0)
