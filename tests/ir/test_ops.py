"""The operators mean what they say in exact arithmetic, have honest fake kernels and stay whole in graphs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from fxquant.errors import CalibrationError, ConfigurationError, UnknownNameError
from fxquant.ir import ops  # noqa: F401 - registers the operators
from fxquant.ir.ops import recording
from fxquant.numerics.formats import FORMATS, Scales
from fxquant.numerics.packing import pack, unpack
from fxquant.numerics.weights import QuantizedWeight, encode_weight, quantize_weight

OPS = torch.ops.fxquant

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def codes(*shape: int, bits: int = 8) -> Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8)


def grid(*shape: int) -> tuple[Tensor, Tensor]:
    """Scales that are powers of two, so that products of scales and integers are exact, and zero points."""
    return torch.randint(-4, 2, shape).to(torch.float32).exp2(), codes(*shape)


def random_weight(out: int, n: int, bits: int, group_size: int) -> QuantizedWeight:
    groups = n // group_size if group_size else 1
    scale, _ = grid(out, groups)
    return QuantizedWeight.from_codes(
        codes(out, n, bits=bits),
        Scales(scale, codes(out, groups, bits=bits)),
        format=f"int{bits}",
        group_size=group_size,
    )


def integers(weight: QuantizedWeight) -> Tensor:
    """`q - zero_point`, int64 `[out, in]`."""
    width = weight.group_size or weight.in_features
    q = unpack(weight.packed, weight.bits, weight.in_features).long()
    return q - weight.zero_point.long().repeat_interleave(width, 1)


def linear_arguments(
    x_grid: tuple[int, ...] = (), bias: tuple[int, ...] | None = (7,), bits: int = 4, group_size: int = 0
) -> tuple[object, ...]:
    weight = random_weight(7, 24, bits, group_size)
    row = None if bias is None else torch.randn(bias)
    return (
        *(codes(2, 5, 24), *grid(*x_grid), weight.packed, weight.scale, weight.zero_point, row),
        *("int8", f"int{bits}", group_size, torch.float32),
    )


def conv_arguments(groups: int = 1, bias: tuple[int, ...] | None = (6,)) -> tuple[object, ...]:
    kernel = [4 // groups, 3, 2]
    weight = random_weight(6, kernel[0] * 6, 4, 0)
    row = None if bias is None else torch.randn(bias)
    return (
        *(codes(2, 4, 9, 8), *grid(2, 1, 1, 1), weight.packed, weight.scale, weight.zero_point, row),
        *("int8", "int4", kernel, [2, 1], [1, 2], [1, 2], groups, torch.float32),
    )


class TestLinear:
    @given(
        bits=st.integers(2, 8),
        group_size=st.sampled_from([0, 8, 24]),
        x_grid=st.sampled_from([(), (2, 1, 1), (2, 5, 1), (1,)]),
        bias=st.sampled_from([None, (7,), (2, 1, 7)]),
        signed=st.booleans(),
        seed=st.integers(0, 1000),
    )
    @settings(deadline=None, max_examples=60)
    def test_equals_integer_arithmetic(
        self,
        bits: int,
        group_size: int,
        x_grid: tuple[int, ...],
        bias: tuple[int, ...] | None,
        signed: bool,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        weight = random_weight(7, 24, bits, group_size)
        xq, (x_scale, x_zero_point) = codes(2, 5, 24), grid(*x_grid)
        if signed:
            xq, x_zero_point = (xq.short() - 128).to(torch.int8), (x_zero_point.short() - 128).to(torch.int8)
        # Sixteenths, so that float64 holds every sum exactly.
        row = None if bias is None else torch.randint(-99, 99, bias) / 16.0
        y = OPS.linear(
            *(xq, x_scale, x_zero_point, weight.packed, weight.scale, weight.zero_point, row),
            *("int8", f"int{bits}", group_size, torch.float64),
        )
        width = group_size or 24
        x = (xq.long() - x_zero_point.long()).unflatten(-1, (-1, width))
        products = torch.einsum("btgk,ogk->btgo", x, integers(weight).unflatten(-1, (-1, width)))
        exact = (products.double() * weight.scale.double().T).sum(-2) * x_scale.double()
        assert torch.equal(y, exact if row is None else exact + row.double())

    def test_agrees_with_the_float_layer(self) -> None:
        torch.manual_seed(0)
        layer, x = nn.Linear(32, 16), torch.randn(4, 3, 32)
        weight = quantize_weight(layer.weight, bits=8)
        scale, zero_point = torch.tensor(8.0 / 255), torch.tensor(128, dtype=torch.uint8)
        xq = OPS.quantize(x, scale, zero_point, "int8")
        y = OPS.linear(
            *(
                xq,
                scale,
                zero_point,
                weight.packed,
                weight.scale,
                weight.zero_point,
                layer.bias,
                "int8",
                "int8",
                0,
                torch.float32,
            )
        )
        torch.testing.assert_close(y, layer(x), atol=0.1, rtol=0.0)

    @pytest.mark.parametrize("group_size", [0, 8])
    def test_autocast_does_not_reach_inside(self, group_size: int) -> None:
        arguments = linear_arguments(bits=8, group_size=group_size)
        expected = OPS.linear(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(OPS.linear(*arguments), expected)

    def test_two_axes_and_empty_batches(self) -> None:
        xq, *rest = linear_arguments()
        assert isinstance(xq, Tensor)
        whole = OPS.linear(xq, *rest)
        torch.testing.assert_close(OPS.linear(xq[0], *rest), whole[0])
        assert OPS.linear(xq[:0], *rest).shape == (0, 5, 7)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_rounds_once_to_the_result(self, dtype: torch.dtype) -> None:
        *arguments, _ = linear_arguments(group_size=8)
        assert torch.equal(OPS.linear(*arguments, dtype), OPS.linear(*arguments, torch.float32).to(dtype))


def block_arguments() -> tuple[object, ...]:
    x, outer = torch.randn(2, 5, 64), torch.tensor(1e-3)
    return x, OPS.block_scale(x, "nvfp4", outer), None, "nvfp4", outer


def float_arguments() -> tuple[object, ...]:
    """A linear of nvfp4 activations and mxfp4 weights."""
    x, scale, _, format, outer = block_arguments()
    weight = encode_weight(torch.randn(7, 64), format="mxfp4", group_size=32)
    codes = OPS.quantize(x, scale, None, format, outer)
    factors = codes, scale, None, weight.packed, weight.scale, None, torch.randn(7)
    return *factors, format, "mxfp4", 32, torch.float32, outer, None


def test_a_linear_of_floats_multiplies_decoded_values() -> None:
    arguments = float_arguments()
    x, scale, _, format, outer = arguments[0], arguments[1], None, "nvfp4", arguments[11]
    assert isinstance(x, Tensor) and isinstance(scale, Tensor) and isinstance(outer, Tensor)
    decoded = FORMATS[format].values()[x.int()].unflatten(-1, (-1, 16))
    decoded = (decoded * scale.view(torch.float8_e4m3fn).float()[..., None] * outer).flatten(-2)
    packed, steps = arguments[3], arguments[4]
    assert isinstance(packed, Tensor) and isinstance(steps, Tensor)
    weight = FORMATS["mxfp4"].values()[unpack(packed, 4, 64).int()].unflatten(-1, (-1, 32))
    weight = (weight * steps.view(torch.float8_e8m0fnu).float()[..., None]).flatten(-2)
    torch.testing.assert_close(OPS.linear(*arguments), nn.functional.linear(decoded, weight, arguments[6]))


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        (OPS.block_scale, (torch.ones(2, 40), "mxfp4"), "mxfp4 has a scale per 32 channels, and 32 does not divide"),
        (OPS.block_scale, (torch.ones(2, 32), "fp8"), "fp8 has no blocks"),
        (OPS.block_scale, (torch.ones(2, 32), "nvfp4"), "nvfp4 has a global scale"),
        (OPS.token_scale, (torch.ones(2, 32), "mxfp4"), "mxfp4 has no scale without a zero point for each token"),
        (OPS.token_scale, (torch.ones(2, 32), "int8"), "int8 has no scale without a zero point for each token"),
        (OPS.quantize, (torch.ones(2, 32), torch.ones(()), None, "mxfp4"), "scales of mxfp4 are bytes"),
        (OPS.token_grid, (torch.ones(2, 32).to("meta"), "fp8"), "fp8 has no zero points; token_scale finds its scales"),
    ],
)
def test_scales_of_other_formats_are_refused(op: object, arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        op(*arguments)  # type: ignore[operator]


def matmul_arguments(a_grid: tuple[int, ...] = (), b_grid: tuple[int, ...] = ()) -> tuple[object, ...]:
    return codes(2, 3, 5, 8), *grid(*a_grid), codes(2, 1, 8, 7), *grid(*b_grid), "int8", "int8", torch.float32


class TestMatmul:
    @given(
        a_grid=st.sampled_from([(), (2, 1, 1, 1), (2, 3, 5, 1)]),
        b_grid=st.sampled_from([(), (2, 1, 1, 1), (2, 1, 1, 7)]),
        signed=st.booleans(),
        seed=st.integers(0, 1000),
    )
    @settings(deadline=None, max_examples=40)
    def test_equals_integer_arithmetic(
        self, a_grid: tuple[int, ...], b_grid: tuple[int, ...], signed: bool, seed: int
    ) -> None:
        torch.manual_seed(seed)
        aq, a_scale, a_zero, bq, b_scale, b_zero, *_ = matmul_arguments(a_grid, b_grid)
        if signed:
            aq, a_zero, bq, b_zero = ((x.short() - 128).to(torch.int8) for x in (aq, a_zero, bq, b_zero))
        y = OPS.matmul(aq, a_scale, a_zero, bq, b_scale, b_zero, "int8", "int8", torch.float64)
        a, b = aq.long() - a_zero.long(), bq.long() - b_zero.long()
        products = torch.einsum("bhmk,bhkn->bhmn", a, b.expand(2, 3, 8, 7))
        assert torch.equal(y, products.double() * a_scale.double() * b_scale.double())

    def test_autocast_does_not_reach_inside(self) -> None:
        arguments = matmul_arguments()
        expected = OPS.matmul(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(OPS.matmul(*arguments), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_rounds_once_to_the_result(self, dtype: torch.dtype) -> None:
        *arguments, _ = matmul_arguments()
        assert torch.equal(OPS.matmul(*arguments, dtype), OPS.matmul(*arguments, torch.float32).to(dtype))

    def test_an_empty_batch(self) -> None:
        factors = codes(0, 5, 8), *grid(), codes(0, 8, 7), *grid()
        assert OPS.matmul(*factors, "int8", "int8", torch.float32).shape == (0, 5, 7)


class TestConv2d:
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("bias", [None, (6,), (2, 6, 1, 1)])
    def test_equals_integer_arithmetic(self, groups: int, bias: tuple[int, ...] | None) -> None:
        arguments = list(conv_arguments(groups, bias))
        arguments[-1] = torch.float64
        xq, x_scale, x_zero_point, packed, w_scale, w_zero_point, row, _, _, kernel, *geometry, _, _ = arguments
        q = unpack(packed, 4, kernel[0] * 6).long() - w_zero_point.long()
        x = xq.long() - x_zero_point.long()
        # Patches of int64, unfolded by indexing: padding is zero after the zero point is taken off.
        (stride, padding, dilation), (out_h, out_w) = geometry, (5, 10)
        x = nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        at_h = torch.arange(out_h)[:, None] * stride[0] + torch.arange(3) * dilation[0]
        at_w = torch.arange(out_w)[:, None] * stride[1] + torch.arange(2) * dilation[1]
        patches = x[:, :, at_h][..., at_w].unflatten(1, (groups, -1))
        exact = torch.einsum("bgchkwl,gockl->bgohw", patches, q.reshape(groups, -1, *kernel)).flatten(1, 2).double()
        exact = exact * w_scale.double().reshape(-1, 1, 1) * x_scale.double()
        if row is not None:
            exact = exact + row.double().reshape(-1, 6, 1, 1)
        assert torch.equal(OPS.conv2d(*arguments), exact)

    def test_padding_is_real_zero(self) -> None:
        weight = QuantizedWeight.from_codes(
            torch.full((1, 9), 3, dtype=torch.uint8),
            Scales(torch.ones(1, 1), codes(1, 1, bits=1)),
            format="int2",
            group_size=0,
        )
        zero_point = torch.tensor(100, dtype=torch.uint8)
        y = OPS.conv2d(
            *(torch.full((1, 1, 4, 4), 100, dtype=torch.uint8), torch.tensor(1.0), zero_point),
            *(
                weight.packed,
                weight.scale,
                weight.zero_point,
                None,
                "int8",
                "int2",
                [1, 3, 3],
                [1, 1],
                [1, 1],
                [1, 1],
                1,
            ),
            torch.float32,
        )
        assert torch.equal(y, torch.zeros(1, 1, 4, 4))

    def test_autocast_does_not_reach_inside(self) -> None:
        arguments = conv_arguments()
        expected = OPS.conv2d(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(OPS.conv2d(*arguments), expected)


class TestQuantize:
    def test_halves_and_saturation(self) -> None:
        x = torch.tensor([-1e30, -1.5, -0.5, 0.5, 1.5, 2.5, 1e30])
        q = OPS.quantize(x, torch.tensor(1.0), torch.tensor(10, dtype=torch.uint8), "int4")
        assert q.tolist() == [0, 8, 10, 10, 12, 12, 15]

    @pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1), (2, 5, 1)])
    def test_grids_broadcast(self, shape: tuple[int, ...]) -> None:
        x, (scale, zero_point) = torch.randn(2, 5, 24), grid(*shape)
        q = OPS.quantize(x, scale, zero_point, "int8")
        expected = (torch.round(x / scale) + zero_point.float()).clamp(0, 255)
        assert torch.equal(q.float(), expected)

    def test_float64_is_not_rounded_to_float32_first(self) -> None:
        x = torch.tensor(0.5 + 1e-12, dtype=torch.float64)
        grid_of_one = torch.tensor(1.0), torch.tensor(0, dtype=torch.uint8), "int4"
        assert OPS.quantize(x, *grid_of_one).item() == 1
        assert OPS.quantize(x.float(), *grid_of_one).item() == 0


class TestDequantizeWeight:
    @pytest.mark.parametrize("group_size", [0, 8])
    def test_is_the_weight(self, group_size: int) -> None:
        weight = quantize_weight(torch.randn(7, 24), bits=3, group_size=group_size)
        fields = weight.packed, weight.scale, weight.zero_point, "int3", group_size, 24
        assert torch.equal(OPS.dequantize_weight(*fields, torch.float16), weight.dequantize(torch.float16))


class TestChannelAffine:
    def test_rounds_once(self) -> None:
        x = torch.randn(2, 5, 8).to(torch.bfloat16)
        scale, shift = torch.rand(8), torch.randn(2, 1, 8)
        expected = (x.float() * scale + shift).to(torch.bfloat16)
        assert torch.equal(OPS.channel_affine(x, scale, shift), expected)
        assert torch.equal(OPS.channel_affine(x, scale, None), (x.float() * scale).to(torch.bfloat16))


class TestObserve:
    def test_shows_the_value_and_returns_it(self) -> None:
        seen: list[tuple[str, Tensor, Tensor, int]] = []
        x, timestep = torch.randn(2, 3, requires_grad=True), torch.tensor([5, 7])
        with recording(lambda *arguments: seen.append(arguments)):
            y = OPS.observe(x, timestep, "blocks.0.to_q", -1)
        ((key, value, time, axis),) = seen
        assert (key, axis) == ("blocks.0.to_q", -1)
        assert value is x and time is timestep
        assert torch.equal(y, x) and y.data_ptr() == x.data_ptr() and y.requires_grad

    def test_the_recorder_leaves_no_trace_on_the_tape(self) -> None:
        kept: list[Tensor] = []
        with recording(lambda key, x, timestep, axis: kept.append(x.amax())):
            OPS.observe(torch.randn(3, requires_grad=True), torch.tensor(0), "k", -1)
        assert not kept[0].requires_grad

    def test_the_innermost_recorder_counts_and_leaves(self) -> None:
        seen: list[str] = []
        x, timestep = torch.ones(1), torch.tensor(0)
        with recording(lambda *_: seen.append("outer")):
            with pytest.raises(KeyError), recording(lambda *_: seen.append("inner")):
                OPS.observe(x, timestep, "k", 0)
                raise KeyError
            OPS.observe(x, timestep, "k", 0)
        assert seen == ["inner", "outer"]
        with pytest.raises(CalibrationError, match=r"'k' ran outside of calibration"):
            OPS.observe(x, timestep, "k", 0)

    def test_fake_propagation_needs_no_recorder(self) -> None:
        with FakeTensorMode():
            x = torch.empty(2, 3)
            y = OPS.observe(x, torch.empty(2), "k", -1)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)

    def test_is_a_node_of_an_fx_graph(self) -> None:
        graph = torch.fx.Graph()
        x, timestep = graph.placeholder("x"), graph.placeholder("timestep")
        graph.output(graph.call_function(OPS.observe.default, (x, timestep, "k", -1)))
        module = torch.fx.GraphModule(nn.Module(), graph)
        seen: list[str] = []
        with recording(lambda key, *_: seen.append(key)):
            module(torch.ones(2), torch.tensor(3))
        assert seen == ["k"]


CALLS = {
    "quantize": (
        OPS.quantize.default,
        lambda: (torch.randn(2, 5, 24).transpose(1, 2), *grid(2, 1, 1), "int8"),
    ),
    "channel_affine": (
        OPS.channel_affine.default,
        lambda: (torch.randn(2, 5, 8).half(), torch.rand(8), torch.randn(2, 1, 8)),
    ),
    "channel_affine without shift": (
        OPS.channel_affine.default,
        lambda: (torch.randn(5, 2, 8).transpose(0, 1), torch.rand(8), None),
    ),
    "dequantize_weight": (
        OPS.dequantize_weight.default,
        lambda: (random_weight(7, 24, 5, 8).packed, *grid(7, 3), "int5", 8, 24, torch.bfloat16),
    ),
    "linear": (OPS.linear.default, linear_arguments),
    "linear in groups": (OPS.linear.default, lambda: linear_arguments((2, 5, 1), (2, 1, 7), 3, 8)),
    "linear without bias": (OPS.linear.default, lambda: linear_arguments((2, 1, 1), None, 8)),
    "matmul": (OPS.matmul.default, matmul_arguments),
    "matmul by row and column": (
        OPS.matmul.default,
        lambda: matmul_arguments((2, 3, 5, 1), (2, 1, 1, 7)),
    ),
    "token_scale": (OPS.token_scale.default, lambda: (torch.randn(2, 5, 32), "fp8")),
    "block_scale": (OPS.block_scale.default, lambda: (torch.randn(2, 5, 64), "mxfp4")),
    "block_scale on a scale": (OPS.block_scale.default, lambda: (torch.randn(2, 5, 64), "nvfp4", torch.rand(2, 1, 1))),
    "quantize blocks": (OPS.quantize.default, block_arguments),
    "linear of floats": (OPS.linear.default, float_arguments),
    "conv2d": (OPS.conv2d.default, conv_arguments),
    "conv2d in groups": (OPS.conv2d.default, lambda: conv_arguments(2, (2, 6, 1, 1))),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    op, arguments = CALLS[name]
    opcheck(op, arguments())


def test_opcheck_of_observe() -> None:
    with recording(lambda *_: None):
        opcheck(
            OPS.observe.default,
            (torch.randn(2, 3), torch.tensor(1), "k", -1),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.parametrize("name", CALLS)
def test_fake_kernels_tell_shape_dtype_and_strides(name: str) -> None:
    op, arguments = CALLS[name]
    real = op(*arguments())
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments()]
        fake = op(*fakes)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


class Quantized(nn.Module):
    """A patch convolution, a linear with a scale and a bias a sample, a balancing factor, a float-input linear."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape, bits, group_size in (
            ("conv", (8, 12), 8, 0),
            ("hidden", (16, 8), 4, 4),
            ("last", (4, 16), 3, 0),
        ):
            weight = random_weight(*shape, bits, group_size)
            for field in ("packed", "scale", "zero_point"):
                self.register_buffer(f"{name}_{field}", getattr(weight, field))
        self.register_buffer("scales", torch.rand(3, 1, 1) + 0.01)
        self.register_buffer("biases", torch.randn(3, 1, 16))
        self.register_buffer("factor", torch.rand(16))
        self.register_buffer("scale", torch.tensor(0.02))
        self.register_buffer("zero_point", torch.tensor(128, dtype=torch.uint8))

    def forward(self, image: Tensor, bin: Tensor) -> Tensor:
        xq = OPS.quantize(image, self.scale, self.zero_point, "int8")
        x = OPS.conv2d(
            *(xq, self.scale, self.zero_point, self.conv_packed, self.conv_scale, self.conv_zero_point, None),
            *("int8", "int8", [3, 2, 2], [2, 2], [0, 0], [1, 1], 1, torch.float32),
        )
        x = x.flatten(2).transpose(1, 2)
        scale = self.scales[bin]
        xq = OPS.quantize(x, scale, self.zero_point, "int8")
        x = OPS.linear(
            *(xq, scale, self.zero_point, self.hidden_packed, self.hidden_scale, self.hidden_zero_point),
            *(self.biases[bin], "int8", "int4", 4, torch.float32),
        )
        x = OPS.channel_affine(x, self.factor, None)
        stored = self.last_packed, self.last_scale, self.last_zero_point
        weight = OPS.dequantize_weight(*stored, "int3", 0, 16, torch.float32)
        return nn.functional.linear(x, weight)


