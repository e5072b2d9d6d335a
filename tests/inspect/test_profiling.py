"""The profile: which row every op belongs to, what the numbers add up to, what it warns of. No test looks at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import BackendError, CheckpointError, ConfigurationError
from fxquant.inspect.profiling.attribution import Place, attribute
from fxquant.inspect.profiling.kinds import KINDS, kind_of
from fxquant.inspect.profiling.results import FLOAT, QUANTIZED, NodeTime, Profile, Row
from fxquant.inspect.profiling.roofline import Roofline, measure_roofline
from fxquant.inspect.profiling.stand_ins import batch_of, make_inputs
from fxquant.inspect.profiling.timing import Times, Watch
from fxquant.ir.meta import LAYER
from fxquant.ir.rewriter import Rewriter
from fxquant.pipeline.recipes import make_recipe
from tests.support import captured
from tests.tiny import calibrate, make_dit

aten = torch.ops.aten


def symmetric(layers: str = "blocks"):
    return make_recipe("rtn-w8a8", layers).with_options("quantize-linears", symmetric=True)


@pytest.fixture(scope="module")
def native():
    """On `native`, a GELU is within the linear before it."""
    model = make_dit(layers=2)
    return fxquant.compile(model, recipe=symmetric(), backend="native", calibrate=calibrate(model), measure=0)


@pytest.fixture(scope="module")
def every():
    """Everything quantized, by the oracle: convolution and attention too."""
    model = make_dit(layers=2)
    return fxquant.compile(model, recipe="htg-w4a8", layers="all", calibrate=calibrate(model), measure=0)


@pytest.fixture(scope="module")
def profiled(native):
    return fxquant.profile(native, batch=3, rounds=2)


@pytest.fixture(scope="module", autouse=True)
def quick_peaks():
    """Measured for a moment: no test looks at what they are."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fxquant.inspect.profiling.roofline._SECONDS", 0.01)
        patched.setattr("fxquant.inspect.profiling.roofline._BYTES", 1 << 16)
        yield


def graphs(model):
    """The lowered graph, and the float one of the same call."""
    found = model.captured[0]
    return found.module.graph, model.architecture.capture_spec(found.call, torch.device("cpu")).module.graph


def called(graph):
    return [node for node in graph.nodes if node.op == "call_function"]


class TestKinds:
    @pytest.mark.parametrize(
        ("op", "kind"),
        [
            (aten.linear.default, "linear"),
            (torch.ops.fxquant.linear.default, "linear"),
            (SimpleNamespace(_name="some_backend::qlinear_gelu_quantize"), "linear"),
            (aten.scaled_dot_product_attention.default, "attention"),
            (torch.ops.fxquant.matmul.default, "attention"),
            (aten.softmax.int, "attention"),
            (torch.ops.fxquant.conv2d.default, "convolution"),
            (aten.embedding.default, "embedding"),
            (aten.layer_norm.default, "norm"),
            (SimpleNamespace(_name="some_backend::norm_quantize"), "norm"),
            (torch.ops.fxquant.quantize.default, "quantize"),
            (torch.ops.fxquant.dequantize_weight.default, "quantize"),
            (aten.bucketize.Tensor, "quantize"),
            (aten.view.default, "layout"),
            (aten.t.default, "layout"),
            (aten.to.dtype, "layout"),
            (aten.gelu.default, "pointwise"),
            (aten.mul.Tensor, "pointwise"),
            (aten.tanh.default, "pointwise"),
            (aten.scatter.src, "pointwise"),
        ],
    )
    def test_by_name(self, op, kind):
        assert kind_of(SimpleNamespace(target=op)) == kind
        assert kind in KINDS


