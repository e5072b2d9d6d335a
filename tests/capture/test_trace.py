from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fxquant.api import trace
from fxquant.capture.trace import Architecture
from fxquant.errors import CaptureError, CheckpointError, ConfigurationError
from fxquant.ir.meta import LAYER
from fxquant.ir.products import find_products
from fxquant.ir.tensors import bind, read_tensors, weights_of
from tests.support import captured
from tests.tiny import inputs as dit_inputs
from tests.tiny import make_dit


class Model(nn.Module):
    """Takes what diffusion transformers take: a sample, a timestep, an option, a dict of further conditions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Linear(4, 8), nn.Linear(8, 4)
        self.extra = nn.Linear(2, 8)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, added: dict[str, Any] | None = None, scale: float = 1.0
    ) -> dict[str, Tensor]:
        step = torch.as_tensor(timestep).reshape(-1, 1, 1) / 1000
        hidden = self.into(sample) + step
        if added is not None:
            hidden = hidden + self.extra(added["size"])[:, None] * added.get("strength", 1.0)
        return {"sample": self.out(F.gelu(hidden)) * scale}


def sample(batch: int, tokens: int = 3) -> Tensor:
    return torch.randn(batch, tokens, 4)


@pytest.mark.parametrize("first", [1, *(pytest.param(size, marks=pytest.mark.exhaustive) for size in (2, 4))])
def test_dit_is_bit_exact_at_any_batch_size(first: int) -> None:
    model = make_dit(layers=2)
    traced = trace(model)
    with torch.no_grad():
        for batch in (first, 1, 2, 3, 4, 5):
            inputs = dit_inputs(batch, timestep=None)
            expected = model(**inputs)
            actual = traced(**inputs)
            assert type(actual) is type(expected)
            assert torch.equal(actual.sample, expected.sample)
    assert len(traced.graphs) == 1
    assert traced.captured[0].static_batch is None


@pytest.mark.parametrize("name", ["a\nb", "a\u202eb", "a\x1b[31m", "a" * 401], ids=ascii)
def test_a_module_with_a_name_that_cannot_be_printed_is_refused(name: str) -> None:
    model = nn.Module()
    model.add_module(name, nn.Linear(2, 2))
    with pytest.raises(CaptureError, match="has a name that is very long or holds characters that cannot be printed"):
        Architecture.of(model.eval(), None)


def test_positional_and_keyword_calls_share_a_graph() -> None:
    model = Model().eval()
    traced = trace(model)
    x, step = sample(2), torch.tensor([5, 6])
    with torch.no_grad():
        expected = model(x, step)["sample"]
        for actual in (traced(x, step), traced(sample=x, timestep=step), traced(x, timestep=step, scale=1.0)):
            assert torch.equal(actual["sample"], expected)
    assert len(traced.graphs) == 1


def test_other_shapes_and_options_get_graphs_of_their_own() -> None:
    model = Model().eval()
    traced = trace(model)
    added = {"size": torch.randn(2, 2), "strength": 0.5}
    calls: list[dict[str, Any]] = [
        {"sample": sample(2), "timestep": torch.tensor([5, 6])},
        {"sample": sample(2, tokens=7), "timestep": torch.tensor([5, 6])},
        {"sample": sample(2), "timestep": torch.tensor([5, 6]), "scale": 2.0},
        {"sample": sample(2), "timestep": torch.tensor([5, 6]), "added": added},
        {"sample": sample(2), "timestep": torch.tensor([5, 6]), "added": added | {"strength": 2.0}},
    ]
    graphs = (1, 2, 2, 3, 3)  # Numbers are inputs.
    for number, call in zip(graphs, calls, strict=True):
        for _ in range(2):
            assert torch.equal(traced(**call)["sample"], model(**call)["sample"])
        assert len(traced.graphs) == number
    assert {read_tensors(graph)["into.weight"].data_ptr() for graph in traced.graphs} == {model.into.weight.data_ptr()}


@pytest.mark.parametrize("number", [7, 0.25])
def test_a_timestep_given_as_a_number_is_an_input(number: float) -> None:
    model = Model().eval()
    traced = trace(model)
    for step in (number, number * 2, number * 3):
        x = sample(3)
        torch.testing.assert_close(traced(x, step)["sample"], model(x, step)["sample"])
    assert len(traced.graphs) == 1


def test_a_first_call_of_batch_one_leaves_the_batch_open() -> None:
    model = Model().eval()
    traced = trace(model)
    for batch in (1, 5):
        x, step = sample(batch), torch.arange(batch)
        assert torch.equal(traced(x, step)["sample"], model(x, step)["sample"])
    assert len(traced.graphs) == 1


class FixedBatch(nn.Module):
    """Its own code holds the batch size."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch, self.linear = batch, nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.linear(x).reshape(self.batch, 12) + timestep[:, None]


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_model_that_fixes_its_batch_is_captured_for_that(batch: int) -> None:
    model = FixedBatch(batch).eval()
    traced = trace(model)
    x, step = sample(batch), torch.arange(batch)
    assert torch.equal(traced(x, step), model(x, step))
    assert traced.captured[0].static_batch
    assert len(traced.graphs) == 1
    assert torch.equal(traced(x, step), model(x, step))
    assert len(traced.graphs) == 1
    with pytest.raises(CaptureError, match="FixedBatch cannot be traced"):
        traced(sample(batch + 1), torch.arange(batch + 1))


