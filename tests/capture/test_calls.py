from __future__ import annotations

import inspect
import json
from collections import OrderedDict, defaultdict, deque
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from fxquant.capture.calls import BATCH, Call, CallSpec, TensorSpec
from fxquant.capture.describe import canonical_call, describe_call
from fxquant.errors import CaptureError, CheckpointError


def forward(
    sample: Tensor, timestep: Any = None, labels: Any = None, added: Any = None, scale: float = 1.0, **more: Any
) -> None: ...


def canonical(*args: Any, **kwargs: Any) -> Call:
    return canonical_call(inspect.signature(forward), args, kwargs, "timestep")


def described(*args: Any, **kwargs: Any) -> CallSpec:
    return describe_call(canonical(*args, **kwargs))


def fits(call: CallSpec, *args: Any, **kwargs: Any) -> bool:
    return call.fits(canonical(*args, **kwargs))


X = torch.zeros(2, 5, 4)


def test_one_form_however_it_was_written() -> None:
    ways = [canonical(X, 3), canonical(sample=X, timestep=3), canonical(X, timestep=3, scale=1.0, added=None)]
    for call in ways:
        assert call.names == ("sample", "timestep", "labels", "added", "scale")
        assert call.leaves[0] is X
        assert call.leaves[2:] == [None, None, 1.0]
        assert call.structure == {"sample": 0, "timestep": 1, "labels": 2, "added": 3, "scale": 4}


@pytest.mark.parametrize(("number", "dtype"), [(3, torch.int64), (0.5, torch.float32)])
def test_a_timestep_given_as_a_number_becomes_a_tensor(number: float, dtype: torch.dtype) -> None:
    leaves = canonical(X, number).leaves
    assert (leaves[1].dtype, leaves[1].shape, leaves[1].item()) == (dtype, (), number)
    assert canonical(X, True).leaves[1] is True


def test_nested_inputs_have_readable_names() -> None:
    call = canonical(X, 1, added={"size": (1, X), "mode": "a"}, extra=[X])
    assert call.names[3:] == ("added.size.0", "added.size.1", "added.mode", "scale", "extra.0")
    assert call.leaves[5] == "a" and call.leaf("added.mode") == "a"
    assert call.structure["added"] == {"size": (3, 4), "mode": 5}
    assert call.structure["extra"] == [7]


def test_a_call_gives_its_arguments_back() -> None:
    call = canonical(X, 3, added={"size": (1, X)}, extra=[X])
    arguments = call.arguments()
    assert arguments["sample"] is X and arguments["added"] == {"size": (1, X)} and arguments["extra"] == [X]
    assert fits(describe_call(call), **arguments)
    assert call.device == torch.device("cpu") == canonical("name").device
    doubled = call.with_leaves([leaf * 2 if isinstance(leaf, Tensor) else leaf for leaf in call.leaves])
    assert doubled.names == call.names and doubled.leaf("timestep") == 6


def test_what_cannot_be_captured_is_named() -> None:
    with pytest.raises(
        CaptureError, match=r"input 'added.pipe' is a object; only tensors, numbers.*Give what the model"
    ):
        canonical(X, added={"pipe": object()})
    with pytest.raises(CaptureError, match=r"the model takes \*rest; give these inputs by keyword"):
        canonical_call(inspect.signature(lambda x, *rest: None), (X, X), {}, None)
    with pytest.raises(TypeError, match="sample"):
        canonical(timestep=1)


def test_the_leading_size_of_the_sample_is_the_batch() -> None:
    call = described(X, torch.zeros(2), torch.zeros(5, 3), {"size": torch.zeros(2, 2)})
    shapes = {name: spec.shape for name, spec in call.tensors}
    expected = {"sample": (BATCH, 5, 4), "timestep": (BATCH,), "labels": (5, 3), "added.size": (BATCH, 2)}
    assert shapes == expected | {"scale": ()}  # A number is a tensor to the graph.
    assert call.batched
    assert str(call.tensors[0][1]) == "float32[batch, 5, 4]"
    assert str(call).startswith("(sample: float32[batch, 5, 4], timestep: float32[batch], labels: float32[5, 3]")


@pytest.mark.parametrize(
    ("sample", "steps", "batched"),
    [
        ([torch.zeros(4, 1, 8), torch.zeros(4, 1, 8)], 2, False),  # A sample each, as Wan and Z-Image take them.
        ([torch.zeros(4, 1, 8)], 1, False),
        ([torch.zeros(2, 1, 8), torch.zeros(2, 1, 8)], 2, True),  # One list of batches, or two channels.
        ([torch.zeros(3, 5, 8)] * 2, 3, True),
        (torch.zeros(3, 5, 8), 3, True),
        (torch.zeros(3, 5, 8), 1, True),
    ],
)
def test_a_list_of_samples_has_no_batch_axis(sample: Any, steps: int, batched: bool) -> None:
    call = describe_call(canonical(sample, torch.zeros(steps)), "timestep")
    assert call.batched == batched
    assert call.items == ({f"sample.{i}": "sample" for i in range(len(sample))} if isinstance(sample, list) else {})


