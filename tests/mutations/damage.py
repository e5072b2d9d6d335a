"""Damages values in files and makes their digests valid again, so that the content checks see the damage.

In checkpoints and packages, changes that give another valid model of the same form, such as other finite weights, are
excluded: no check could detect them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from fxquant.disk import finished_work
from fxquant.disk.files import digest_of

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 7, 10**9, -(10**9), 2**63, 10**30, 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", "x", "float64", "int8", "timestep", "\x1b[31m", "../../etc/passwd", "ü" * 1000),
    *([], {}, [None], [0, 1], {"dict": {}}, {"a": 1}),
)


def sign(folder: Path) -> None:
    """Update the digests of a folder, as a forger would."""
    path = next((folder / name for name in ("plan.json", "package.json") if (folder / name).is_file()), None)
    data = None if path is None else _parsed(path)
    if path is None or not isinstance(data, dict) or "files" not in data:
        return
    if isinstance(data.get("files"), dict):
        for name in data["files"]:
            if (folder / str(name)).is_file():
                data["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    data.pop("digest", None)
    data["digest"] = digest_of(data)
    path.write_text(json.dumps(data, indent=1) + "\n")


def sign_alone(path: Path) -> None:
    """Update the digest that a JSON file holds of itself, or a part of a job that is kept of its tensors."""
    if path.suffix == ".json":
        data = _parsed(path)
        if isinstance(data, dict) and isinstance(data.get("digest"), str):
            data["digest"] = digest_of(data)
            path.write_text(json.dumps(data))
    elif path.suffix == ".safetensors":
        with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if finished_work._KEY in metadata:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                metadata["digest"] = finished_work._digest(metadata[finished_work._KEY], tensors)
                save_file(tensors, path, metadata=metadata)


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError):
        return None


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one thing in a checkpoint or a package; return a description for failing tests."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    path = folder / rng.choice(names)
    told = f"{path.name}: {damage_values(path, rng)}"
    sign(folder)
    return told


def damage_values(path: Path, rng: random.Random) -> str:
    """Damage one value of a JSON file, or one tensor of a safetensors file."""
    return _damage_json(path, rng) if path.suffix == ".json" else _damage_tensors(path, rng)


# --- JSON ---


def _damage_json(path: Path, rng: random.Random) -> str:
    data = json.loads(path.read_text())
    places = [place for place in _places(data) if place[0] not in ("digest", "files")]
    if not places:
        path.write_text("[]")
        return "no values"
    # Choose by top-level key rather than by size: a plan is mostly layers, and other parts would rarely be chosen.
    top = rng.choice(sorted({str(place[0]) for place in places}))
    place = rng.choice([place for place in places if str(place[0]) == top])
    # Reordered tensors of a graph give another valid program, and no check of a package could detect that.
    allowed = {"replace", "remove"} if "tensors" in place else {how for how, _ in _JSON}
    if place[0] == "adapters":  # Scales of LoRAs are values of the model, as weights are.
        allowed -= {"replace", "near", "swap"}
    how, change = rng.choice([entry for entry in _JSON if entry[0] in allowed])
    holder = data
    for key in place[:-1]:
        holder = holder[key]
    before = holder[place[-1]]
    change(holder, place[-1], rng)
    path.write_text(json.dumps(data, indent=1) + "\n")
    after = holder.get(place[-1]) if isinstance(holder, dict) else holder
    return f"{how} {' > '.join(map(str, place))}: {_short(before)} -> {_short(after)}"


def _places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        yield (*at, key)
        yield from _places(value, (*at, key))


def _replace(holder: Any, key: Any, rng: random.Random) -> None:
    holder[key] = copy.deepcopy(rng.choice(_VALUES))


def _near(holder: Any, key: Any, rng: random.Random) -> None:
    """Change a number or a text slightly, like a mistake in a manual edit."""
    value = holder[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        holder[key] = rng.choice([value + 1, value - 1, -value, value * 2, value * 1_000_000])
    elif isinstance(value, str):
        holder[key] = value[:-1] if rng.random() < 0.5 else f"{value}x"
    else:
        holder[key] = not value


def _remove(holder: Any, key: Any, rng: random.Random) -> None:
    del holder[key]


def _rename(holder: Any, key: Any, rng: random.Random) -> None:
    value = holder.pop(key)
    if isinstance(holder, dict):
        holder[f"{key}_"] = value
    else:
        holder.append(value)


def _repeat(holder: Any, key: Any, rng: random.Random) -> None:
    value = holder[key]
    count = rng.choice([1, 20, 50_000])
    if isinstance(holder, list):
        holder.extend(copy.deepcopy(value) for _ in range(count if len(json.dumps(value)) < 100 else 20))
    else:
        for number in range(min(count, 2000)):
            holder[f"{key}{number}"] = copy.deepcopy(value)


def _swap(holder: Any, key: Any, rng: random.Random) -> None:
    other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key], holder[other] = holder[other], holder[key]


def _nest(holder: Any, key: Any, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 50, 400])):
        holder[key] = [holder[key]]


def _grow(holder: Any, key: Any, rng: random.Random) -> None:
    value = holder[key]
    if isinstance(value, list):
        holder[key] = [float(number) for number in range(200_000)]
    else:
        holder[key] = "x," * 500_000


_JSON: list[tuple[str, Callable[[Any, Any, random.Random], None]]] = [
    *[("replace", _replace)] * 3,
    *[("near", _near)] * 3,
    ("remove", _remove),
    ("rename", _rename),
    ("repeat", _repeat),
    ("swap", _swap),
    ("nest", _nest),
    ("grow", _grow),
]


def _short(value: Any) -> str:
    return ascii(value)[:80]


# --- tensors ---


def _damage_tensors(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    tensors = load(content)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {"format": "pt"}
    header = next((name for name, text in metadata.items() if text.startswith("{")), None)
    if header is not None and rng.random() < 0.5:
        told = _damage_metadata(path, metadata, header, rng)
        path.write_bytes(save(tensors, metadata=metadata))
        return told
    if not tensors or rng.random() < 0.2:
        return _damage_header(path, content, rng)
    name = rng.choice(sorted(tensors))
    how, change = rng.choice(_TENSORS)
    if change is _poison:
        _poison(tensors, name, rng, packaged=(path.parent / "package.json").is_file())
    else:
        change(tensors, name, rng)
    path.write_bytes(save({key: tensor.contiguous() for key, tensor in tensors.items()}, metadata=metadata))
    return f"{how} {name}"


def _damage_metadata(path: Path, metadata: dict[str, str], header: str, rng: random.Random) -> str:
    """Damage the JSON values that the metadata of a file holds as a text."""
    scratch = path.with_suffix(".json")
    scratch.write_text(metadata[header])
    told = _damage_json(scratch, rng)
    metadata[header] = scratch.read_text()
    scratch.unlink()
    return told


def _damage_header(path: Path, content: bytes, rng: random.Random) -> str:
    (length,) = struct.unpack("<Q", content[:8])
    kind = rng.choice(["flip", "length", "cut", "longer", "empty"])
    position = rng.randrange(8 + length)
    if kind == "flip":
        damaged = bytearray(content)
        damaged[position] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
    elif kind == "length":
        path.write_bytes(struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63])) + content[8:])
    elif kind == "longer":
        path.write_bytes(content + b"\0" * 64)
    else:
        path.write_bytes(content[:position] if kind == "cut" else b"")
    return f"header: {kind} at {position}"


def _poison(tensors: dict[str, Tensor], name: str, rng: random.Random, packaged: bool = False) -> None:
    """Write a value that no compiled model has: NaN, infinity, a nonpositive scale, or a zero point outside the codes.

    Codes and 8-bit zero points can be any byte, and other integer tensors can have any value.
    """
    floats = sorted(key for key, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel())
    low_bits = sorted(key for key in tensors if key.endswith("zero_point") and f"{key[:-11]}_packed" in tensors)
    if low_bits and not packaged and rng.random() < 0.2:
        name = rng.choice(low_bits)
        packed = tensors[f"{name[:-11]}_packed"]
        if int(tensors[name].max()) < 16 and packed.numel():
            tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = 255
            return
    if not floats:
        return _drop(tensors, name, rng)
    name = name if name in floats else rng.choice(floats)
    wrong = [float("nan"), float("inf"), float("-inf")]
    if name.endswith("_scale") and not packaged:  # A backend may have combined the scales of a package.
        wrong += [0.0, -0.0, -1.0]
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = rng.choice(wrong)


def _cast(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    choices = (torch.int8, torch.int32, torch.bool)
    tensors[name] = tensors[name].to(rng.choice([dtype for dtype in choices if dtype != tensors[name].dtype]))


def _cast_to_floats(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    choices = (torch.float64, torch.float16, torch.bfloat16)
    tensors[name] = tensors[name].to(rng.choice([dtype for dtype in choices if dtype != tensors[name].dtype]))


def _reshape(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    tensor = tensors[name]
    shapes = ((*tensor.shape, 1), (1, *tensor.shape), (0, *tensor.shape[1:]), (2 * max(1, len(tensor.reshape(-1))),))
    tensors[name] = tensor.new_ones(rng.choice([shape for shape in shapes if shape != tuple(tensor.shape)]))


def _drop(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    del tensors[name]


def _misname(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    tensors[f"{name}.x"] = tensors.pop(name)


def _add(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    tensors[f"{name}{rng.randrange(9)}"] = tensors[name].clone()


_TENSORS: list[tuple[str, Callable[[dict[str, Tensor], str, random.Random], None]]] = [
    *[("poison", _poison)] * 4,
    ("cast", _cast),
    ("cast to floats", _cast_to_floats),
    ("reshape", _reshape),
    ("drop", _drop),
    ("misname", _misname),
    ("add", _add),
]
