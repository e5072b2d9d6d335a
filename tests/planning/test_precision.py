from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxquant.errors import ConfigurationError
from fxquant.planning.precision import FLOAT, Precision, precision_of, roles
from tests.support import captured
from tests.tiny import inputs, make_dit


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("w4a8", Precision(4, 8)),
        ("w8a16", Precision(8, None)),
        ("w4a16-g64", Precision(4, None, 64)),
        ("float", FLOAT),
    ],
)
def test_text(text: str, precision: Precision) -> None:
    assert Precision.parse(text) == precision
    assert str(precision) == text


@given(st.integers(2, 8), st.none() | st.integers(2, 8), st.integers(0, 512))
def test_every_precision_prints_and_parses(weight: int, activation: int | None, group: int) -> None:
    precision = Precision(weight, activation, group)
    assert Precision.parse(str(precision)) == precision


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w4", "'w4' is not a precision; write w4a8"),
        ("W4A8", "is not a precision"),
        ("w1a8", "1 bits for weights: 2 to 8"),
        ("w16a8", "16 bits for weights"),
        ("w4a9", "9 bits for activations"),
        ("", "is not a precision"),
        ("w04a8", "'w04a8' is not a precision; write w4a8$"),
        ("w4a08", "write w4a8$"),
        ("w4a016", "write w4a16$"),
        ("w4a8-g064", "write w4a8-g64$"),
        ("w4a8-g0", "write w4a8$"),
        ("w\u0664a8", "write w4a8$"),
        ("W4A8", r"Did you mean w4a8\?$"),
        ("w4 a8", "is not a precision"),
        ("w4a4g32", r"Did you mean w4a4-g32\?$"),
        ("w4a4-32", r"Did you mean w4a4-g32\?$"),
        ("w4a4_g32", r"Did you mean w4a4-g32\?$"),
        ("w4", r"Did you mean w4a4 or w4a16\?$"),
        ("wnvfp4", r"Did you mean wnvfp4anvfp4 or wnvfp4a16\?$"),
        ("wnf4", r"Did you mean wnf4a16\?$"),
        ("nvfp4", r"Did you mean wnvfp4anvfp4 or wnvfp4a16\?$"),
        ("wfp4a8", r"Formats by name: .*nvfp4$"),
        ("w16a16", "float for a layer that stays float$"),
    ],
)
def test_what_is_no_precision(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Precision.parse(text)


def test_contradictions() -> None:
    with pytest.raises(ConfigurationError, match="quantized activations need quantized weights"):
        Precision(None, 8)
    with pytest.raises(ConfigurationError, match="a group of -1 input channels"):
        Precision(4, 8, -1)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("default", {"block": "w4a8", "adaln": "w4a8", "embedder": "w8a16", "patch": "float", "final": "float"}),
        ("blocks", {"block": "w4a8", "adaln": "w4a8", "embedder": "float", "patch": "float", "final": "float"}),
        ("all", dict.fromkeys(("block", "adaln", "embedder", "patch", "final"), "w4a8")),
    ],
)
def test_precision_by_role(layers: str, expected: dict[str, str]) -> None:
    found = {role: str(precision_of("x", role, Precision(4, 8), layers, "")) for role in expected}
    assert found == expected


def test_overrides_come_first() -> None:
    overrides = "blocks.0.*=w8a8;blocks.*.to_q=float"
    for name, expected in (("blocks.0.to_q", "w8a8"), ("blocks.1.to_q", "float"), ("blocks.1.to_k", "w4a8")):
        assert str(precision_of(name, "block", Precision(4, 8), "default", overrides)) == expected


def test_roles_of_a_dit() -> None:
    found = roles(captured(make_dit(), timestep_name="timestep", **inputs()).module.graph)
    block = "transformer_blocks.0"
    assert found == {
        "pos_embed.proj": "patch",
        f"{block}.norm1.emb.timestep_embedder.linear_1": "embedder",
        f"{block}.norm1.emb.timestep_embedder.linear_2": "embedder",
        f"{block}.norm1.emb.class_embedder.embedding_table": "embedder",
        f"{block}.norm1.linear": "adaln",
        **{f"{block}.attn1.{name}": "block" for name in ("to_q", "to_k", "to_v", "to_out.0")},
        **{f"{block}.ff.net.{name}": "block" for name in ("0.proj", "2")},
        **{name: found[name] for name in found if name.startswith("proj_out")},
        **{name: found[name] for name in found if "emb" in name},
    }
    assert found["proj_out_2"] == "final"