class Specializing(nn.Module):
    """Its code asks for the batch size, and takes another way for each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.linear(x) * int(x.shape[0] == 4) + int(x.shape[0])


def test_a_model_that_depends_on_the_batch_size_gets_a_graph_for_each() -> None:
    model = Specializing().eval()
    traced = trace(model)
    for batch in (4, 3, 1, 4):
        x, step = sample(batch), torch.arange(batch)
        assert torch.equal(traced(x, step), model(x, step))


class Untraceable(nn.Module):
    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.way = nn.Linear(4, 4), way

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.way(self.linear(x))


def branch(x: Tensor) -> Tensor:
    if x.sum() > 0:  # The line that a user has to see.
        return x
    return -x


def item(x: Tensor) -> Tensor:
    return x[: int(x.argmax().item())]  # And this one.


@pytest.mark.parametrize(("way", "line"), [(branch, "if x.sum() > 0:"), (item, "return x[: int(x.argmax().item())]")])
def test_an_untraceable_model_shows_its_own_line(way: Callable[[Tensor], Tensor], line: str) -> None:
    with pytest.raises(CaptureError) as error:
        captured(Untraceable(way), sample(2), torch.arange(2))
    message = str(error.value)
    assert "Untraceable cannot be traced" in message
    assert __file__ in message
    number = inspect.getsourcelines(way)[1] + 1
    assert f"line {number}, in {way.__name__}" in message
    assert line in message
    assert "branch on shapes, options, masks and positions, not on tensor values" in message


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (lambda x: x.reshape(5, 7), "shape '[5, 7]' is invalid"),
        (lambda x: {}["size"], "'size'"),
        (lambda x: x + torch.ones(9), "must match"),
    ],
)
def test_an_error_of_the_models_own_code_is_not_blamed_on_branches(way: Callable[[Tensor], Tensor], said: str) -> None:
    with pytest.raises(CaptureError) as error:
        captured(Untraceable(way), sample(2), torch.arange(2))
    assert said in str(error.value)
    assert "A graph is one path" not in str(error.value)
    assert "for the call (x: float32[2, 3, 4]" in str(error.value)


def chosen(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))


def masked(x: Tensor) -> Tensor:
    heads, length = x[:, None], x.shape[1]
    mask = create_block_mask(lambda batch, head, q, k: q >= k, None, None, length, length, device="cpu")
    return flex_attention(heads, heads, heads, block_mask=mask)[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "op"), [(chosen, "cond"), (masked, "flex_attention")])
@pytest.mark.filterwarnings("ignore")
def test_ops_that_run_a_graph_of_their_own_are_refused(way: Callable[[Tensor], Tensor], op: str) -> None:
    with pytest.raises(CaptureError, match=f"Untraceable cannot be traced: its code calls {op}.*set_attn_processor"):
        captured(Untraceable(way), sample(2), torch.arange(2))


class FailsFirst(nn.Module):
    """Its capture succeeds for the batch of its call alone, after an attempt at all of them."""

    def __init__(self, way: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.way = nn.Linear(4, 4), way

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.linear(x) + self.way(x, timestep)


@pytest.mark.parametrize(
    "way",
    [
        lambda x, timestep: x + torch.ones(3, 3, 4),
        lambda x, timestep: x.reshape(3, 12).unflatten(1, (3, 4)),
        lambda x, timestep: x if x.shape[0] == 3 and x.shape[0] % 2 else x[:5] / 0 + torch.ones(4, 3, 4),
    ],
)
def test_attempts_say_nothing_on_the_screen(
    way: Callable[[Tensor, Tensor], Tensor], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = FailsFirst(way).eval()
    x, step = sample(3), torch.arange(3)
    found = captured(model, x, step, timestep_name="timestep")
    assert torch.equal(found.module(x, step)[0], model(x, step))
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_failing_capture_prints_no_graph(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError):
        captured(Untraceable(branch), sample(2), torch.arange(2))
    assert capfd.readouterr() == ("", "")


@torch.compile(backend="eager")
def decorated(x: Tensor) -> Tensor:
    return F.gelu(x) * x.sigmoid()


def test_functions_decorated_with_compile_are_traced_as_they_run_without() -> None:
    class Decorated(Model):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.twice(decorated(self.into(x)))

        @torch.compile(fullgraph=True, dynamic=True)
        def twice(self, hidden: Tensor) -> Tensor:
            return F.silu(self.out(F.layer_norm(hidden, (8,))))

    class Plain(Decorated):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            hidden = self.into(x)
            return F.silu(self.out(F.layer_norm(F.gelu(hidden) * hidden.sigmoid(), (8,))))

    x, step = sample(2), torch.arange(2)
    with torch.no_grad():
        assert torch.equal(captured(Decorated(), x, step).module(x, step)[0], Plain().eval()(x, step))


@pytest.mark.parametrize("around", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_a_capture_under_autocast_is_one_without(around: Callable[[], Any]) -> None:
    model = FailsFirst(lambda x, timestep: x).eval()
    x, step = sample(2), torch.arange(2)
    with around(), torch.autocast("cpu", torch.bfloat16):
        found = captured(model, x, step)
    dtypes = {node.meta["val"].dtype for node in found.module.graph.nodes if node.op == "call_function"}
    assert torch.bfloat16 not in dtypes
    assert torch.equal(found.module(x, step)[0], model(x, step))


class InPlace(nn.Module):
    """Writes into values that are read before and after, and through views."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        y = self.a(x)
        before = self.b(y)
        y += 1
        y[:, :2] = 0
        y[..., 1::2] *= timestep[:, None, None]
        return self.b(F.relu(y, inplace=True)) + before


