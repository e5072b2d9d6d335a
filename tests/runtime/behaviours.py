"""What a quantized model does with everything that the classes of diffusers offer, as the table of docs/diffusers.md.

``python -m tests.runtime.behaviours`` writes the table into the page.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

import fxquant
from fxquant.errors import AdapterError, DropInError
from fxquant.runtime.drop_in import Refused
from fxquant.runtime.model import GraphModel

MIXINS = (ModelMixin, PeftAdapterMixin, CacheMixin, AttentionMixin, FromOriginalModelMixin)
PAGE = Path(__file__).parents[2] / "docs/diffusers.md"
HEADING = "## Table of behaviours\n"


class Everything(*MIXINS, diffusers.ConfigMixin):  # type: ignore[misc]
    """A model with all that diffusers offers."""

    @diffusers.configuration_utils.register_to_config
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.proj(x) * timestep[:, None]


def quantized() -> GraphModel:
    """Such a model, quantized."""
    torch.manual_seed(0)
    model = Everything().eval()

    def calibrate() -> None:
        for step in (0.9, 0.5):
            model(torch.randn(2, 8), torch.full((2,), step))

    return fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=calibrate, measure=0)


def public(cls: type) -> list[str]:
    """What a class has beside what every module of torch has."""
    return [name for name in dir(cls) if not name.startswith("_") and not hasattr(nn.Module, name)]


def refused(made: GraphModel, name: str) -> str | None:
    """The message with which an attribute is refused, or None if it works. Methods are refused when they are called."""
    try:
        found = getattr(made, name)
        if isinstance(found, Refused):
            assert hasattr(made, name)  # Who asks for it first is not to go on in silence.
            found()
        if name == "add_adapter" and made.plan is not None:  # It takes what it would be given and refuses it.
            found()
    except DropInError as error:
        return str(error)
    except AdapterError as error:
        return f"{name}: {error}."
    return None


def table() -> str:
    """The table: what works, by class, and what is refused, by message."""
    made, seen, works, messages = quantized(), set(), [], {}  # type: ignore[var-annotated]
    for cls in MIXINS:
        names = [name for name in public(cls) if name not in seen]
        seen.update(names)
        told = {name: refused(made, name) for name in names}
        good = [name for name, message in told.items() if message is None]
        if good:
            works.append((f"`{cls.__name__}`", good))
        for name, message in told.items():
            if message is not None:
                messages.setdefault(message.partition(": ")[2], []).append(name)
    lines = ["| of | works |", "|---|---|", *(f"| {where} | {_listed(names)} |" for where, names in works)]
    lines += ["", "| refused | message |", "|---|---|"]
    lines += [f"| {_listed(names)} | {message} |" for message, names in messages.items()]
    return "\n".join(lines) + "\n"


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, heading, after = text.partition(HEADING)
    begin = after.index("| of | works |") if "| of | works |" in after else len(after)
    PAGE.write_text(f"{before}{heading}{after[:begin]}{table()}", encoding="utf-8")
