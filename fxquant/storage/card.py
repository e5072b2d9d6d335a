"""The model card: the ``README.md`` of a checkpoint and of a quantized pipeline, as model hubs show it.

Its last line holds a digest of the rest. A card that somebody edited is therefore recognized, and saves do not replace
it.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxquant.capture.whole import split_class
from fxquant.disk.files import is_plain_file
from fxquant.planning.plan import Plan

CARD_FILE = "README.md"

_HEAD = """---
library_name: diffusers
tags:
- fxquant
- quantized
---
"""
_SEAL = "<!-- Written by fxquant. SHA-256 of the text above: {} -->\n"
_SEALED = re.compile(re.escape(_SEAL).replace(r"\{\}", "([0-9a-f]{64})"))


def model_card(plan: Plan, dtype: str, versions: Mapping[str, str], digests: Mapping[str, str]) -> str:
    """The card of one checkpoint.

    Args:
        plan: What was decided and measured.
        dtype: Dtype of everything that is not quantized.
        versions: Versions of the packages that traced the model.
        digests: SHA-256 of the files of the checkpoint, by name.
    """
    library, name, part = split_class(plan.model_class)
    title, whose, folder, rest = name, f"this `{name}`", "folder", ""
    if part:
        title, whose, folder = f"{name}, {part}", f"the {part} of a `{name}`", "folder_around_this_one"
        rest = " The rest of the model is in the folder around this one."
    how = f"from {library} import {name}\n\nmodel = {name}.from_pretrained({folder})"
    if library != "diffusers":
        how = f"from {library} import {name}\n\nmodel = fxquant.load({folder}, model={name})"
    return _sealed(
        f"{_HEAD}\n# {title}, quantized\n\n"
        f"The weights of {whose} were quantized by fxquant. Its files hold integer codes and no code to run.{rest}\n\n"
        f"```python\nimport fxquant  # Lets diffusers read these files.\n{how}\n```\n\n{_facts(plan, dtype)}\n"
        f"{_table(('package', 'version'), versions)}\n{_table(('file', 'SHA-256'), digests)}"
    )


def pipeline_card(kind: str, parts: Mapping[str, Plan], dtypes: Mapping[str, str]) -> str:
    """The card of a pipeline.

    Args:
        kind: Name of the pipeline's class.
        parts: The plans of its quantized parts, by the name of the part.
        dtypes: For each of these parts, the dtype of everything that is not quantized.
    """
    told = "\n".join(f"## {name}\n\n{_facts(plan, dtypes[name])}" for name, plan in parts.items())
    named = " and ".join(f"`{name}`" for name in parts)
    return _sealed(
        f"{_HEAD}\n# {kind}, quantized\n\nIn this `{kind}`, {named} {'were' if len(parts) > 1 else 'was'} quantized by "
        "fxquant.\n\n```python\nimport fxquant  # Lets diffusers read the quantized parts.\n"
        "from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained(folder)\n```\n\n"
        f"{told}"
    )


def is_own_card(path: Path) -> bool:
    """Whether a file is a card that this module wrote and nobody edited."""
    if not is_plain_file(path):
        return False
    text, seal, rest = path.read_text(encoding="utf-8", errors="replace").rpartition(_SEAL.partition("{}")[0])
    found = _SEALED.fullmatch(seal + rest)
    return found is not None and found[1] == _digest(text)


def _sealed(text: str) -> str:
    text = f"{text.rstrip()}\n\n"
    return text + _SEAL.format(_digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _facts(plan: Plan, dtype: str) -> str:
    """A table of what was decided for a model, and of what was measured."""
    facts: dict[str, Any] = {"backend": plan.backend, "dtype of the rest": dtype}
    for bits, number in sorted(_precisions(plan).items()):
        facts[f"layers with {bits}"] = number
    if plan.bytes_after:
        facts["size of the tensors"] = f"{plan.bytes_after:,} bytes, of {plan.bytes_before:,} in float"
    values = list(plan.output_sqnr_db.values())
    if values:
        worst = "" if plan.timestep is None else f"; at the worst timestep {min(values):.1f} dB"
        facts["SQNR of the output"] = f"{sum(values) / len(values):.1f} dB{worst}"
    if plan.timesteps and plan.timestep is not None:
        facts["calibrated timesteps"] = f"{len(plan.timesteps)}, {plan.timesteps[0]:g} to {plan.timesteps[-1]:g}"
    facts["recipe"] = f"`{plan.recipe}`"
    return _table(("what", "value"), facts)


def _precisions(plan: Plan) -> Counter[str]:
    found: Counter[str] = Counter()
    for _, layer in plan.quantized():
        kind = layer.activation_format or f"{layer.activation_bits}-bit"
        inputs = "float activations" if layer.activation_bits is None else f"{kind} activations"
        groups = f" in groups of {layer.group_size}" if layer.group_size else ""
        found[f"{layer.weight_format or f'{layer.weight_bits}-bit'} weights{groups} and {inputs}"] += 1
    return found


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines) + "\n"