class TestAttribution:
    @pytest.mark.slow
    def test_every_op_has_a_place(self, native, every):
        for model in (native, every):
            lowered, original = graphs(model)
            found = attribute(lowered, original)
            assert found.lowered.keys() == {node.name for node in called(lowered)}
            assert found.original.keys() == {node.name for node in called(original)}
            left, right = (
                {place.name for place in side.values() if place.is_layer} for side in (found.lowered, found.original)
            )
            assert right == set(model.plan.layers)
            # `native` computes what two layers of the same weights and inputs compute but once.
            assert left == right if model is every else left >= {name for name in right if "@" not in name}
            assert not found.inside

    def test_both_sides_have_the_same_layers(self, every):
        found = attribute(*graphs(every))
        lowered, original = (
            {place for place in side.values() if place.is_layer or place.kind == "attention"}
            for side in (found.lowered, found.original)
        )
        assert lowered == original

    def test_quantization_stands_with_its_reader(self, every):
        lowered, original = graphs(every)
        found = attribute(lowered, original)
        quantized = {node: found.lowered[node.name] for node in called(lowered) if "quantize" in str(node.target)}
        assert len(quantized) > 20
        assert all(place.is_layer or place.kind == "attention" for place in quantized.values())
        shared = next(node for node in quantized if any("to_q" in str(u.meta.get(LAYER)) for u in node.users))
        assert {str(user.meta[LAYER]).rpartition(".")[2] for user in shared.users} == {"to_q", "to_k", "to_v"}
        assert quantized[shared].name.endswith("to_q")

    def test_products_of_codes_stand_where_the_attention_was(self, every):
        lowered, original = graphs(every)
        found = attribute(lowered, original)
        products = [node for node in called(lowered) if node.target is torch.ops.fxquant.matmul.default]
        assert [found.lowered[node.name] for node in products[:2]] == [
            Place("transformer_blocks.0.attn1", "attention")
        ] * 2
        # Their quantization too, or attention would look faster than it is.
        codes = products[0].args[0]
        assert found.lowered[codes.name] == Place("transformer_blocks.0.attn1", "attention")

    def test_a_gelu_within_a_kernel_is_counted_with_its_layer(self, native):
        lowered, original = graphs(native)
        found = attribute(lowered, original)
        assert not any(node.target is aten.gelu.default for node in called(lowered)), "nothing is fused here any more"
        gelus = [node for node in called(original) if node.target is aten.gelu.default]
        assert [found.original[node.name] for node in gelus] == [
            Place(f"transformer_blocks.{i}.ff.net.0.proj", "layer") for i in range(2)
        ]

    def test_layers_that_became_one_kernel_share_a_row(self):
        class Projections(nn.Module):
            def __init__(self):
                super().__init__()
                self.to_q, self.to_k = nn.Linear(8, 8), nn.Linear(8, 8)

            def forward(self, x):
                return self.to_q(x) + self.to_k(x)

        model = Projections()
        original = captured(model, torch.randn(3, 4, 8)).module
        module = captured(model, torch.randn(3, 4, 8)).module
        q, k = (node for node in called(module.graph) if node.target is aten.linear.default)
        rewriter = Rewriter(module, "fuse")
        weight = rewriter.constant("both", torch.randn(16, 8), [q.args[1], k.args[1]])
        with rewriter.before(k):
            both = rewriter.call(aten.linear.default, (q.args[0], weight), [q, k], layer=True)
            parts = [
                rewriter.call(aten.slice.Tensor, (both, -1, start, start + 8), [both], layer=True) for start in (0, 8)
            ]
        rewriter.replace(k, parts[1])
        rewriter.replace(q, parts[0])
        found = attribute(module.graph, original.graph)
        row = Place("to_k", "layer")
        assert found.inside == {row: ("to_q",)}
        assert [found.original[node.name] for node in called(original.graph)][:2] == [row, row]
        assert {found.lowered[node.name] for node in (both, *parts)} == {row}


