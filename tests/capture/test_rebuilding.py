"""Whatever is saved is loaded as the same function from its class and config, or refused before it is written."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

import fxquant
from fxquant.capture.rebuilding import obstacle
from fxquant.errors import CheckpointError, ConfigurationError, DropInError, PortabilityWarning, QualityWarning
from fxquant.runtime.model import GraphModel
from tests.tiny import calibrate, inputs, make_dit, run
from tests.traces import traced_once
from tests.zoo.models import ENTRIES

X, T = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 9.0])


@pytest.fixture(scope="module", autouse=True)
def shared_traces() -> Iterator[None]:
    """Unlike other tests of this folder, these compare traces of models that differ in what identifies a trace."""
    with traced_once():
        yield


class Configured(diffusers.ModelMixin, diffusers.ConfigMixin):
    """A model whose function depends on its config."""

    @register_to_config
    def __init__(self, factors: Any = None, compute: Any = None, options: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(8, 8)
        self.factor = (factors or {}).get(0, 1.0) * (2.0 if isinstance(compute, torch.dtype) else 1.0)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.proj(x) * self.factor + timestep[:, None]


class Plain(nn.Module):
    """A model of one's own without ``from_config``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = config
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.proj(x) + timestep[:, None]


def compiled(model: nn.Module) -> GraphModel:
    return fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=lambda: model(X, T), measure=0)


# --- configs ---


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"factors": {0: 3.0}}, "the key 0 of factors is a int"),
        ({"factors": {(1, 2): 3.0}}, r"the key \(1, 2\) of factors"),
        ({"compute": torch.float32}, "compute is a dtype"),
        ({"options": [1, {"path": Path("a")}]}, r"options\[1\]\.path is a PosixPath"),
        ({"options": {1, 2}}, "options is a set"),
        ({"options": 1 + 2j}, "options is a complex"),
        ({"options": b"text"}, "options is a bytes"),
    ],
)
def test_a_config_that_json_changes_is_told_before_calibration_and_refused(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    model = Configured(**config).eval()
    with pytest.raises(PortabilityWarning, match=said), warnings.catch_warnings():
        warnings.simplefilter("error", PortabilityWarning)
        fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=lambda: pytest.fail("too late"))
    with pytest.warns(PortabilityWarning, match="needs_model=True"):
        quantized = compiled(model)
    with pytest.raises(CheckpointError, match=f"{said}.*needs_model=True"):
        fxquant.save(quantized, tmp_path / "model")
    with pytest.raises(CheckpointError, match=said):
        quantized.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    fxquant.save(quantized, tmp_path / "model", needs_model=True)
    with pytest.raises(CheckpointError, match=f"is read with the float model.*{said}"):
        fxquant.load(tmp_path / "model", model=Configured)
    loaded = fxquant.load(tmp_path / "model", model=Configured(**config).eval())
    assert torch.equal(loaded(X, T), quantized(X, T))


@pytest.mark.parametrize(
    "options",
    [None, True, 3, 1e-7, math.nan, math.inf, "text", (1, 2), [[1], (2, {"a": (3,)})], {"a": {"b": None}}, ""],
)
def test_a_config_that_json_keeps(options: Any) -> None:
    assert obstacle(Configured(options=options), "timestep") is None


@dataclasses.dataclass
class Config:
    width: int = 8


@pytest.mark.filterwarnings("error::fxquant.errors.PortabilityWarning")
@pytest.mark.parametrize(
    "config", [Config(), types.SimpleNamespace(width=8), [8], {"dtype": torch.float32, 1: {2}}, None]
)
def test_whatever_the_config_of_a_model_of_ones_own(tmp_path: Path, config: Any) -> None:
    """Its class makes none from a config, so that loading takes an instance anyway."""
    quantized = compiled(Plain(config).eval())
    fxquant.save(quantized, tmp_path / "model")
    loaded = fxquant.load(tmp_path / "model", model=Plain(config).eval())
    assert torch.equal(loaded(X, T), quantized(X, T))
    fxquant.save(loaded, tmp_path / "again")
    with pytest.raises(CheckpointError, match="pass its class or an instance"):
        fxquant.load(tmp_path / "model")


# --- what was done to the model ---


def scaled(model: nn.Module) -> None:
    model.transformer_blocks[0].attn1.rescale_output_factor = 2.0


def replaced(model: nn.Module) -> None:
    model.transformer_blocks[0].ff = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16)).eval()


def processed(model: nn.Module) -> None:
    class Twice(diffusers.models.attention_processor.AttnProcessor2_0):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().__call__(*args, **kwargs)

    model.transformer_blocks[0].attn1.set_processor(Twice())


