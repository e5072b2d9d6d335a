"""Compiling in pieces: how often blocks are compiled, that results stay the same, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxquant
from fxquant.errors import ConfigurationError, SpeedWarning
from fxquant.numerics.sqnr import sqnr_db
from fxquant.runtime.model import GraphModel
from fxquant.runtime.pieces import pieces, repeated
from tests.tiny import calibrate, inputs, make_dit, run

pytestmark = pytest.mark.usefixtures("torchao_on_any_processor")
LAYERS = 3
MANY_STEPS = range(50, 1000, 60)  # So many that htg makes several groups.


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def quantized(recipe: str, backend: str, **options: Any) -> GraphModel:
    model = make_dit(layers=LAYERS)
    return fxquant.compile(model, recipe=recipe, backend=backend, calibrate=calibrate(model, **options), measure=0)


@pytest.fixture(scope="module")
def plain() -> GraphModel:
    return quantized("ptq4dit-w8a8", "fake-quant")


def compiled(model: GraphModel, backend: str = "eager", **options: Any) -> CompileCounterWithBackend:
    counter = CompileCounterWithBackend(backend)
    model.compile_repeated_blocks(backend=counter, fullgraph=True, **options)
    return counter


def call(model: nn.Module, batch: int = 4, size: int = 8) -> Tensor:
    return run(model, batch=batch, size=size, timestep=None, seed=batch)


# --- one compilation ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "backend", "options"),
    [
        # That backend is compiled in all other tests of this file, with the compiler `eager`.
        pytest.param("ptq4dit-w8a8", "fake-quant", {}, marks=pytest.mark.exhaustive),
        pytest.param("htg-w8a8", "fake-quant", {"steps": MANY_STEPS}, marks=pytest.mark.exhaustive),
        ("htg-w8a8", "native", {"steps": MANY_STEPS}),
        pytest.param("dynamic-w4a8", "native", {}, marks=pytest.mark.exhaustive),
        ("ptq4dit-w8a8", "torchao", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore::fxquant.errors.SpeedWarning")
def test_all_blocks_and_batch_sizes_take_one_compilation(recipe: str, backend: str, options: Any) -> None:
    """Also where tables over timesteps have another number of rows in each block."""
    if backend == "torchao":
        pytest.importorskip("torchao")
    eager = quantized(recipe, backend, **options)
    made = copy.copy(eager)
    counter = compiled(made, "aot_eager")
    for batch in (4, 1, 2):
        assert torch.equal(call(made, batch), call(eager, batch))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_dynamic_sizes_take_one_compilation(plain: GraphModel) -> None:
    made = copy.copy(plain)
    counter = compiled(made, dynamic=True)  # With the rest of the compiler: test_inductor.
    for batch, size in ((2, 8), (3, 4), (2, 12)):
        assert torch.equal(call(made, batch, size), call(plain, batch, size))
    assert counter.frame_count == 1


@pytest.mark.parametrize(("dynamic", "expected"), [(None, 2), (False, 3)])
def test_other_choices_of_dynamic_are_those_of_torch(plain: GraphModel, dynamic: bool | None, expected: int) -> None:
    """By default the second size opens the sizes; with False each size is compiled."""
    made = copy.copy(plain)
    counter = compiled(made, dynamic=dynamic)
    for size in (8, 4, 12):
        assert torch.equal(call(made, 2, size), call(plain, 2, size))
    assert counter.frame_count == expected


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", pytest.param("fake-quant", marks=pytest.mark.exhaustive)])
def test_inductor(backend: str) -> None:
    eager = quantized("htg-w8a8", backend)
    made = copy.copy(eager)
    counter = compiled(made, "inductor", dynamic=True)
    for batch, size in ((4, 8), (1, 4)):
        assert sqnr_db(call(eager, batch, size), call(made, batch, size)) > 45.0
    assert counter.frame_count == 1


# --- the life of a model ---


def test_weights_that_change_are_read(plain: GraphModel) -> None:
    """Tensors are inputs, so neither a state dict nor a copy compiles again or keeps old weights."""
    made = copy.deepcopy(plain)
    counter = compiled(made)
    call(made)
    state = {name: value.clone() for name, value in made.state_dict().items()}
    bias = next(name for name in state if name.endswith("proj_out_2.bias"))
    inner = next(name for name in state if name.endswith("transformer_blocks.2.attn1.to_out.0.bias"))
    for name in (bias, inner):
        state[name] += 1.0
    made.load_state_dict(state)
    changed = call(made)
    assert not torch.equal(changed, call(plain))
    again = copy.deepcopy(plain)
    again.load_state_dict(state)
    assert torch.equal(changed, call(again))
    assert counter.frame_count == 1


def test_a_copy_keeps_the_choice(plain: GraphModel) -> None:
    made = copy.deepcopy(plain)
    counter = compiled(made)
    twin = copy.deepcopy(made)
    assert torch.equal(call(twin), call(plain))
    assert counter.frame_count == 1


def test_compiling_the_whole_model_later_wins(plain: GraphModel) -> None:
    made = copy.copy(plain)
    inner, outer = compiled(made), CompileCounterWithBackend("eager")
    made.compile(backend=outer)
    assert torch.equal(call(made), call(plain))
    assert (inner.frame_count, outer.frame_count) == (0, 1)


def test_a_traced_model_keeps_its_gradients() -> None:
    model = make_dit(layers=2)
    traced = fxquant.trace(make_dit(layers=2))
    counter = compiled(traced, "aot_eager")
    traced(**inputs()).sample.sum().backward()
    model(**inputs()).sample.sum().backward()
    name = "transformer_blocks.1.attn1.to_q.weight"
    found = dict(traced.graphs[0].named_parameters())[name].grad
    assert torch.allclose(found, dict(model.named_parameters())[name].grad, rtol=1e-3, atol=1e-6)
    assert counter.frame_count == 1


def test_a_nan_stays_in_its_sample(plain: GraphModel) -> None:
    made, given = copy.copy(plain), inputs()
    compiled(made)
    given["hidden_states"][1, 0, 0, 0] = float("nan")
    with torch.no_grad():
        bad = made(**given).sample.flatten(1).isnan().any(1)
    assert bad.tolist() == [False, True, False, False]


class Picky(nn.Module):
    """Blocks with an op that asks for the batch size while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * timestep[:, None]


class PickyLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.ops.fxquant_test_pieces.picky(x))


def test_what_cannot_be_open_is_compiled_as_torch_does() -> None:
    library = torch.library.Library("fxquant_test_pieces", "FRAGMENT")
    library.define("picky(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("picky", lambda x: x + 1, "CPU")
    torch.library.register_fake(
        "fxquant_test_pieces::picky",
        lambda x: x.new_empty(x.shape) if x.shape[0] > 5 else torch.empty_like(x),
        lib=library,
    )
    model = Picky().eval().requires_grad_(False)
    model.blocks = nn.ModuleList([PickyLinear(4, 4), PickyLinear(4, 4)]).eval().requires_grad_(False)
    traced = fxquant.trace(model)
    counter = compiled(traced, "aot_eager")
    for batch in (2, 3, 1):
        x, timestep = torch.randn(batch, 4), torch.ones(batch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(traced(x, timestep), model(x, timestep))
        assert [w.category for w in caught if w.category is SpeedWarning] == [SpeedWarning] * (batch == 2)
    assert counter.frame_count == 3  # torch compiles for 2, for an open size, and for 1; not once per block.
    library._destroy()


# --- what is refused ---


def test_a_model_without_blocks_that_are_alike_is_refused() -> None:
    model = make_dit(layers=1)
    made = fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model), measure=0)
    with pytest.raises(ConfigurationError, match=r"no two blocks .* model\.compile\(\)"):
        made.compile_repeated_blocks()
    assert torch.isfinite(run(made)).all()


def test_unknown_options_are_refused(plain: GraphModel) -> None:
    with pytest.raises(TypeError, match="speed"):
        copy.copy(plain).compile_repeated_blocks(speed="high")


@pytest.mark.parametrize("first", ["offload", "compile"])
def test_blocks_of_an_offloaded_model_are_compiled(plain: GraphModel, first: str) -> None:
    """The tensors of a block move together, in either order of the two calls."""
    made = copy.deepcopy(plain)
    if first == "offload":
        made.enable_group_offload("cpu")
    counter = compiled(made)
    if first == "compile":
        made.enable_group_offload("cpu")
    assert torch.equal(call(made), call(plain))
    assert counter.frame_count == 1
    made.disable_group_offload()
    assert torch.equal(call(made, 2), call(plain, 2))
    assert counter.frame_count == 1


def test_torchao_warns_that_weights_are_not_frozen() -> None:
    pytest.importorskip("torchao")
    made = quantized("rtn-w8a8", "torchao")
    with pytest.warns(SpeedWarning, match=r"frozen weights.*model\.compile\(\)"):
        made.compile_repeated_blocks()


# --- the pieces ---


def test_the_pieces_of_a_graph(plain: GraphModel) -> None:
    found = pieces(plain.graphs[0], {})
    assert [piece.name for piece in found if piece.block] == [f"transformer_blocks.{i}" for i in range(LAYERS)]
    assert len({piece.key for piece in found if piece.block}) == 1
    assert repeated(found)
    nodes = [node for piece in found for node in piece.nodes]
    assert len(nodes) == len(set(nodes))
    assert set(nodes) == {n for n in plain.graphs[0].graph.nodes if n.op == "call_function"}


def test_layers_of_other_bits_are_not_alike() -> None:
    model = make_dit(layers=3)
    recipe = fxquant.make_recipe("rtn-w8a8").with_options(
        "assign-precision", overrides="transformer_blocks.1.attn1.to_q=w4a8"
    )
    made = fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), measure=0)
    keys = [piece.key for piece in pieces(made.graphs[0], {}) if piece.block]
    assert (keys[0] == keys[2], keys[0] == keys[1]) == (True, False)
