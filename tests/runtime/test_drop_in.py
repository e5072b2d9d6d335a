"""What a captured model hands on of the original: every public attribute works, or is refused by name."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import UNet2DConditionLoadersMixin
from torch import Tensor, nn

import fxquant
from fxquant.errors import ConfigurationError, DropInError
from fxquant.runtime.drop_in import Part
from fxquant.runtime.model import GraphModel
from tests.runtime import behaviours
from tests.runtime.behaviours import public, refused
from tests.tiny import calibrate, inputs, make_dit, run
from tests.zoo.models import ENTRIES

MIXINS = (*behaviours.MIXINS, UNet2DConditionLoadersMixin)
WORKS = {
    "cache_context", "compile_repeated_blocks", "config", "config_name", "device", "disable_cache", "dtype",
    "enable_cache", "enable_group_offload", "extract_init_dict",
    "from_config", "from_pretrained", "get_config_dict", "get_memory_footprint", "has_compatibles",
    "ignore_for_config", "is_cache_enabled", "is_gradient_checkpointing", "load_config", "num_parameters",
    "push_to_hub", "register_to_config", "save_config", "save_pretrained", "text_encoder_name", "to_json_file",
    "to_json_string", "unet_name",
}  # fmt: skip
"""What of diffusers' classes works beside what torch.nn.Module has."""

REFUSED = {
    "load_lora_adapter": "fuse it there",
    "set_adapters": "fuse it there",
    "disable_lora": "fuse it there",
    "unload_lora": "fuse it there",
    "add_adapter": "fuse it there",
    "fuse_qkv_projections": "fuse or separate the projections of the float model",
    "unfuse_qkv_projections": "fuse or separate the projections of the float model",
    "attn_processors": "attention was captured",
    "set_attn_processor": "attention was captured",
    "set_attention_backend": "attention was captured",
    "enable_xformers_memory_efficient_attention": "attention was captured",
    "enable_layerwise_casting": "Leave it out",
    "enable_parallelism": "one device",
    "enable_gradient_checkpointing": "for training",
    "from_single_file": "Call it on the class",
    "dequantize": "the float model is the one",
}


@pytest.fixture(scope="module")
def quantized() -> GraphModel:
    model = make_dit()
    return fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model), measure=0)


def traced(model: nn.Module) -> GraphModel:
    """A stand-in that captures nothing until it is called."""
    return fxquant.trace(model.eval(), timestep=None)


class Everything(*MIXINS, diffusers.ConfigMixin):  # type: ignore[misc]
    """A model with all that diffusers offers."""

    @diffusers.configuration_utils.register_to_config
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


@pytest.mark.parametrize("cls", MIXINS, ids=lambda cls: cls.__name__)
def test_every_attribute_of_the_classes_of_diffusers(cls: type) -> None:
    made, model = traced(Everything()), Everything()
    for name in public(cls):
        message = refused(made, name)
        if name in WORKS:
            assert message is None, message
        else:
            assert message is not None, f"{name} is handed on"
            assert name in message
    assert vars(made.architecture.skeleton).keys() == vars(model.eval()).keys()


def test_the_table_of_the_documentation() -> None:
    """If it fails: ``python -m tests.runtime.behaviours`` writes the table again."""
    assert behaviours.PAGE.read_text(encoding="utf-8").partition(behaviours.HEADING)[2].endswith(behaviours.table())


@pytest.mark.parametrize("name", REFUSED)
def test_what_to_do_instead(name: str) -> None:
    made = traced(Everything())
    with pytest.raises(DropInError, match=f"a captured model has no {name}: .*{REFUSED[name]}"):
        getattr(made, name)()


@pytest.mark.parametrize("cls", sorted({getattr(diffusers, e.name) for e in ENTRIES if e.make is None}, key=str))
def test_every_attribute_of_the_models_of_the_zoo(cls: type) -> None:
    """What they define themselves runs on a view that changes nothing; what they inherit is on a list."""
    entry = next(entry for entry in ENTRIES if entry.name == cls.__name__)
    with torch.random.fork_rng():
        made = traced(cls(**entry.config))
    skeleton = made.architecture.skeleton
    before = {name: dict(vars(module)) for name, module in skeleton.named_modules()}
    own = {name for name in public(cls) if not any(hasattr(mixin, name) for mixin in (*MIXINS, diffusers.ConfigMixin))}
    for name in public(cls):
        message = refused(made, name)
        assert (message is None) == (name in WORKS or name in own), f"{name}: {message}"
    for name in own & {"set_default_attn_processor", "enable_forward_chunking", "disable_forward_chunking"}:
        with pytest.raises(DropInError, match=name):
            getattr(made, name)()
    for name, module in skeleton.named_modules():
        assert vars(module).keys() == before[name].keys()


# --- values ---


