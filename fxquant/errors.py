"""Every error that fxquant raises on purpose, and its warnings. Each says what is wrong, where, and what to do next.

All errors derive from :class:`FxquantError`, and additionally from the builtin that Python users would catch for the
same kind of mistake (``ValueError``, ``LookupError`` for ``KeyError``-like lookups, ``RuntimeError``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_LONGEST = 300  # Characters of a text of the user that a message shows.
_LONG_WORD = re.compile(rf"\S{{{_LONGEST + 1},}}")


def shortened(text: str) -> str:
    """A text of the user for a message: of a very long one, the beginning and the end."""
    if len(text) <= _LONGEST:
        return text
    begin, end = _LONGEST - 100, 20
    return f"{text[:begin]}... ({len(text) - begin - end} characters left out) ...{text[-end:]}"


class FxquantError(Exception):
    """Base class of all errors that fxquant raises on purpose. Very long words of a message are shortened.

    Attributes:
        component: The model of the pipeline that it is about, if several are quantized at once.
    """

    component: str | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*(_LONG_WORD.sub(_cut, arg) if isinstance(arg, str) else arg for arg in args))


def _cut(match: re.Match[str]) -> str:
    return shortened(match[0])


class ConfigurationError(FxquantError, ValueError):
    """An option is out of range or two options contradict each other."""


def check_type(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Refuse an argument of a wrong type.

    Args:
        name: Name of the argument.
        value: What was given for it.
        kinds: The types that are taken.
        wanted: What is taken, in words, such as ``the name of a layer``.

    Raises:
        ConfigurationError: Names the argument and says what is taken.
    """
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise ConfigurationError(f"{name} should be {wanted}, not a {type(value).__name__}")


class UnknownNameError(FxquantError, LookupError):
    """No recipe, pass, backend or rule of this name is registered; the message lists the known names."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        listed = ", ".join(sorted(known)) or "none"
        super().__init__(f"unknown {kind} {shortened(str(name))!r}. Known: {listed}.")


class DuplicateNameError(FxquantError, ValueError):
    """Two objects were registered under one name."""


class UnreachableTargetError(ConfigurationError):
    """A search cannot reach its target; the message says the best that it can reach, and what to change.

    Attributes:
        best: The best that can be reached, in the unit of the target.
    """

    def __init__(self, message: str, best: float) -> None:
        super().__init__(message)
        self.best = best


class PluginError(FxquantError, ImportError):
    """Another package offers a pass, recipe or backend that cannot be imported; the message names the package."""


class CaptureError(FxquantError, RuntimeError):
    """The model could not be traced into a graph, or a call does not fit what was traced.

    Attributes:
        reason: The reason alone, in one line.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = message.splitlines()[0] if reason is None else reason


class MissingTimestepError(FxquantError, ValueError):
    """The model has no input of the name that should hold the timestep."""


class RankError(FxquantError, RuntimeError):
    """Another process of a distributed run failed, died, or cannot be reached; the message names its rank.

    Attributes:
        rank: The rank, or None if it is not known which one.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class RanksDifferError(ConfigurationError):
    """The processes of a distributed run have other options, files or versions; the message names the difference."""


class CalibrationError(FxquantError, RuntimeError):
    """Calibration is missing, never called the model, or did not reach a layer.

    Attributes:
        reason: What is wrong, without advice for calibration, for places where the same error can have other causes.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = message if reason is None else reason


class NotCalledError(CalibrationError):
    """Calibration returned without calling the model."""


class NonFiniteError(FxquantError, ValueError):
    """A weight or an activation holds NaN or infinity; the message names the layer."""


class VerificationError(FxquantError, RuntimeError):
    """A graph breaks the specification of its stage; the message names the node and the pass."""


class ArgumentError(FxquantError, AttributeError):
    """A node does not have the argument that was asked for, or the argument is of another kind."""


class PassError(FxquantError, RuntimeError):
    """A pass failed or was used out of order; the message names the pass."""