def test_which_calls_a_graph_serves() -> None:
    call = described(X, torch.zeros(2), scale=2.0)
    assert fits(call, torch.zeros(7, 5, 4), torch.zeros(7), scale=2.0)
    assert not fits(call, torch.zeros(7, 5, 4), torch.zeros(6), scale=2.0)  # Two batch sizes.
    assert not fits(call, torch.zeros(7, 6, 4), torch.zeros(7), scale=2.0)
    assert not fits(call, X.double(), torch.zeros(2), scale=2.0)
    assert fits(call, X, torch.zeros(2))
    assert fits(call, X, torch.zeros(2), scale=3.0)  # The graph reads it.
    assert not fits(call, X, torch.zeros(2), scale=2)  # Another type, another graph.
    assert not fits(call, X, torch.zeros(2), torch.zeros(2), scale=2.0)
    assert not fits(call, X, None, scale=2.0)
    assert not fits(call, X, torch.zeros(2), scale=2.0, more=None)
    assert not fits(call, torch.tensor(0.0), torch.zeros(2), scale=2.0)


def test_the_batch_size_of_a_call() -> None:
    call = described(X, 1)
    assert call.batch_size(canonical(torch.zeros(9, 5, 4), 1).leaves) == 9
    assert described(torch.tensor(1.0)).batch_size(canonical(torch.tensor(1.0)).leaves) == 0


plain = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5)
others = st.sampled_from(
    [torch.float16, torch.device("cpu", 1), torch.strided, torch.channels_last, torch.Size([2, 3])]
)
constants = plain | others | st.complex_numbers() | st.binary(max_size=3) | st.uuids() | st.builds(range, st.integers())
tensors = st.lists(st.integers(1, 4), max_size=3).map(torch.zeros)
values = st.recursive(
    constants | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text("abc.", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize(
    "one", [[X], (X,), {"0": X}, [], (), {}, [[], []]], ids=lambda one: str(pytree.tree_structure(one))
)
def test_leaves_of_the_same_names_fit_in_the_same_containers_only(one: Any) -> None:
    for other in ([X], (X,), {"0": X}, [], (), {}, [[], []], None):
        alike = type(one) is type(other) and pytree.tree_structure(one) == pytree.tree_structure(other)
        assert fits(described(X, 1, added=one), X, 1, added=other) == alike


class Size(NamedTuple):
    height: Any
    width: Any


@pytest.mark.parametrize(
    ("one", "plain"),
    [(Size(X, 1), "tuple"), (defaultdict(list, a=X), "dict"), (deque([X]), "list")],
    ids=["tuple", "dict", "list"],
)
def test_containers_that_a_file_cannot_tell_are_refused(one: Any, plain: str) -> None:
    with pytest.raises(CaptureError, match=rf"input 'added.size' is a {type(one).__name__}; .* Give a plain {plain}"):
        canonical(X, 1, added={"size": one})
    canonical(X, 1, added=OrderedDict(size=[X]))


def test_keys_that_a_file_makes_strings_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"'added.size' has the key 0 \(int\), which a file would store as a string"):
        canonical(X, 1, added={"size": {0: X}})


@given(values)
def test_a_call_survives_json(value: Any) -> None:
    call = described(X, 1, added=value)
    read = CallSpec.from_json(json.loads(json.dumps(call.to_json())))
    assert str(read) == str(call)
    assert fits(read, X, 1, added=value)
    made = read.arguments(lambda name, spec: 0.5 if spec.number else torch.zeros(spec.concrete(2), dtype=spec.dtype))
    given = canonical(**made)
    assert given.names == call.names
    assert given.structure == call.structure
    assert call.fits(given)


@pytest.mark.parametrize("data", [{}, {"names": [], "leaves": [{"shape": [1]}], "structure": {}}, {"names": 1}])
def test_what_is_no_call_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="the recorded call of the model cannot be read"):
        CallSpec.from_json(data)


def test_a_shape_at_a_batch_size() -> None:
    spec = TensorSpec((BATCH, 3), torch.float32)
    assert spec.concrete(5) == (5, 3)
    assert spec.fits(torch.zeros(5, 3), 5)
    assert not spec.fits(torch.zeros(5, 3), 4)