def test_writes_in_place_are_replaced() -> None:
    model = InPlace().eval()
    x, step = sample(3), torch.arange(3.0)
    found = captured(model, x, step)
    for node in found.module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable, node
    for batch in (3, 5):
        x, step = sample(batch), torch.arange(float(batch))
        assert torch.equal(found.module(x, step)[0], model(x, step))


def test_inputs_are_left_alone() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return x * 2

    with pytest.raises(CaptureError, match="Writes writes into its inputs or buffers in place"):
        captured(Writes(), x=sample(2))


def test_layers_have_the_names_of_their_modules() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.ModuleDict({"to_q": nn.Linear(4, 4)})

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.block["to_q"](self.block["to_q"](x)), self.block["to_q"].weight * 2)

    found = captured(Twice(), x=sample(2))
    assert [node.meta[LAYER] for node in found.module.graph.nodes if LAYER in node.meta] == [
        "block.to_q",
        "block.to_q@2",
    ]


class Tied(nn.Module):
    """Two pairs of linears that share a weight: by the parameter, and as one module of two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.one = nn.Linear(4, 4)
        self.other = self.one

    def forward(self, x: Tensor, only: bool = False) -> Tensor:
        if only:
            return self.first(x) + self.one(x)
        y = self.second(x) + self.first(x) + self.other(x) + self.one(x)
        return F.linear(y, self.first.weight)


def names(model: nn.Module, **call: Any) -> list[str]:
    return [node.meta[LAYER] for node in captured(model, **call).module.graph.nodes if LAYER in node.meta]


def test_tied_weights_keep_the_names_of_their_modules_in_every_graph() -> None:
    found = names(Tied(), x=sample(2))
    assert found[:4] == ["second", "first", "other", "one"]
    assert found[4] in ("first@2", "second@2")  # No module of the two calls it.
    assert names(Tied(), x=sample(2), only=True) == ["first", "one"]


CASTS = {
    "to(x.dtype)": lambda w, x: w.to(x.dtype),
    "to(x)": lambda w, x: w.to(x),
    "to(device, dtype)": lambda w, x: w.to(x.device, x.dtype),
    "to(dtype=)": lambda w, x: w.to(dtype=x.dtype, device=x.device),
    "type_as": lambda w, x: w.type_as(x),
    "float": lambda w, x: w.float(),
    "data": lambda w, x: w.data,
    "detach": lambda w, x: w.detach(),
    "contiguous": lambda w, x: w.contiguous(),
    "twice": lambda w, x: w.half().to(x.dtype),
}


class CastAsItRuns(nn.Module):
    def __init__(self, cast: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.cast = cast
        self.block = nn.ModuleDict({"to_q": nn.Linear(4, 4, dtype=dtype), "to_k": nn.Linear(4, 4, dtype=dtype)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.block.values():
            x = F.linear(x, self.cast(layer.weight, x), self.cast(layer.bias, x))
        return x


CHANGES_DTYPE = CASTS.keys() - {"data", "detach", "contiguous"}


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [*((cast, torch.float32) for cast in CASTS), *((cast, torch.bfloat16) for cast in sorted(CHANGES_DTYPE))],
)
def test_weights_cast_as_they_are_read_keep_their_names(cast: str, dtype: torch.dtype) -> None:
    assert names(CastAsItRuns(CASTS[cast], dtype), x=sample(2)) == ["block.to_q", "block.to_k"]


ROUNDED = {"integers": torch.int8, "8 bits": torch.float8_e4m3fn}


@pytest.mark.parametrize("name", ROUNDED)
def test_weights_that_are_rounded_as_they_are_read_are_computed(name: str) -> None:
    """Codes of the parameter would be those of another weight."""
    model = CastAsItRuns(lambda w, x: w.to(ROUNDED[name]).to(x.dtype))
    assert names(model, x=sample(2)) == []
    products = find_products(captured(model, x=sample(2)).module.graph)
    assert [product.reason.partition(",")[0] for product in products] == ["its weight is computed in the graph"] * 2


def test_the_model_is_left_as_it_was() -> None:
    model = Model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameter = model.into.weight
    found = captured(model, sample(2), 3)
    assert model.into.weight is parameter
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert read_tensors(found.module)["into.weight"].data_ptr() == parameter.data_ptr()


def test_constants_of_one_graph_are_not_those_of_another() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.tables = [torch.arange(4.0), torch.randn(4, dtype=torch.complex128)]

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            size = torch.tensor([x.shape[1], 1.0])  # torch.export numbers such tensors, in each graph from 0.
            return self.linear(x) * size[0] + self.tables[0] + self.tables[1].real.float()

    model = Sized().eval()
    traced = trace(model)
    for tokens in (3, 5, 3):
        x, step = sample(2, tokens), torch.arange(2)
        assert torch.equal(traced(x, step), model(x, step))
    names = [{name for name in read_tensors(graph) if "constant" in name} for graph in traced.graphs]
    assert len(names) == 2
    assert not names[0] & names[1]
    assert {"tables_0", "tables_1"} <= set(traced.tensors())


def test_a_layer_behind_a_dropout_that_nobody_reads_is_not_there() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.unread = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            F.dropout(self.unread(x), 0.1, training=self.training)
            return self.read(x)

    found = captured(Unread(), x=sample(2))
    assert [node.meta[LAYER] for node in found.module.graph.nodes if LAYER in node.meta] == ["read"]


def test_training_mode_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"the model is in training mode.*model.eval\(\)"):
        Architecture.of(Model().train(), "timestep")


class OwnLinear(nn.Linear):
    """May do something else in training mode, as any class of somebody's own."""