class Cross(nn.Module):
    """Keys come from text, which an embedder prepares."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.pooled = nn.Linear(6, 4), nn.Linear(6, 4)
        self.blocks = nn.ModuleList([nn.ModuleDict({n: nn.Linear(4, 4) for n in ("q", "k", "shift")})])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        (block,) = self.blocks
        keys, pooled = block["k"](F.gelu(self.text(text))), F.silu(self.pooled(text.mean(1)))
        return (block["q"](x) + block["shift"](pooled)[:, None]) @ keys.transpose(1, 2)


def test_keys_of_cross_attention_are_in_the_block() -> None:
    found = roles(captured(Cross(), x=torch.randn(2, 3, 4), text=torch.randn(2, 5, 6)).module.graph)
    assert found == {
        "text": "embedder",
        "pooled": "embedder",
        "blocks.0.q": "block",
        "blocks.0.k": "block",
        "blocks.0.shift": "adaln",
    }


class History(nn.Module):
    """Earlier frames as tokens beside the others: a patch may be as large as they are."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.history = nn.Conv2d(2, 4, patch, stride=patch)
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: Tensor, frames: Tensor) -> Tensor:
        tokens = self.history(frames).flatten(2).transpose(1, 2)
        return self.blocks[0](torch.cat([tokens, x], dim=1))


@pytest.mark.parametrize("patch", [2, 4])
def test_a_convolution_with_one_position_makes_tokens_too(patch: int) -> None:
    module = captured(History(patch), x=torch.randn(2, 3, 4), frames=torch.randn(2, 2, 4, 4)).module
    assert roles(module.graph)["history"] == "embedder"


class Videos(nn.Module):
    """Samples in a list, as videos of different lengths are given."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])

    def forward(self, x: list[Tensor]) -> Tensor:
        return self.blocks[0](torch.cat([self.patch(item) for item in x], dim=0))


def test_all_items_of_a_list_of_samples_are_samples() -> None:
    module = captured(Videos(), [torch.randn(3, 4), torch.randn(5, 4), torch.randn(2, 4)]).module
    assert roles(module.graph) == {"patch": "patch", "patch@2": "patch", "patch@3": "patch", "blocks.0.0": "block"}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.ada = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return h + F.gelu(self.fc1(h) + self.ada(c)[:, None])


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.out = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        q, k = self.q(h)[:, None], self.k(context)[:, None]
        return self.out[0](F.scaled_dot_product_attention(q, k, k)[:, 0])


class ByName(nn.Module):
    """Blocks that are attributes, with modules before and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.time = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 4)), nn.Linear(1, 4)
        self.tokens = nn.Parameter(torch.randn(1, 2, 4))
        self.block_0, self.mid_block = Residual(), nn.ModuleDict({"attn": Attend(), "cross": Attend()})
        self.head = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        c = F.silu(self.time(timestep[:, None].float()))
        h = self.block_0(self.patch(sample) + torch.linspace(0, 1, 4), c)
        h = h + self.mid_block["attn"](h, h)
        h = h + self.mid_block["cross"](h, self.tokens.expand(h.shape[0], -1, -1))
        return self.head(h)


class LongSkip(ByName):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample + super().forward(sample, timestep)


class Wrapped(nn.Module):
    """The same within a module that adds a long connection of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = LongSkip()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.net(sample, timestep)


@pytest.mark.parametrize(("model", "prefix"), [(ByName, ""), (Wrapped, "net.")])
def test_blocks_are_known_by_what_they_do(model: type[nn.Module], prefix: str) -> None:
    found = roles(captured(model(), sample=torch.randn(2, 5, 3), timestep=torch.tensor([1, 2])).module.graph)
    attention = {"q": "block", "k": "block", "out.0": "block"}
    assert found == {
        f"{prefix}{name}": role
        for name, role in {
            "time": "embedder",
            "patch.0": "patch",
            "patch.2": "patch",
            "block_0.fc1": "block",
            "block_0.ada": "adaln",
            **{f"mid_block.attn.{name}": role for name, role in attention.items()},
            **{f"mid_block.cross.{name}": role for name, role in attention.items()},
            "head.0": "final",
            "head.2": "final",
        }.items()
    }