def test_values_weights_and_parts(quantized: GraphModel) -> None:
    model = make_dit()
    assert quantized.inner_dim == model.inner_dim
    assert quantized.config.num_layers == 1
    assert len(quantized.transformer_blocks) == 1
    (block,) = quantized.transformer_blocks
    assert block.attn1.heads == quantized.transformer_blocks[0].attn1.heads == 2
    assert [type(part) for part in quantized.transformer_blocks[:1]] == [Part]
    assert not hasattr(quantized, "no_such_attribute")
    assert getattr(quantized, "_hf_hook", None) is None
    with pytest.raises(DropInError, match=r"no transformer_blocks\.0\.attn1\.to_q\.weight: its weights are in"):
        block.attn1.to_q.weight
    assert not hasattr(block.attn1.to_q, "weight")
    with pytest.raises(DropInError, match="to_q"):
        block.attn1.to_q(torch.ones(1, 16))
    with pytest.raises(DropInError, match=r"register_forward_hook: a graph calls no submodules"):
        block.register_forward_hook(print)
    for change in (lambda: setattr(block.attn1, "heads", 1), lambda: delattr(block.attn1, "heads")):
        with pytest.raises(DropInError, match=r"attn1\.heads"):
            change()
    assert block.attn1.heads == 2


def test_setting_what_the_original_has_is_refused(quantized: GraphModel) -> None:
    for name, value in (("transformer_blocks", nn.ModuleList()), ("gradient_checkpointing", True), ("inner_dim", 3)):
        with pytest.raises(DropInError, match=f"no {name}: it would not change what was captured"):
            setattr(quantized, name, value)
    quantized.a_note_of_ones_own = 3
    assert quantized.a_note_of_ones_own == 3
    del quantized.a_note_of_ones_own


class Own(nn.Module):
    """A model with helpers that a pipeline calls, as its author wrote them."""

    def __init__(self) -> None:
        super().__init__()
        self.axes, self.scale, self.names = [2, 2], 1.0, {"cat": 1}
        self.proj = nn.Linear(4, 4)
        self.rope = Rope()
        self.extra = None
        self.activation = torch.relu

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.proj(x) * self.scale + timestep[:, None]

    def positions(self, size: int) -> Tensor:
        return self.rope.positions(size) * len(self.axes)

    def rescaled(self, scale: float) -> None:
        self.scale = scale

    def projected(self, x: Tensor) -> Tensor:
        return self.proj(x)

    def guided(self, x: Tensor, timestep: Tensor, scale: float) -> Tensor:
        with_, without = self.forward(x, timestep), self(torch.zeros_like(x), timestep)
        return without + scale * (with_ - without)

    @property
    def area(self) -> int:
        return self.axes[0] * self.axes[1]

    @staticmethod
    def halved(x: int) -> int:
        return x // 2

    @classmethod
    def made(cls) -> Own:
        return cls()


class Rope(nn.Module):
    """Holds no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 3

    def positions(self, size: int) -> Tensor:
        return torch.arange(0, size, self.step)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.step


def test_methods_of_a_model_of_ones_own() -> None:
    made = traced(Own())
    assert made.positions(7).tolist() == [0, 6, 12]
    assert made.rope.positions(7).tolist() == [0, 3, 6]
    assert made.rope(torch.ones(2)).tolist() == [3, 3]
    assert (made.area, made.halved(9), made.extra, made.scale) == (4, 4, None, 1.0)
    with pytest.raises(DropInError, match=r"no rescaled: .*It would use or change missing parts: .* no scale"):
        made.rescaled(2.0)
    with pytest.raises(DropInError, match=r"no projected: .* no proj\.weight"):
        made.projected(torch.ones(1, 4))
    with pytest.raises(DropInError, match="made"):
        made.made()
    with pytest.raises(DropInError, match="activation"):
        made.activation
    made.axes.append(5)
    made.names["dog"] = 2
    assert (made.axes, made.names, made.scale) == ([2, 2], {"cat": 1}, 1.0)


def test_a_method_that_calls_the_model_runs_its_graphs() -> None:
    model = Own().eval()
    made, x = fxquant.trace(model, timestep="timestep"), torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(made.guided(x, torch.ones(2), 3.0), model.guided(x, torch.ones(2), 3.0))
    assert len(made.captured) == 1


# --- hooks and modes ---


def test_hooks_of_diffusers_on_the_model_are_refused(quantized: GraphModel) -> None:
    registry = diffusers.hooks.HookRegistry
    with pytest.raises(DropInError, match="no _diffusers_hook: hooks of diffusers run around modules"):
        registry.check_if_exists_or_initialize(quantized)


def test_a_hook_of_torch_runs(quantized: GraphModel) -> None:
    seen: list[Any] = []
    handle = quantized.register_forward_hook(lambda *call: seen.append(call))
    run(quantized)
    handle.remove()
    assert len(seen) == 1


def test_modes_and_devices_that_there_are_not(quantized: GraphModel) -> None:
    with pytest.raises(ConfigurationError, match="no training mode"):
        quantized.train()
    assert not quantized.training
    quantized.train(False)
    for lost in (lambda: quantized.to("meta"), lambda: quantized.to_empty(device="cpu")):
        with pytest.raises(ConfigurationError, match=r"lose"):
            lost()
    assert torch.isfinite(quantized(**inputs()).sample).all()