@pytest.mark.parametrize("extra", [nn.Dropout(), OwnLinear(2, 8), nn.Sequential(nn.Linear(2, 8)), nn.BatchNorm1d(8)])
def test_training_mode_of_one_module_is_refused(extra: nn.Module) -> None:
    model = Model().eval()
    model.extra = extra.train()
    with pytest.raises(ConfigurationError, match=r"module 'extra' is in training mode.*model.eval\(\)"):
        Architecture.of(model, "timestep")


def test_a_linear_does_the_same_in_training_mode() -> None:
    model = Model().eval()
    model.extra.train()  # As diffusers' fused projections are made.
    x, added = sample(2), {"size": torch.ones(2, 2)}
    expected = model(x, 1, added)["sample"]
    assert torch.equal(trace(model)(x, 1, added)["sample"], expected)


def test_weights_of_another_model_are_refused() -> None:
    model = Model().eval()
    architecture = Architecture.of(model, "timestep")
    found = architecture.capture(architecture.canonical((sample(2), 1), {}))
    weights = weights_of(model)
    with pytest.raises(CheckpointError, match=r"'out.weight' has shape \(4, 4\), the model needs \(4, 8\)"):
        bind(found.module, weights | {"out.weight": torch.zeros(4, 4)})
    del weights["into.bias"]
    found = architecture.capture(architecture.canonical((sample(2), 1), {}))
    with pytest.raises(CheckpointError, match=r"no tensor 'into.bias'"):
        bind(found.module, weights)