class TestProfile:
    def test_it_covers_every_op_once(self, native, profiled):
        for name, graph in zip((QUANTIZED, FLOAT), graphs(native), strict=True):
            found = [node.name for node in profiled.nodes if node.graph == name]
            assert found == [node.name for node in called(graph)]

    def test_rows_and_kinds_add_up_to_the_whole(self, profiled):
        for graph in (QUANTIZED, FLOAT):
            whole = profiled.summed(graph).rounds
            parts = [row.quantized if graph == QUANTIZED else row.floating for row in profiled.rows]
            kinds = [times[graph] for times in profiled.kinds.values() if graph in times]
            for split in (parts, kinds):
                assert [sum(t.rounds[i] for t in split if t) for i in range(2)] == pytest.approx(whole)
        assert sum(row.count for row in profiled.merged()) == len(profiled.rows)

    def test_rows_say_what_runs(self, native, profiled):
        rows = {row.name: row for row in profiled.rows if row.is_layer}
        assert rows.keys() == native.plan.layers.keys()
        q = rows["transformer_blocks.1.attn1.to_q"]
        assert (q.kind, q.precision) == ("linear", "w8a8")
        assert q.kernel == native.backend.kernel(native.plan.layers[q.name])
        assert q.operations == 2 * 3 * 16 * 16 * 16, "of 3 samples of 16 tokens, from 16 channels to 16"
        assert not q.falls_back
        attention = next(row for row in profiled.rows if row.kind == "attention")
        assert attention.operations == 2 * (2 * 3 * 2 * 16 * 16 * 8), "two products of 2 heads of 8 channels"
        assert profiled.batch == 3

    def test_json_is_strict_and_complete(self, profiled):
        data = json.loads(json.dumps(profiled.to_json(), allow_nan=False))
        assert len(data["rows"]) == len(profiled.rows)
        assert len(data["nodes"]) == len(profiled.nodes)
        assert data["calls"].keys() == {QUANTIZED, FLOAT}
        row = next(row for row in data["rows"] if row["name"].endswith("0.attn1.to_q"))
        assert row["share_of_peak"] == pytest.approx(row["gops"] / data["roofline"]["int8"])
        assert row["bound"] in ("compute", "memory")
        attention = next(row for row in data["rows"] if row["kind"] == "attention")
        assert attention["gops"] > 0
        assert attention["share_of_peak"] is attention["bound"] is None

    def test_table(self, profiled):
        text = profiled.table(top=3)
        assert max(map(len, text.splitlines())) <= 140
        assert "DiTTransformer2DModel on native, batch 3" in text
        assert f"{len(profiled.merged()) - 3} more rows" in text
        assert "transformer_blocks.1.attn1.to_q" in profiled.table(top=None, every=True)
        assert "transformer_blocks.0-1.attn1.to_q" in profiled.table(top=None)
        assert str(profiled) == profiled.table()

    def test_without_float(self, every):
        found = fxquant.profile(every, rounds=1, against_float=False)
        assert found.calls.keys() == {QUANTIZED}
        assert all(row.floating is None and not row.is_slower for row in found.rows)
        assert {row.kernel for row in found.rows if row.falls_back} == {
            "fxquant::linear (reference)", "fxquant::conv2d (reference)", "fxquant::matmul (reference)",
        }  # fmt: skip
        assert sum("fallback" in warning for warning in found.warnings) == 3

    def test_compiled_calls_are_timed_too(self, native, monkeypatch):
        made = []
        monkeypatch.setattr(torch, "compile", lambda module: made.append(module) or module)
        found = fxquant.profile(native, rounds=1, compiled=True)
        assert found.calls.keys() == {QUANTIZED, FLOAT, f"{QUANTIZED}, compiled", f"{FLOAT}, compiled"}
        assert made[0] is native.graphs[0]
        assert "\ncompiled " in found.table()

    def test_the_model_is_left_as_it_was(self, native):
        before = native.graphs[0].code, {name: id(tensor) for name, tensor in native.tensors().items()}
        fxquant.profile(native, rounds=1)
        assert (native.graphs[0].code, {name: id(t) for name, t in native.tensors().items()}) == before

    def test_threads_are_set_only_if_asked_for(self, native, monkeypatch):
        asked = []
        monkeypatch.setattr(torch, "set_num_threads", asked.append)
        fxquant.profile(native, rounds=1, against_float=False)
        assert asked == []
        fxquant.profile(native, rounds=1, threads=1, against_float=False)
        assert asked == [1, torch.get_num_threads()]

    @pytest.mark.slow
    def test_a_folder_and_another_backend(self, native, tmp_path):
        fxquant.save(native, tmp_path / "transformer")
        found = fxquant.profile(tmp_path, backend="fake-quant", rounds=1)
        assert found.backend == "fake-quant"
        assert fxquant.profile(str(tmp_path / "transformer"), rounds=1).backend == "native"