class ProofError(PassError):
    """A pass does not do what its tier says; the message names the pass, the tier, the error and a node.

    Attributes:
        pass_name: The pass with its options.
        error: Largest relative error of an output, or None if something else than an output is wrong.
        node: The first node on the way to the output whose value differs, or None.
    """

    def __init__(self, message: str, pass_name: str, error: float | None = None, node: str | None = None) -> None:
        super().__init__(message)
        self.pass_name = pass_name
        self.error = error
        self.node = node


class LifecycleError(FxquantError, AssertionError):
    """A pass does not survive what a quantized model goes through; the message names each step that failed.

    Attributes:
        failures: What went wrong, by step.
    """

    def __init__(self, message: str, failures: dict[str, str]) -> None:
        super().__init__(message)
        self.failures = failures


class BackendError(FxquantError, RuntimeError):
    """A backend cannot run what it was asked to; the message lists layers, reasons and what works instead."""


class CompilerError(FxquantError, RuntimeError):
    """There is no compiler, or it failed; the message says what to install or what the compiler reported."""


class CheckpointError(FxquantError, RuntimeError):
    """A checkpoint is damaged, incomplete, unsafe or of a newer format; the message names the file."""


class HubError(FxquantError, ConnectionError):
    """The Hugging Face Hub cannot be reached or refuses a request; the message says what to check."""


class MissingPackageError(FxquantError, ImportError):
    """An optional package is not installed; the message says how to install it."""


class AdapterError(FxquantError, ValueError):
    """A LoRA or another adapter does not fit the quantized model; the message names the layer and says what works."""


class DropInError(FxquantError, AttributeError):
    """Something was asked of a captured model that only the float model can do; the message says what to do instead.

    It is also an ``AttributeError``, so that ``hasattr`` and ``getattr`` with a default work as for any attribute.

    Attributes:
        within: The method of the model's own class that was running at the refusal, or None.
    """

    def __init__(self, message: str, within: str | None = None) -> None:
        super().__init__(message)
        self.within = within


class WriteError(CheckpointError, OSError):
    """A file or folder cannot be written: no space, no permission, a read-only disk; the message names it.

    Attributes:
        kept: Where the result was kept, if it was.
    """

    def __init__(self, message: str, *, kept: Path | None = None, errno: int | None = None) -> None:
        super().__init__(message)
        self.kept = kept
        self.errno = errno


class EvaluationError(FxquantError, RuntimeError):
    """Images cannot be made or measured: other options in the folder, a broken feature extractor, too few images."""


class MetricWeightsError(EvaluationError):
    """A metric needs a network whose weights are not given; the message says where they are and what runs without."""


class GateError(FxquantError, AssertionError):
    """A metric is beyond its limit; the message names each metric, its limit and by how much it fails.

    Attributes:
        failures: What failed, by metric.
    """

    def __init__(self, message: str, failures: dict[str, str]) -> None:
        super().__init__(message)
        self.failures = failures


class FolderInUseError(WriteError):
    """Another process works in a folder; the message names the folder."""


class MemoryLimitError(FxquantError, MemoryError):
    """A bound on memory is too small for a step; the message names the step.

    Attributes:
        smallest: A bound that would do, in bytes: what was needed, and an eighth on top.
    """

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


class AlreadyCompiledError(FxquantError, TypeError):
    """The model given to ``compile`` is already an fxquant model."""


class QualityWarning(UserWarning):
    """The quantized model's output is, or may be, far from the float model's."""


class PortabilityWarning(UserWarning):
    """The quantized model cannot be saved to load without the float model; the message says why and what to do."""


class SpeedWarning(UserWarning):
    """The quantized model is slower than it could be; the message says why."""


class DamagedFileWarning(UserWarning):
    """An optional file of a checkpoint is damaged and was left out; the message names it and says what to do."""


class ProofWarning(UserWarning):
    """A pass was proved with a tolerance that can hide a mistake in a small layer; the message says how large it is."""


class ResumeWarning(UserWarning):
    """What an interrupted run kept cannot be used; the message says why, and that it is computed anew."""