class _Branching(nn.Module):
    """Takes another path for other batch sizes."""

    def __init__(self, path: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(self.path(x))
        return found


def _in_pieces(x: Tensor) -> Tensor:
    """Six rows per sample in pieces of eight, as the norms of Mochi's VAE take them."""
    pieces = x.repeat_interleave(6, 0).split(8)
    return torch.cat([piece * (number + 1) for number, piece in enumerate(pieces)])[::6]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        _in_pieces,
        pytest.param(lambda x: x * 2 if x.shape[0] > 4 else x, marks=pytest.mark.exhaustive),
        lambda x: x * 3 if x.shape[0] % 2 == 0 else x,
        lambda x: torch.cat([piece * (number + 1) for number, piece in enumerate(x.split(3))]),
    ],
)
def test_conditions_on_the_batch_size(path: Callable[[Tensor], Tensor]) -> None:
    """A graph is one path through the code, so it serves only the batch size of its call."""
    model = _Branching(path).eval()
    traced = trace(model, timestep=None)
    for batch in (2, 1, 3, 5, 8, 2):
        x = torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch))
        assert torch.equal(traced(x), model(x)), batch
    assert len(traced.captured) == 5
    assert traced.captured[0].static_batch == "the model's own code depends on the batch size"


class _Mixing(nn.Module):
    """Mixes the channels with the batch and undoes it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 2).reshape(-1, 5).unflatten(0, (8, -1)).transpose(0, 2)


def test_conditions_on_the_batch_size_that_do_not_matter() -> None:
    """How a reshaped value lies in memory depends on the batch size, but the ops do not."""
    model = _Mixing().eval()
    traced = trace(model, timestep=None)
    for batch in (2, 5, 1, 10):
        x = torch.randn(batch, 5, 8, generator=torch.Generator().manual_seed(batch))
        assert torch.equal(traced(x), model(x))
    assert len(traced.captured) == 1 and traced.captured[0].static_batch is None