def example(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 8, 8), torch.randint(0, 3, (batch,))


def test_export_keeps_the_nodes_and_the_batch_open() -> None:
    model = Quantized()
    batch = torch.export.Dim("batch", min=1, max=4096)
    exported = torch.export.export(model, example(3), dynamic_shapes={"image": {0: batch}, "bin": {0: batch}})
    for program in (exported, exported.run_decompositions()):
        names = [str(node.target) for node in program.graph.nodes if "fxquant" in str(node.target)]
        assert [name.split(".")[1] for name in names] == [
            *("quantize", "conv2d", "quantize", "linear", "channel_affine", "dequantize_weight")
        ]
        for size in (1, 3, 5):
            inputs = example(size)
            torch.testing.assert_close(program.module()(*inputs), model(*inputs))


def test_compiles_into_one_graph() -> None:
    model = Quantized()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (2, 5):
        inputs = example(size)
        torch.testing.assert_close(compiled(*inputs), model(*inputs))


def test_a_symbolic_batch_stays_symbolic() -> None:
    traced = make_fx(Quantized(), tracing_mode="symbolic", _allow_non_fake_inputs=True)(*example(6))
    image = next(iter(traced.graph.nodes)).meta["val"]
    for node in traced.graph.nodes:
        if "fxquant" in str(node.target) and "dequantize_weight" not in str(node.target):
            assert isinstance(node.meta["val"].shape[0], torch.SymInt)
            assert str(node.meta["val"].shape[0]) == str(image.shape[0])


