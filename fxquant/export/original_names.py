"""Names of tensors in the checkpoints of a model's authors, which ComfyUI reads, in place of those of diffusers.

The authors' code often has one linear where diffusers has several, such as q, k and v: the rows of their weights follow
each other. And where diffusers splits a vector into scale and shift, some authors split it into shift and scale.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxquant.errors import ConfigurationError

Table = Mapping[str, str | tuple[str, ...]]
"""For each module or tensor of the authors, those of diffusers whose rows it holds."""


@dataclass(frozen=True)
class Layout:
    """The names that the authors of a class use.

    Attributes:
        top: What is outside of blocks.
        blocks: For each list of blocks in diffusers, the authors' name of the list and what a block holds.
        swapped: The authors' modules whose two halves of rows are in the other order.
        swapped_in_last: The same, in the last block of a list.
        keeps: Whether everything else has the same name.
    """

    top: Table = field(default_factory=dict)
    blocks: Mapping[str, tuple[str, Table]] = field(default_factory=dict)
    swapped: Collection[str] = ()
    swapped_in_last: Collection[str] = ()
    keeps: bool = False


_FLUX_STREAMS: Table = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_FLUX_SINGLE: Table = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": "proj_out",
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
}
_FLUX_ENDS: Table = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
_FINAL_MODULATION = "final_layer.adaLN_modulation.1"

_FLUX = Layout(
    top={
        **_FLUX_ENDS,
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        _FINAL_MODULATION: "norm_out.linear",
    },
    blocks={
        "transformer_blocks": (
            "double_blocks",
            {"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear", **_FLUX_STREAMS},
        ),
        "single_transformer_blocks": ("single_blocks", {"modulation.lin": "norm.linear", **_FLUX_SINGLE}),
    },
    swapped={_FINAL_MODULATION},
)

_SD3 = Layout(
    top={
        "pos_embed": "pos_embed.pos_embed",
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "context_embedder": "context_embedder",
        "final_layer.linear": "proj_out",
        _FINAL_MODULATION: "norm_out.linear",
    },
    blocks={
        "transformer_blocks": (
            "joint_blocks",
            {
                "x_block.adaLN_modulation.1": "norm1.linear",
                "context_block.adaLN_modulation.1": "norm1_context.linear",
                "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "x_block.attn.ln_q": "attn.norm_q",
                "x_block.attn.ln_k": "attn.norm_k",
                "context_block.attn.ln_q": "attn.norm_added_q",
                "context_block.attn.ln_k": "attn.norm_added_k",
                "x_block.attn.proj": "attn.to_out.0",
                "context_block.attn.proj": "attn.to_add_out",
                "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "x_block.attn2.ln_q": "attn2.norm_q",
                "x_block.attn2.ln_k": "attn2.norm_k",
                "x_block.attn2.proj": "attn2.to_out.0",
                "x_block.mlp.fc1": "ff.net.0.proj",
                "x_block.mlp.fc2": "ff.net.2",
                "context_block.mlp.fc1": "ff_context.net.0.proj",
                "context_block.mlp.fc2": "ff_context.net.2",
            },
        )
    },
    swapped={_FINAL_MODULATION},
    swapped_in_last={"context_block.adaLN_modulation.1"},
)

_WAN_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_WAN_IMAGE = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
_WAN = Layout(
    top={
        "patch_embedding": "patch_embedding",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        "head.head": "proj_out",
        "head.modulation": "scale_shift_table",
    },
    blocks={
        "blocks": (
            "blocks",
            {
                **{f"self_attn.{theirs}": f"attn1.{ours}" for theirs, ours in _WAN_ATTENTION.items()},
                **{f"cross_attn.{theirs}": f"attn2.{ours}" for theirs, ours in (_WAN_ATTENTION | _WAN_IMAGE).items()},
                "norm3": "norm2",
                "ffn.0": "ffn.net.0.proj",
                "ffn.2": "ffn.net.2",
                "modulation": "scale_shift_table",
            },
        )
    },
)

_LTX = Layout(
    top={"patchify_proj": "proj_in", "adaln_single": "time_embed"},
    blocks={
        "transformer_blocks": (
            "transformer_blocks",
            {f"{attn}.{n}_norm": f"{attn}.norm_{n}" for attn in ("attn1", "attn2") for n in ("q", "k")},
        )
    },
    keeps=True,
)

_CHROMA_GUIDANCE = "distilled_guidance_layer"
_CHROMA = Layout(
    top=_FLUX_ENDS,
    blocks={
        "transformer_blocks": ("double_blocks", _FLUX_STREAMS),
        "single_transformer_blocks": ("single_blocks", _FLUX_SINGLE),
        f"{_CHROMA_GUIDANCE}.layers": (
            f"{_CHROMA_GUIDANCE}.layers",
            {"in_layer": "linear_1", "out_layer": "linear_2"},
        ),
        f"{_CHROMA_GUIDANCE}.norms": (f"{_CHROMA_GUIDANCE}.norms", {"scale": "weight"}),
    },
    keeps=True,
)

LAYOUTS: Mapping[str, Layout] = {
    "ChromaTransformer2DModel": _CHROMA,
    "FluxTransformer2DModel": _FLUX,
    "LTXVideoTransformer3DModel": _LTX,
    "QwenImageTransformer2DModel": Layout(keeps=True),
    "SD3Transformer2DModel": _SD3,
    "WanTransformer3DModel": _WAN,
}
"""The classes of diffusers whose authors' names are known."""