def patched(model: nn.Module) -> None:
    def twice(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * type(self).forward(self, *args, **kwargs)

    network = model.transformer_blocks[0].ff
    network.forward = types.MethodType(twice, network)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (scaled, r"transformer_blocks\.0\.attn1 was changed"),
        pytest.param(processed, r"transformer_blocks\.0\S* was changed", marks=pytest.mark.exhaustive),
        (patched, r"transformer_blocks\.0\S* was changed"),
        (replaced, r"makes no tensor 'transformer_blocks\.0\.ff\.0\.weight'"),
    ],
)
@pytest.mark.filterwarnings("ignore::fxquant.errors.PortabilityWarning")
def test_a_model_that_was_changed_after_it_was_constructed(
    tmp_path: Path, change: Callable[[nn.Module], None], said: str
) -> None:
    def made() -> nn.Module:
        model = make_dit()
        torch.manual_seed(3)
        change(model)
        return model

    model = made()
    quantized = fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model), measure=0)
    with pytest.raises(CheckpointError, match=said):
        fxquant.save(quantized, tmp_path / "model")
    fxquant.save(quantized, tmp_path / "model", needs_model=True)
    with pytest.raises(CheckpointError, match="is read with the float model"):
        fxquant.load(tmp_path / "model")
    loaded = fxquant.load(tmp_path / "model", model=made())
    assert torch.equal(run(loaded), run(quantized))
    with pytest.raises(CheckpointError, match=said):
        fxquant.save(loaded, tmp_path / "again")


@pytest.mark.filterwarnings("ignore::fxquant.errors.PortabilityWarning")
def test_fused_projections(tmp_path: Path) -> None:
    entry = next(entry for entry in ENTRIES if entry.variant == "-fused" and "Flux" in entry.name)
    assert "to_qkv.weight', which was added later; unfuse_qkv_projections" in str(obstacle(entry.model(), "timestep"))
    model = entry.model()
    model.unfuse_qkv_projections()
    told = obstacle(model, "timestep")
    assert told is None or "to_qkv" in told  # diffusers may leave the fused weights where they are.


class BaseTunerLayer(nn.Module):
    """What peft's layers derive from."""


BaseTunerLayer.__module__ = "peft.tuners.tuners_utils"


class Adapted(BaseTunerLayer):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.lora_A = base, nn.Linear(16, 2, bias=False)
        self.lora_B = nn.Linear(2, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_an_adapter_is_refused_before_calibration() -> None:
    model = make_dit()
    model.transformer_blocks[0].attn1.to_q = Adapted(model.transformer_blocks[0].attn1.to_q)
    with pytest.raises(ConfigurationError, match=r"attn1\.to_q.*pipe\.fuse_lora\(\).*unload_lora_weights"):
        fxquant.compile(model.eval(), recipe="rtn-w8a8", calibrate=lambda: pytest.fail("too late"))


# --- tied modules ---


class Tied(diffusers.ModelMixin, diffusers.ConfigMixin):
    """A model in which one module has two names, and one weight two owners."""

    @register_to_config
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(width, width)
        self.second = self.first
        self.third = nn.Linear(width, width)
        self.third.weight = self.first.weight

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu()).relu()) + timestep[:, None].to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["rtn-w8a8", "ptq4dit-w4a8"])
def test_tied_modules(tmp_path: Path, dtype: torch.dtype, recipe: str) -> None:
    model = Tied().eval().to(dtype)
    with torch.no_grad():
        quantized = fxquant.compile(
            model, recipe=recipe, layers="all", calibrate=lambda: [model(X.to(dtype), T), model(X.to(dtype), T + 5)]
        )
        fxquant.save(quantized, tmp_path / "tied")
        for given in (Tied, Tied().eval().to(dtype)):
            loaded = fxquant.load(tmp_path / "tied", model=given)
            assert torch.equal(loaded(X.to(dtype), T), quantized(X.to(dtype), T))