class TestBadInput:
    @pytest.mark.parametrize("fake", [False, True])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({8: "int9"}, "unknown format 'int9'"),
            ({7: "int1"}, "unknown format 'int1'"),
            ({8: "int8"}, r"8 bits is packed as uint8 \[out, 24\], not torch.uint8 \(7, 12\)"),
            ({9: 5}, r"group_size=5 .* 24 input"),
            ({9: 8}, r"scale of this weight is \[out, groups\] = \(7, 3\), not \(7, 1\)"),
            ({1: torch.ones(24)}, r"scale of shape \(24,\) does not broadcast to \(2, 5, 1\)"),
            ({1: torch.ones(3, 1, 1)}, r"scale of shape \(3, 1, 1\)"),
            ({2: None}, "the input has the format int8, which needs a zero point"),
            ({11: torch.ones(())}, "the input has the format int8, which has no global scale"),
            ({2: torch.zeros(1, 1, 1, 1)}, r"zero point of shape \(1, 1, 1, 1\)"),
            ({6: torch.zeros(24)}, r"bias of shape \(24,\) does not broadcast to \(2, 5, 7\)"),
            ({3: codes(7, 12).to(torch.int32)}, r"not torch\.int32 \(7, 12\)"),
        ],
    )
    def test_linear(self, change: dict[int, object], message: str, fake: bool) -> None:
        arguments = [change.get(i, value) for i, value in enumerate((*linear_arguments(), None, None))]
        with pytest.raises((ConfigurationError, UnknownNameError), match=message):
            self.call(OPS.linear.default, arguments, fake)

    @pytest.mark.parametrize("fake", [False, True])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({0: torch.randn(2, 3, 5, 8)}, r"the left factor of a product is integer codes .* not torch.float32"),
            ({3: codes(8)}, r"the right factor of a product is integer codes of two axes or more"),
            ({3: codes(2, 1, 9, 7)}, r"\(2, 3, 5, 8\) and \(2, 1, 9, 7\) do not fit a matrix product"),
            ({1: torch.ones(8)}, r"scale of shape \(8,\) does not broadcast to \(2, 3, 5, 1\)"),
            ({5: torch.ones(2, 1, 8, 1)}, r"zero point of shape \(2, 1, 8, 1\) does not broadcast to \(2, 1, 1, 7\)"),
        ],
    )
    def test_matmul(self, change: dict[int, object], message: str, fake: bool) -> None:
        arguments = [change.get(i, value) for i, value in enumerate(matmul_arguments())]
        with pytest.raises(ConfigurationError, match=message):
            self.call(OPS.matmul.default, arguments, fake)

    @pytest.mark.parametrize("fake", [False, True])
    def test_conv2d(self, fake: bool) -> None:
        arguments = list(conv_arguments())
        arguments[0] = codes(2, 3, 9, 8)
        with pytest.raises(ConfigurationError, match=r"input of shape \[batch, 4, height, width\], not \(2, 3, 9, 8\)"):
            self.call(OPS.conv2d.default, arguments, fake)

    @pytest.mark.parametrize("fake", [False, True])
    def test_quantize_and_affine(self, fake: bool) -> None:
        x, (scale, zero_point) = torch.randn(2, 5, 8), grid()
        with pytest.raises(UnknownNameError, match="unknown format 'int16'"):
            self.call(OPS.quantize.default, [x, scale, zero_point, "int16"], fake)
        with pytest.raises(ConfigurationError, match="the input has the format int4, which needs a zero point"):
            self.call(OPS.quantize.default, [x, scale, None, "int4"], fake)
        with pytest.raises(ConfigurationError, match="scale of shape"):
            self.call(OPS.channel_affine.default, [x, torch.ones(5), None], fake)
        with pytest.raises(ConfigurationError, match="shift of shape"):
            self.call(OPS.channel_affine.default, [x, torch.ones(8), torch.ones(3, 1, 8)], fake)

    @staticmethod
    def call(op: torch._ops.OpOverload, arguments: list[object], fake: bool) -> None:
        if not fake:
            op(*arguments)
            return
        with FakeTensorMode() as mode:
            op(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments])


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", CALLS)
def test_cuda_agrees_with_the_cpu(name: str) -> None:
    op, make = CALLS[name]
    arguments = [torch.float64 if a is torch.float32 else a for a in make()]
    on_gpu = op(*[a.cuda() if isinstance(a, Tensor) else a for a in arguments])
    torch.testing.assert_close(on_gpu.cpu(), op(*arguments))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("bits", range(2, 9))
def test_cuda_packs_as_the_cpu(bits: int) -> None:
    q = codes(3, 37, bits=bits)
    packed = pack(q.cuda(), bits)
    assert torch.equal(packed.cpu(), pack(q, bits))
    assert torch.equal(unpack(packed, bits, 37).cpu(), q)