@dataclass(frozen=True)
class _Place:
    """Where the rows of a module or tensor of diffusers are in the authors' checkpoint."""

    target: str
    part: int = 0
    parts: int = 1
    swapped: bool = False


class OriginalNames:
    """The authors' names of a model's tensors.

    Args:
        class_: Class of the model, or a subclass of one whose names are known.
        names: Names of all tensors of the model.

    Raises:
        ConfigurationError: If the names of the class are not known.
    """

    def __init__(self, class_: type, names: Collection[str]) -> None:
        found = next((LAYOUTS[base.__name__] for base in class_.__mro__ if base.__name__ in LAYOUTS), None)
        if found is None:
            raise ConfigurationError(
                f"ComfyUI's names of a {class_.__name__} are not known, only those of {', '.join(sorted(LAYOUTS))}; "
                "names='class' (--names class) writes the names of the class"
            )
        self._layout, self._class = found, class_.__name__
        self._places = dict(_places(found, names))

    def place(self, name: str) -> tuple[_Place, str]:
        """Where a tensor or module is, and what follows in its name.

        Raises:
            ConfigurationError: If it has no place.
        """
        head, tail = name, ""
        while head:
            if head in self._places:
                return self._places[head], tail
            head, dot, last = head.rpartition(".")
            tail = f"{dot}{last}{tail}"
        if self._layout.keeps:
            return _Place(name), ""
        raise ConfigurationError(
            f"ComfyUI has no name for {name!r} of this {self._class}; names='class' writes the names of the class"
        )

    def modules(self, names: Collection[str]) -> dict[str, list[str]]:
        """For each module of the authors that holds one of these modules, all of those that it holds."""
        found: dict[str, list[str]] = {}
        for name in names:
            place, tail = self.place(name)
            found.setdefault(f"{place.target}{tail}", []).append(name)
        return found

    def tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under the authors' names; rows of fused modules are joined.

        Raises:
            ConfigurationError: If a tensor has no place, or parts of a fused tensor do not fit each other.
        """
        parts: dict[str, dict[int, tuple[str, Tensor]]] = {}
        places: dict[str, _Place] = {}
        for name, tensor in tensors.items():
            place, tail = self.place(name)
            target = f"{place.target}{tail}"
            places[target] = place
            parts.setdefault(target, {})[place.part] = name, tensor
        return {target: _joined(target, parts[target], place) for target, place in places.items()}


def _joined(target: str, parts: Mapping[int, tuple[str, Tensor]], place: _Place) -> Tensor:
    found = [parts[number][1] for number in sorted(parts)]
    if len(found) != place.parts or len({tensor.dtype for tensor in found}) > 1:
        names = ", ".join(name for name, _ in parts.values())
        raise ConfigurationError(
            f"ComfyUI holds {target!r} as one tensor, and only a part of its layers is quantized or has it: {names}; "
            "quantize all of them, or none"
        )
    joined = found[0] if len(found) == 1 else torch.cat(found)
    return torch.cat(joined.chunk(2)[::-1]) if place.swapped and joined.dim() else joined


def _places(layout: Layout, names: Collection[str]) -> list[tuple[str, _Place]]:
    """The place of each module or tensor of diffusers that the tables name."""
    found = []
    for target, sources in layout.top.items():
        found += _rows(target, sources, target in layout.swapped)
    for ours, (theirs, table) in layout.blocks.items():
        held = [name.removeprefix(f"{ours}.").partition(".")[0] for name in names if name.startswith(f"{ours}.")]
        numbers = sorted({int(number) for number in held if number.isdecimal()})
        for number in numbers:
            for target, sources in table.items():
                swapped = target in layout.swapped_in_last and number == numbers[-1]
                inside = (sources,) if isinstance(sources, str) else sources
                full = tuple(f"{ours}.{number}.{source}" for source in inside)
                found += _rows(f"{theirs}.{number}.{target}", full, swapped)
    return found


def _rows(target: str, sources: str | tuple[str, ...], swapped: bool) -> list[tuple[str, _Place]]:
    names = (sources,) if isinstance(sources, str) else sources
    return [(name, _Place(target, part, len(names), swapped)) for part, name in enumerate(names)]