def test_a_checkpoint_of_another_version_of_the_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_dit()
    quantized = fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model), measure=0)
    fxquant.save(quantized, tmp_path / "model")
    init = diffusers.DiTTransformer2DModel.__init__

    @functools.wraps(init)
    def newer(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.transformer_blocks.append(copy.deepcopy(self.transformer_blocks[0]))

    monkeypatch.setattr(diffusers.DiTTransformer2DModel, "__init__", newer)
    with pytest.raises(CheckpointError) as caught:
        fxquant.load(tmp_path / "model")
    assert "another version of its class" in str(caught.value)
    assert "alibrate" not in str(caught.value)


def test_saving_needs_no_weights_and_changes_nothing(tmp_path: Path) -> None:
    model = make_dit()
    quantized = fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model), measure=0)
    expected, state = quantized(**inputs()).sample, torch.get_rng_state()
    fxquant.save(quantized, tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(quantized(**inputs()).sample, expected)


# --- tensors in attributes ---


class Maker:
    """A plain object that holds tables, and another one that does."""

    def __init__(self, inner: Maker | None = None) -> None:
        self.rows = torch.arange(8.0).cos()
        self.more = {"sin": (torch.arange(8.0).sin(), [torch.arange(8.0).sqrt()])}
        self.inner = inner

    def __call__(self) -> Tensor:
        sin, (root,) = self.more["sin"]
        return self.rows + sin + root + (0 if self.inner is None else self.inner())


class Tables(diffusers.ModelMixin, diffusers.ConfigMixin):
    """A model that keeps tensors in attributes of many kinds, and no buffer."""

    @register_to_config
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(width, width)
        self.plain = torch.linspace(0, 1, width)
        self._hidden = torch.linspace(1, 2, width)
        self._hidden_list = [torch.linspace(2, 3, width)]
        self.pair = torch.linspace(3, 4, 2 * width).chunk(2)
        self.turns = torch.polar(torch.ones(4), torch.arange(4.0))
        self.again = {"first": self.plain}
        self.maker = Maker(Maker())
        self.makers = [Maker(), (Maker(Maker()),)]
        self.weights = [self.proj.weight]
        self.positions = torch.arange(width)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = self.proj(x) + self.plain * self.again["first"] + self._hidden.pow(2) + self._hidden_list[0].exp()
        x = x * self.pair[0] - self.pair[1] + self.maker() - 2 * self.makers[0]() * self.makers[1][0]()
        turned = torch.view_as_real(torch.view_as_complex(x.float().reshape(-1, 4, 2)) * self.turns).flatten(1)
        return turned.to(x.dtype) + self.weights[0].sum() + timestep[:, None] + self.positions


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_tensors_in_attributes(tmp_path: Path, default: torch.dtype) -> None:
    """A class makes them in the default dtype, which was another one where the model was made."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        model = Tables().eval()
    finally:
        torch.set_default_dtype(before)
    model.turns = model.turns.to(torch.complex64)
    model.float()
    quantized = compiled(model)
    fxquant.save(quantized, tmp_path / "model")
    loaded = fxquant.load(tmp_path / "model", model=Tables)
    for x, timestep in ((X, T), (torch.cat([X, 2 * X]), torch.arange(4.0)), (X[:, None].repeat(1, 3, 1)[:, 0], T)):
        found = loaded(x, timestep)
        assert torch.equal(found, quantized(x, timestep))
    for name in ("plain", "pair", "again"):  # Not zeros.
        with pytest.raises(DropInError):
            getattr(loaded, name)
    torch.testing.assert_close(quantized(X, T), model(X, T), rtol=0.05, atol=0.5)


def test_a_table_of_another_dtype_than_the_class_makes(tmp_path: Path) -> None:
    model = Tables().eval()
    model.turns = model.turns.to(torch.complex128)
    with pytest.raises(CheckpointError, match=r"tensor 'turns' is complex128\[4\], and its class makes complex64\[4\]"):
        fxquant.save(compiled(model), tmp_path / "model")


# --- graphs of one batch size ---


class Fixed(diffusers.ModelMixin, diffusers.ConfigMixin):
    """A model whose graph serves one batch size, and whose function depends on its config."""

    @register_to_config
    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.factor = nn.Linear(8, 8), factor

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.proj(x).reshape(2, 8) * self.factor + timestep[:, None]


def test_a_graph_of_one_batch_size_is_compared_on_loading(tmp_path: Path) -> None:
    quantized = compiled(Fixed().eval())
    assert quantized.captured[0].static_batch
    fxquant.save(quantized, tmp_path / "model")
    loaded = fxquant.load(tmp_path / "model", model=Fixed)
    assert loaded.captured[0].digest == quantized.captured[0].digest
    assert torch.equal(loaded(X, T), quantized(X, T))
    other = Fixed(2.0).eval()
    with pytest.warns(QualityWarning, match="computes something else than when it was quantized"):
        fxquant.load(tmp_path / "model", model=other)


def test_arguments_without_keywords(tmp_path: Path) -> None:
    quantized = compiled(Fixed(2.0).eval())
    fxquant.save(quantized, tmp_path / "model")
    assert torch.equal(fxquant.load(tmp_path / "model", model=Fixed)(X, T), quantized(X, T))


@pytest.mark.parametrize(("name", "advised"), [("exploration", False), ("lora_scale", True), ("down_lora", True)])
def test_advice_on_tensors_that_were_added(name: str, advised: bool) -> None:
    model = Fixed().eval()
    model.register_parameter(name, nn.Parameter(torch.ones(1)))
    assert ("fuse_lora" in str(obstacle(model, "timestep"))) == advised
