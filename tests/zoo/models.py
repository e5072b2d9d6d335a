"""Tiny configurations of the diffusion transformers in diffusers, with random weights and inputs for each.

An entry has the arguments of the constructor and a function that makes the inputs of a call for a batch size, a height
of latents and a prompt length. The library has no code for any of these classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from tests.zoo.entry import Entry, Maker
from tests.zoo.families import audio, flux, images, joint, ltx, lumina, outside, packed, videos, wan

__all__ = ["CAPTURED", "ENTRIES", "NOT_TRANSFORMERS", "QUANTIZED_SAMPLE", "REFUSED", "SAMPLE", "Entry", "Maker"]


def _fuse(model: Any) -> None:
    model.fuse_qkv_projections()


def _run_all_experts(model: Any) -> None:
    """Let each expert see all tokens, weighted by the router: the same function without branches on computed values."""

    def all_experts(self: Any, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        shape = len(x), self.num_activated_experts
        shares = x.new_zeros(len(x), len(self.experts)).scatter(1, indices.view(shape), weights.view(shape))
        outputs = [expert(x) * share for expert, share in zip(self.experts, shares.split(1, dim=1), strict=True)]
        return sum(outputs[1:], outputs[0])

    for module in model.modules():
        if hasattr(module, "moe_infer"):
            module.moe_infer = partial(all_experts, module)


@dataclass(frozen=True)
class Refusal:
    """Why a model cannot be captured.

    Attributes:
        reason: What its code does.
        error: What the error says.
        file: The file with the line that the error shows, or None if it is not about a line.
    """

    reason: str
    error: str
    file: str | None = None


_FAMILIES = (images, joint, lumina, flux, videos, ltx, wan, packed, audio, outside)
ENTRIES = [entry for family in _FAMILIES for entry in family.ENTRIES]

_HIDREAM = next(entry for entry in ENTRIES if entry.name == "HiDreamImageTransformer2DModel")
ENTRIES.append(replace(_HIDREAM, variant="-all-experts", after=_run_all_experts))
_SD3 = next(entry for entry in ENTRIES if entry.name == "SD3Transformer2DModel")
_FLUX1 = next(entry for entry in ENTRIES if entry.name == "FluxTransformer2DModel")
_HUNYUAN = next(entry for entry in ENTRIES if entry.name == "HunyuanDiT2DModel")
# diffusers cannot run fused projections and dual attention together.
_SD3 = replace(_SD3, config=_SD3.config | {"dual_attention_layers": ()})
ENTRIES += [replace(entry, variant="-fused", after=_fuse) for entry in (_SD3, _FLUX1, _HUNYUAN)]

_BRANCHES = "A graph is one path through the code"
_FLEX = "its code calls flex_attention"

REFUSED = {
    "HiDreamImageTransformer2DModel": Refusal(
        "it sends each token to some experts", _BRANCHES, "transformer_hidream_image.py"
    ),
    "HunyuanVideo15Transformer3DModel": Refusal(
        "it asks whether the image embeds are zero", _BRANCHES, "transformer_hunyuan_video15.py"
    ),
    "Kandinsky6SRTransformer3DModel": Refusal("sparse attention by flex_attention", _FLEX),
    "AnyFlowFARTransformer3DModel": Refusal("causal attention by flex_attention", _FLEX),
    "WanAnimate2Transformer3DModel": Refusal("a call fills an object that the next one reads", "input 'kv_cache' is a"),
}
"""Models that cannot be captured, by class."""

NOT_TRANSFORMERS = {
    "HunyuanDiT2DControlNetModel": "a ControlNet: its outputs are inputs of the transformer",
    "HunyuanDiT2DMultiControlNetModel": "several ControlNets",
    "LongCatAudioDiTVae": "an autoencoder",
    "RFD4ProteinaTransformer": "a model of proteins: its inputs are coordinates of atoms and features of pairs",
}
"""Classes of diffusers with a name like that of a diffusion transformer that are not audited, with the reason."""

SAMPLE = {
    *(
        "DiT2D",
        "Flux2D",
        "HunyuanDiT2D",
        "OmniGen2D",
        "ZImage2D",
        "OwnDiT",
        "OwnDiT-gated",
        "OwnVideoDiT",
    ),
}
"""Identifiers of the models that ``make test`` balances; ``make test-all`` balances all.

Among them are open and fixed batch sizes, all kinds and costs of linears, and nearly all ops of all models.
"""

QUANTIZED_SAMPLE = {"DiT2D", "OwnDiT-gated"}
"""Identifiers of the models that ``make test`` also quantizes and runs at other sizes."""

CAPTURED = [entry for entry in ENTRIES if entry.name + entry.variant not in REFUSED]