class TestBadInput:
    def test_options(self, native):
        for option in ("rounds", "threads", "batch"):
            with pytest.raises(ConfigurationError, match=r"at least one"):
                fxquant.profile(native, **{option: 0})
        with pytest.raises(ConfigurationError, match="has its backend and device already"):
            fxquant.profile(native, backend="fake-quant")

    def test_a_float_model(self):
        with pytest.raises(ConfigurationError, match=r"DiTTransformer2DModel; make one with fxquant\.compile"):
            fxquant.profile(make_dit())
        with pytest.raises(ConfigurationError, match="not a GraphModel"):
            fxquant.profile(fxquant.trace(make_dit()))

    def test_no_checkpoint(self, tmp_path):
        with pytest.raises(CheckpointError, match="there is no folder"):
            fxquant.profile(tmp_path / "nowhere")

    def test_a_backend_that_cannot_run_it(self, tmp_path):
        model = make_dit()
        grouped = fxquant.compile(model, recipe="rtn-w4a8-g8", calibrate=calibrate(model), measure=0)
        fxquant.save(grouped, tmp_path / "q")
        with pytest.raises(BackendError, match="leave out the groups"):
            fxquant.profile(tmp_path / "q", backend="native{kernels=onednn}")

    def test_a_batch_that_the_graph_does_not_serve(self, native):
        call = native.captured[0].call.at_batch(4, "the code says so")
        assert batch_of(call, None) == batch_of(call, 4) == 4
        with pytest.raises(ConfigurationError, match=r"only a batch of 4 \(the code says so\)"):
            batch_of(call, 2)


def test_inputs_are_in_range(native):
    call = native.captured[0].call
    hidden, timestep, labels = make_inputs(call, native.plan, 5, torch.device("cpu"))
    assert (hidden.shape, timestep.tolist(), labels.tolist()) == ((5, 4, 8, 8), [500] * 5, [0] * 5)
    again, *_ = make_inputs(call, native.plan, 5, torch.device("cpu"))
    assert torch.equal(hidden, again)


def test_the_watch_computes_what_the_graph_does(native):
    inputs = make_inputs(native.captured[0].call, native.plan, 2, torch.device("cpu"))
    watch = Watch(native.graphs[0], native.plan, torch.device("cpu"))
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(watch.run(*inputs)[0], native.graphs[0](*inputs)[0])
            assert len(watch.seconds) == len(watch.called)


class TestRoofline:
    def test_measured(self):
        found = measure_roofline(torch.float32, shapes=[(32, 64, 64)])
        assert found.floating > 0 < found.memory
        assert (found.int8 is None) == (not hasattr(torch.ops.onednn, "qlinear_pointwise"))
        assert (found.dtype, found.threads) == ("float32", torch.get_num_threads())

    @pytest.mark.slow
    @pytest.mark.skipif(not hasattr(torch.ops.onednn, "qlinear_pointwise"), reason="no oneDNN quantized linear")
    def test_without_avx512_the_integer_product_is_no_loop(self):
        script = """
import torch
from fxquant.inspect.profiling.roofline import int8_product
print(int8_product(4, 1024, 1024, torch.device("cpu"))().dtype)
"""
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["torch.float32"]  # That of bfloat16 takes minutes at the size of a model.

    def test_what_bounds(self):
        peaks = Roofline(int8=1000.0, floating=100.0, dtype="float32", memory=10.0, threads=2)
        assert peaks.bound(operations=10**6, traffic=10**3, integer=True) == "compute"
        assert peaks.bound(operations=10**6, traffic=10**5, integer=True) == "memory"
        assert peaks.bound(operations=10**6, traffic=9 * 10**4, integer=False) == "compute"
        assert Roofline(None, 100.0, "float32", 10.0, 2).peak(integer=True) == 100.0


def row(name, floating, quantized, precision="w8a8", kernel="fast", falls_back=False, kind="linear"):
    times = [None if t is None else Times(t) for t in (floating, quantized)]
    return Row((name,), True, kind, precision, kernel, falls_back, *times, operations=10**6, traffic=10)


def made(*rows, quantized=(5.0, 5.0, 5.0), floating=(9.0, 9.0, 9.0)):
    nodes = (NodeTime(QUANTIZED, "n", "aten::linear", "linear", "n", Times(quantized)),)
    calls = {QUANTIZED: Times(quantized), FLOAT: Times(floating)}
    return Profile("m:Model", "b", "cpu", 2, Roofline(900.0, 90.0, "float32", 9.0, 2), calls, rows, nodes)


class TestWarnings:
    def test_none_where_all_is_well(self):
        assert made(row("blocks.0.q", (3.0, 3.0, 3.0), (1.0, 1.0, 1.0))).warnings == []

    def test_slower_layers_are_named_blocks_together(self):
        slow = [row(f"blocks.{i}.q", (1.0, 1.0, 1.0), (2.0, 2.0, 2.0)) for i in range(3)]
        (warning,) = made(*slow, row("out", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0))).warnings
        assert warning.startswith("slower than in float: blocks.0-2.q 6 ms (float 3). Keep such layers float")

    def test_noise_and_float_layers_are_no_reason(self):
        noise = row("a", (1.0, 3.0, 5.0), (2.0, 4.0, 6.0))
        by_little = row("b", (1.0, 1.0, 1.0), (1.01, 1.01, 1.01))
        not_quantized = row("c", (1.0, 1.0, 1.0), (2.0, 2.0, 2.0), precision="float")
        assert made(noise, by_little, not_quantized).warnings == []

    def test_weights_in_few_bits_count_as_quantized(self):
        assert made(row("a", (1.0, 1.0, 1.0), (2.0, 2.0, 2.0), precision="w8a16")).rows[0].is_slower

    def test_fallbacks(self):
        rows = [row(f"blocks.{i}.q", None, (1.0, 1.0, 1.0), kernel="x (reference)", falls_back=True) for i in range(2)]
        lone = row("blocks.0.attn", None, (1.0,) * 3, kernel="y (reference)", falls_back=True, kind="attention")
        assert made(*rows, lone).warnings == [
            "2 layers run a fallback of backend 'b', x (reference): blocks.0-1.q",
            "1 attention runs a fallback of backend 'b', y (reference): blocks.0.attn",
        ]

    def test_a_model_that_gains_nothing(self):
        assert made(floating=(4.0, 4.0, 4.0)).warnings == ["the model is slower than in float: 5 ms a call, float 4 ms"]


def test_names_of_rows():
    assert row("blocks.3.attn.to_q", None, (1.0,)).name == "blocks.3.attn.to_q"
    fused = Row(("b.3.attn.to_q", "b.3.attn.to_k"), True, "linear", "w8a8", "k", False, None, Times((1.0,)), 1, 1)
    assert fused.name == "b.3.attn.to_q+to_k"
    other = Row(("b.4.attn.to_q", "b.4.attn.to_k"), True, "linear", "w8a8", "k", False, None, Times((2.0,)), 1, 1)
    (both,) = made(fused, other, quantized=(3.0,), floating=(3.0,)).merged()
    assert (both.name, both.count, both.quantized, both.operations) == ("b.3-4.attn.to_q+to_k", 2, Times((3.0,)), 2)
    assert Row(("",), False, "layout", "", "", False, None, Times((1.0,)), 0, 0).name == "(model)"


def test_heaviest_first():
    rows = made(
        row("a", None, (1.0,)), row("b", None, (3.0,)), row("c", (9.0,), None), quantized=(4.0,), floating=(1.0,)
    )
    assert [entry.name for entry in rows.merged()] == ["b", "a", "c"]
